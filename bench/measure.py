"""Edits timed on this machine, for its owner: seconds of each stage, peak memory, and how near the device's limit."""

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from step1x.bench.ceilings import Ceiling, ceiling
from step1x.bench.counters import photograph
from step1x.bench.counting import flop_counter
from step1x.bench.own_cache import own_cache
from step1x.bench.record import Kind, Metric, Record, place
from step1x.engine import Engine
from step1x.engine.image import Canvas
from step1x.engine.loading import wanted_profile
from step1x.engine.timing import STAGES

if TYPE_CHECKING:
    from PIL.Image import Image

    from step1x.engine.request import Edit

BAR = 32  # characters of the longest bar
INSTRUCTION = "make it black and white"
PICTURE = 256  # pixels on a side of the picture edited, at least the size level


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to run; None leaves the choice to the model and the machine, as in `step1x-engine edit`."""

    model: str | None = None
    profile: str | None = None
    device: str | None = None
    size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    runs: int = 3


def measure(settings: Settings) -> Record:
    """Loads the model, edits once cold and `runs` times warm; the figures are medians of the warm edits.

    On CUDA the warm edits are compiled ones, as those of a server; the first is as `step1x-engine edit` makes it.
    Of the user's caches only built engines are used, by profiles that run no other way. Raises InputError for bad
    settings.
    """
    profile = wanted_profile(settings.profile, {"device": settings.device}, settings.model)
    with own_cache(engines=profile.quantises or profile.backend != "torch"):
        return _measure(settings)


def _measure(settings: Settings) -> Record:
    engine = Engine.load(settings.model, profile=settings.profile, device=settings.device, cache=False)
    side = settings.size or engine.variant.size
    pictures = count()  # each edit is of another one: what the text model read of a picture is kept

    def run() -> "Edit":
        source = photograph(max(side, PICTURE), max(side, PICTURE), next(pictures))
        return edit_and_save(
            engine, source, steps=settings.steps, guidance=settings.guidance, size=settings.size, seed=0
        )

    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    cold, flops = run(), _flops(run)
    if engine.device.type == "cuda":  # as a server would; on a CPU compiled blocks are no faster
        engine.compile()
        run()
    warm = [run() for _ in range(settings.runs)]
    limit = ceiling(engine.device, engine.dit.dtype)
    metrics = timings(cold, warm) | _memory(engine.device)
    metrics |= _floor(flops, metrics["edit"].value, limit)
    canvas = Canvas(side, side)
    return Record(
        suite="edit",
        place=place(device_name(engine.device)),
        profile=wanted_profile(settings.profile, {"device": settings.device}, settings.model).name,
        size=f"{canvas.width}x{canvas.height}",
        metrics=metrics,
        notes={"model": engine.name, "runs": str(settings.runs), "ceiling": limit.source},
    )


def edit_and_save(engine: Engine, source: "Image", **settings: Any) -> "Edit":
    """One edit with the settings of `Engine.edit`, and its picture written, so that saving is timed too."""
    result = engine.edit(source, INSTRUCTION, **settings)
    with TemporaryDirectory() as folder:
        result.save(Path(folder) / "edited.png")
    return result


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def timings(cold: "Edit", warm: Sequence["Edit"]) -> dict[str, Metric]:
    """Medians of the stages, of a step and of the whole over `warm`, and the whole of the first edit."""

    def seconds(value: float, kind: Kind) -> Metric:
        return Metric(value=value, unit="s", kind=kind)

    stages = [name for name in STAGES if name in cold.timings]
    found = {f"stage.{name}": seconds(median(edit.timings[name] for edit in warm), "stage") for name in stages}
    found["step"] = seconds(median(step for edit in warm for step in edit.steps), "step")
    found["edit"] = seconds(median(sum(edit.timings.values()) for edit in warm), "end-to-end")
    found["first_edit"] = seconds(sum(cold.timings.values()), "info")
    return found


def _memory(device: torch.device) -> dict[str, Metric]:
    """Peak bytes: what torch reserved on the GPU, or what the process held on the CPU."""
    if device.type == "cuda":
        size = torch.cuda.max_memory_reserved(device)
        return {"peak_reserved": Metric(value=size, unit="B", kind="memory")}
    kilo = 1 if sys.platform == "darwin" else 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
    return {"peak_resident": Metric(value=size, unit="B", kind="info")}  # of the whole process: not ours alone


def _flops(run: Callable[[], object]) -> int:
    """FLOPs of an edit that is not compiled: replayed graphs show none."""
    with flop_counter() as counter:
        run()
    return int(counter.get_total_flops())


def _floor(flops: int, whole: float, limit: Ceiling) -> dict[str, Metric]:
    """FLOPs of an edit, the seconds they would take at the device's limit, and how many times that `whole` is."""
    return {
        "flops": Metric(value=flops, unit="FLOP", kind="count"),
        "ceiling": Metric(value=limit.flops, unit="FLOP/s", kind="info"),
        "floor": Metric(value=flops / limit.flops, unit="s", kind="info"),
        "times_floor": Metric(value=whole * limit.flops / flops, unit="", kind="info"),
    }


def report(record: Record) -> str:
    """A stage table with bars, and a line each for memory and the floor."""
    values = {name: metric.value for name, metric in record.metrics.items()}
    stages = {name.removeprefix("stage."): value for name, value in values.items() if name.startswith("stage.")}
    longest = max(stages.values())
    lines = [f"{record.place.device}, profile {record.profile}, {record.size}, {record.notes['model']}"]
    for name in (name for name in STAGES if name in stages):
        bar = "█" * max(1, round(BAR * stages[name] / longest))
        lines.append(f"{name:13}{stages[name] * 1e3:10.1f} ms  {bar}")
    lines.append(f"{'edit':13}{values['edit'] * 1e3:10.1f} ms  (first {values['first_edit'] * 1e3:.1f})")
    lines.append(f"{'step':13}{values['step'] * 1e3:10.1f} ms")
    name = "peak_reserved" if "peak_reserved" in values else "peak_resident"
    lines.append(f"{'memory':13}{values[name] / 1e9:10.2f} GB {name.replace('_', ' ')}")
    lines.append(
        f"{'floor':13}{values['floor'] * 1e3:10.1f} ms  {values['flops'] / 1e12:.3g} TFLOP at "
        f"{values['ceiling'] / 1e12:.3g} TFLOP/s ({record.notes['ceiling']}); the edit took "
        f"{values['times_floor']:.1f} times that"
    )
    return "\n".join(lines)
