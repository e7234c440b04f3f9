"""What quantisation costs: the error of each layer on the rows that it meets, and the error of the edited pictures.

Pictures are compared as they are saved, in 8 bits, with those of the same model without quantisation and the same
seeds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from step1x.bench.counters import photograph
from step1x.bench.measure import device_name
from step1x.bench.record import Metric, Record, place
from step1x.engine import Engine
from step1x.engine.algebra import OFF, ON
from step1x.engine.errors import InputError
from step1x.engine.loading import wanted_profile
from step1x.quant.linear import QuantizedLinear, chosen
from step1x.quant.rules import Component
from step1x.quant.schemes import Scheme

INSTRUCTIONS = (
    "make it black and white",
    "add a red circle at the right",
    "make it warmer",
    "paint the left half blue",
    "blur the picture",
    "more contrast",
)
SIDE = 256  # pixels of a made picture, at least the size level
WORST = 0.05  # share of the edits
MOST_DB = 80.0  # of pictures that are equal
# A fresh reading of each picture: the text model may be the one that is quantised.
ALGEBRA = replace(ON, share=False)

Shown = tuple[Image.Image | Path, str]  # a picture and its instruction


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to measure; None leaves the choice to the model and the machine, as in `step1x-engine edit`."""

    model: str | None = None
    profile: str | None = None
    device: str | None = None
    component: Component = "dit"
    schemes: Sequence[Scheme] = ("fp8", "int8", "int4-weight")
    layers: bool = True  # also each layer alone
    photos: Path | None = None  # a folder of .jpg files
    size: int | None = None
    steps: int | None = None


def measure(settings: Settings) -> Record:
    """Edits without quantisation, then with each scheme.

    Metrics in dB, for a scheme S: S.mean and S.worst are the PSNR over the edits, the latter of the worst 5 % of them,
    with all layers quantised that the rules name. With `layers` also, for a layer L, S.L.sqnr: signal to error of its
    output on the rows of the first edit; and S.L.psnr of that edit's picture with this layer alone quantised.
    Raises InputError for bad settings and for a model that is quantised already.
    """
    engine = Engine.load(settings.model, profile=settings.profile, device=settings.device, cache=False, compiled=False)
    shown = pictures(settings.photos, max(SIDE, settings.size or engine.variant.size))
    module = engine.dit if settings.component in ("dit", "folded") else engine.conditioner.model  # type: ignore[union-attr]
    options: dict[str, Any] = {"size": settings.size, "steps": settings.steps, "exact_algebra": ALGEBRA}

    def run(some: Sequence[Shown]) -> list[Image.Image]:
        return [engine.edit(*one, seed=seed, **options).image for seed, one in enumerate(some)]

    wanted = run(shown)
    metrics = {}
    for scheme in settings.schemes:
        layers = quantised_layers(module, settings.component, scheme)
        if settings.layers:
            with recorded(module, layers) as errors:
                engine.edit(*shown[0], seed=0, **{**options, "exact_algebra": OFF})
            for name, layer in layers.items():
                with replaced(module, {name: layer}):
                    metrics[f"{scheme}.{name}.psnr"] = decibels(psnr(run(shown[:1])[0], wanted[0]))
                metrics[f"{scheme}.{name}.sqnr"] = decibels(errors[name].sqnr)
        with replaced(module, layers):
            values = [psnr(got, plain) for got, plain in zip(run(shown), wanted, strict=True)]
        metrics[f"{scheme}.mean"] = decibels(float(np.mean(values)))
        metrics[f"{scheme}.worst"] = decibels(worst(values))
    return Record(
        suite="quantisation",
        place=place(device_name(engine.device)),
        profile=wanted_profile(settings.profile, {"device": settings.device}, settings.model).name,
        size=str(settings.size or engine.variant.size),
        metrics=metrics,
        notes={
            "model": engine.name,
            "component": settings.component,
            "dtype": str(engine.dit.dtype).removeprefix("torch."),
            "edits": str(len(shown)),
        },
    )


