"""What the commands share: kinds of values, --debug, the exit codes."""

import logging
import math
from collections.abc import Callable
from typing import Any

import click

EXIT_CODES = "Exit codes: 0 done, 1 we failed, 2 the input or the usage was wrong, 130 interrupted."
DEVICES = ("auto", "cpu", "cuda", "mps")
SPEEDS = ("exact", "balanced", "fast", "turbo")  # as profiles.Speed, which is not imported for --help
BACKENDS = ("torch", "aoti", "onnx", "tensorrt")  # as profiles.BackendName, likewise
BACKEND_HELP = "What runs the steps: torch, or an engine exported for another.  [default: the profile's]"
PROFILE_HELP = "Profile, .toml file, or auto: the most faithful that is fast on the card.  [default: auto]"
DEBUG_HELP = "Show tracebacks and the libraries' logs."


class Finite(click.FloatRange):
    """A range that NaN is not in either (every comparison with NaN is false)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class DeviceName(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3 only
    """auto, cpu, cuda, cuda:N or mps; whether it is there is for torch to say."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        kind, colon, index = str(value).partition(":")
        if kind in DEVICES and (not colon or (kind == "cuda" and index.isascii() and index.isdigit())):
            return value
        self.fail(f"{value!r} is not one of auto, cpu, cuda, cuda:N, mps", param, ctx)


class Switch(click.ParamType):  # type: ignore[type-arg]
    """on or off."""

    name = "on|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if isinstance(value, bool):
            return value
        if value not in ("on", "off"):
            self.fail(f"{value!r} is neither on nor off", param, ctx)
        return bool(value == "on")


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().obj.debug = True
        logging.disable(logging.NOTSET)


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--debug: show what we keep quiet about."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_debug,
        help=DEBUG_HELP,
    )(command)
