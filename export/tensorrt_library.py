"""Two libraries with one interface: TensorRT builds on the GPU it builds for, TensorRT-RTX needs none.

Neither is a dependency: they are found when they are asked for, and what is missing is said in one line.
"""

import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from step1x.engine.errors import InputError


@dataclass(frozen=True, slots=True)
class Library:
    """One of the two."""

    name: str
    modules: tuple[str, ...]  # under one of these names it is imported
    extra: str  # of this project, which installs it
    timed: bool  # it chooses kernels by timing them on the GPU at hand, and keeps the times

    @property
    def installed(self) -> bool:
        return any(importlib.util.find_spec(module) is not None for module in self.modules)

    def load(self) -> Any:
        """Its module. Raises InputError if it is not installed, or its parts do not fit each other."""
        fault: Exception | None = None
        for module in self.modules:
            try:
                return importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    fault = error
            except (ImportError, OSError) as error:  # shared libraries that are missing or of another version
                fault = error
        if fault is not None:
            raise InputError(f"{self.name} is installed but does not load: {one_line(str(fault))}; {self.remedy}")
        raise InputError(f"{self.name} is not installed: {self.remedy}")

    def target(self, target: str) -> Any:
        """What it calls a GPU that need not be here. Raises InputError for one that it cannot build for."""
        capabilities = vars(self.load().ComputeCapability).items()
        known = {f"sm_{name[2:]}": value for name, value in capabilities if name.startswith("SM")}
        if target not in known:
            names = ", ".join(sorted(known, key=lambda name: int(name[3:])))
            raise InputError(
                f"{self.name} builds for {names}, not for {target}: on a machine with that GPU, "
                f"pip install 'step1x-engine[{TENSORRT.extra}]', or build with --backend onnx or aoti"
            )
        return known[target]

    @property
    def remedy(self) -> str:
        return f"pip install 'step1x-engine[{self.extra}]', or build with --backend onnx, whose graph any runtime reads"


TENSORRT = Library("TensorRT", ("tensorrt",), "tensorrt", timed=True)
TENSORRT_RTX = Library("TensorRT-RTX", ("tensorrt_rtx", "tensorrt_rtx_bindings"), "tensorrt-rtx", timed=False)
LIBRARIES: Mapping[str, Library] = {library.name: library for library in (TENSORRT, TENSORRT_RTX)}


def library_for(target: str, here: str) -> Library:
    """What builds for a GPU architecture. here: that of the GPU at hand, or "none".

    Where both can, TensorRT: it times its kernels on the GPU at hand.
    Raises InputError where none can, and for a target that is none.
    """
    if not re.fullmatch(r"sm_\d{2,3}", target):
        raise InputError(f"{target!r} is no GPU architecture: say --target sm_89, for example")
    if target == here and TENSORRT.installed:
        return TENSORRT
    if TENSORRT_RTX.installed or not TENSORRT.installed:
        return TENSORRT_RTX
    raise InputError(f"TensorRT builds only for the GPU at hand ({here}); for {target}, {TENSORRT_RTX.remedy}")


NO_REASON = "it gives no reason"


class Messages:
    """What a library has said to its logger. Nothing is printed."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.layers = ""  # of the finished engine, a line for each
        self.activations = 0  # bytes that it works in

    def take(self, severity: str, text: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text)
        elif text.startswith("Layers:"):
            self.layers = text
        elif found := re.match(r"Total Activation Memory: (\d+) bytes", text):
            self.activations = int(found[1])

    @property
    def first(self) -> str:
        """The first error, in one line without places in the library's sources."""
        return one_line(self.errors[0]) if self.errors else NO_REASON

    @property
    def last(self) -> str:
        return one_line(self.errors[-1]) if self.errors else NO_REASON


def logger_of(trt: Any, messages: Messages) -> Any:
    """A logger for everything that a library makes."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.take(severity.name, text)

    return Logger()


def one_line(text: str) -> str:
    """A library's message without places in its sources, shortened to what a line holds."""
    text = re.sub(r"\.?\s*\bIn \w+ at \S+?\.\w+:\d+", "", text)
    text = re.sub(r"\[[\w.]+:\d+: \w+\]\s*", "", text)
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:299]}…"