def pictures(folder: Path | None, side: int) -> list[Shown]:
    """Made pictures with an instruction each, or the photographs of a folder with all instructions.

    Raises InputError for a folder without photographs.
    """
    if folder is None:
        made = [photograph(side, side, 40 * index) for index in range(len(INSTRUCTIONS))]
        return list(zip(made, INSTRUCTIONS, strict=True))
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise InputError(f"{folder}: no .jpg photographs")
    return [(path, instruction) for path in paths for instruction in INSTRUCTIONS]


def quantised_layers(module: nn.Module, component: Component, scheme: Scheme) -> dict[str, nn.Module]:
    """The layers that the rules quantise, quantised; the module keeps its own. Raises InputError if there are none."""
    found: dict[str, nn.Module] = {}
    for name, wanted in chosen(module, component, scheme).items():
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        found[name] = QuantizedLinear.of(wanted, layer)
    if not found:
        raise InputError(f"no layer of {component} can be {scheme}; the model must not be quantised already")
    return found


@contextmanager
def replaced(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The module with `layers` in the place of its own."""
    own = {name: module.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            module.set_submodule(name, layer)
        yield
    finally:
        for name, layer in own.items():
            module.set_submodule(name, layer)


@dataclass(slots=True)
class Error:
    """Sums of squares over all outputs of a layer."""

    signal: float = 0.0
    error: float = 0.0

    def add(self, wanted: Tensor, got: Tensor) -> None:
        self.signal += float(wanted.float().square().sum())
        self.error += float((got.float() - wanted.float()).square().sum())

    @property
    def sqnr(self) -> float:
        """dB."""
        return 10 * math.log10(max(self.signal, 1e-30) / max(self.error, 1e-30))


@contextmanager
def recorded(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Error]]:
    """What those layers would have made of the rows that the module's own layers are given."""
    errors = {name: Error() for name in layers}
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def compare(own: nn.Module, given: Any, out: Tensor, name: str = name, layer: Any = layer) -> None:
                errors[name].add(out, layer(*given))

            hooks.callback(module.get_submodule(name).register_forward_hook(compare).remove)
        yield errors


def psnr(got: Image.Image, wanted: Image.Image) -> float:
    """dB of a peak of 255, at most `MOST_DB`."""
    a, b = (np.asarray(image.convert("RGB"), np.float64) / 255 for image in (got, wanted))
    return -10 * math.log10(max(float(np.mean((a - b) ** 2)), 10 ** (-MOST_DB / 10)))


def worst(values: Sequence[float]) -> float:
    """Mean of the least 5 % of the values, of one at least."""
    return float(np.mean(sorted(values)[: math.ceil(WORST * len(values))]))


def decibels(value: float) -> Metric:
    return Metric(value=value, unit="dB", kind="info", better="higher")


def report(record: Record) -> str:
    """Of each scheme a line, and under it a line for each layer if they were measured."""
    notes = record.notes
    lines = [f"{record.place.device}, {notes['model']}, {notes['component']}, {notes['dtype']}, {notes['edits']} edits"]
    values = {name: metric.value for name, metric in record.metrics.items()}
    for scheme in (name.removesuffix(".mean") for name in values if name.endswith(".mean")):
        mean, least = values[f"{scheme}.mean"], values[f"{scheme}.worst"]
        lines.append(f"{scheme:14}all layers: PSNR {mean:.1f} dB, worst 5 % {least:.1f} dB")
        measured = [name.removesuffix(".sqnr") for name in values if name.endswith(".sqnr")]
        for name in (one for one in measured if one.startswith(f"{scheme}.")):
            layer, sqnr, alone = name.removeprefix(f"{scheme}."), values[f"{name}.sqnr"], values[f"{name}.psnr"]
            lines.append(f"  {layer:44}SQNR {sqnr:5.1f} dB   alone PSNR {alone:5.1f} dB")
    return "\n".join(lines)
