"""The battery's parts about the model: the transformer alone, whole edits, a peer's transformer, and each profile."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from step1x.bench import full
from step1x.bench.battery import Run
from step1x.bench.ceilings import gemm_rate
from step1x.bench.counters import photograph
from step1x.bench.counting import flop_counter
from step1x.bench.measure import edit_and_save, timings
from step1x.engine import Engine, released, sizes
from step1x.engine.algebra import OFF, ON
from step1x.engine.dit import DiT, DiTConfig
from step1x.engine.engine_config import model_sizes
from step1x.engine.executor import Execution, stepper
from step1x.engine.folder import locate
from step1x.engine.image import Canvas, image_ids
from step1x.engine.planner import plan
from step1x.engine.residency import limit
from step1x.kernels.launch import capability
from step1x.profiles import Profile, load_profile

if TYPE_CHECKING:
    from PIL.Image import Image

    from step1x.engine.request import Edit

SIZES = {"full": (512, 768, 1024), "smoke": (64,)}
STEPS = {"full": 28, "smoke": 2}
GUIDANCE = 6.0


def sides(run: Run) -> tuple[int, ...]:
    return SIZES["smoke" if run.smoke else "full"]


def _steps(run: Run) -> int:
    return STEPS["smoke" if run.smoke else "full"]


def released_config(run: Run) -> DiTConfig:
    """The released transformer, or for smoke runs the bundled checkpoint's."""
    if not run.smoke:
        return released.dit_config(full.VERSION)
    folder = locate(None)
    return sizes.dit_config(folder.dit, folder.dit_configs)


def compile_blocks(run: Run, blocks: Iterable[nn.Module]) -> None:
    """Compiles each block by itself: blocks of a kind share one compilation, which serves all sizes.

    A smoke run stops before the code generator, which takes minutes on a CPU.
    """
    torch._dynamo.reset()
    for block in blocks:
        block.compile(dynamic=True, backend="aot_eager" if run.smoke else "inductor")


# How a step is run, in the order of worth: its algebra, and what runs it.
MODES = {
    "compiled_kernels": (ON, Execution(kernels="on", compiled=True)),
    "kernels": (ON, Execution(kernels="on")),
    "exact": (ON, Execution(kernels="off")),
    "compiled": (ON, Execution(kernels="off", compiled=True)),
    "plain": (OFF, Execution(kernels="off")),
}


def dit(run: Run) -> None:
    """A step of both guidance branches, run in every way: seconds, rate, ratio to the floor of its FLOPs, memory."""
    model = full.hollow_dit(released_config(run))
    full.fill(model, full.random(run.device), run.dtype)
    rate = gemm_rate(run.device, run.dtype)
    run.put("dit.ceiling", rate, "FLOP/s", "info", higher=True)
    for mode in MODES:
        for side in sorted(sides(run), reverse=True):
            if not run.late(f"dit {mode} {side}"):
                _step(run, model, mode, side, rate)


def _step(run: Run, model: DiT, mode: str, side: int, rate: float) -> None:
    algebra, execution = MODES[mode]
    torch._dynamo.reset()
    # A smoke run stops before the code generator, which takes minutes on a CPU.
    runner = stepper(model, execution, "aot_eager" if run.smoke else "inductor")
    with flop_counter() as counter:
        full.step(model, Canvas(side, side), algebra, stepper(model, MODES["exact"][1]))()
    seconds, flops = run.seconds(full.step(model, Canvas(side, side), algebra, runner)), counter.get_total_flops()
    name = f"dit.{side}.{mode}"
    run.put(f"{name}.seconds", seconds, "s", "step")
    run.put(f"{name}.rate", flops / seconds, "FLOP/s", "info", higher=True)
    run.put(f"{name}.times_floor", seconds * rate / flops, "", "info")
    run.peak(f"{name}.peak_reserved")


def _engine(run: Run, profile: str | Profile) -> Engine:
    """The released model with random weights as a profile has it; for smoke runs, one of the bundled sizes."""
    settings = load_profile(profile) if isinstance(profile, str) else profile
    return full.engine(run.device, settings, model_sizes(None if run.smoke else full.VERSION))


def e2e(run: Run) -> None:
    """Whole edits with guidance: stages, first and warm run, and how long the GPU waits between steps."""
    engine, steps = _engine(run, "bf16-80gb" if run.device.type == "cuda" else "cpu"), _steps(run)
    pictures = count()  # each edit is of another one: what the text model read of a picture is kept

    def edit(side: int, steps: int, on_stage: Callable[[str], None] | None = None) -> "Edit":
        return edit_and_save(
            engine,
            photograph(side, side, next(pictures)),
            steps=steps,
            guidance=GUIDANCE,
            size=side,
            seed=0,
            on_stage=on_stage,
        )

    first = min(4, steps)
    run.notes["first_edit"] = f"of {first} steps, the others of {steps}"
    for side in sides(run):
        cold = edit(side, first)
        for name, metric in timings(cold, [edit(side, steps)]).items():
            run.metrics[f"e2e.{side}.{name}"] = metric
        run.put(f"e2e.{side}.edit", run.metrics[f"e2e.{side}.edit"].value, "s", "end-to-end")
        run.peak(f"e2e.{side}.peak_reserved")
    if run.device.type != "cuda":
        run.notes["gpu_idle"] = "not measured: no GPU"
        return
    side = sides(run)[0]
    busy, whole = busy_seconds(lambda on_stage: edit(side, first, on_stage))
    run.put(f"e2e.{side}.gpu_idle_per_step", (whole - busy) / first, "s", "info")


def busy_seconds(edit: Callable[[Callable[[str], None]], object]) -> tuple[float, float]:
    """Seconds in which the GPU ran something during the denoise loop of an edit, and seconds of that loop.

    `edit` takes the callback for stages.
    """
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    profiler, began, whole = profile(activities=[ProfilerActivity.CUDA]), 0.0, 0.0

    def on_stage(name: str) -> None:
        nonlocal began, whole
        torch.cuda.synchronize()
        if name == "denoise":
            profiler.start()
            began = time.perf_counter()
        elif name == "decode":
            whole = time.perf_counter() - began
            profiler.stop()

    edit(on_stage)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    return covered(spans) / 1e6, whole


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of sorted spans."""
    total, reached = 0.0, -math.inf
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def peers(run: Run) -> None:
    """diffusers' Flux transformer with the same blocks, rows and batch, next to ours."""
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError:
        run.notes["peers"] = "not measured: diffusers is not installed (carry its wheel)"
        return
    config = released_config(run)
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=config.in_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=config.context_channels,
            pooled_projection_dim=config.pooled_channels,
            guidance_embeds=False,
            axes_dims_rope=config.rope_axes,
        )
    full.fill(model, full.random(run.device), run.dtype)
    model.eval()
    for mode in ("eager", "compiled"):
        if mode == "compiled":
            compile_blocks(run, (*model.transformer_blocks, *model.single_transformer_blocks))
        for side in sides(run):
            run.put(f"peers.diffusers_flux.{side}.{mode}.seconds", _flux(run, model, config, side), "s", "info")
            gc.collect()


def _flux(run: Run, model: Any, config: DiTConfig, side: int) -> float:
    canvas, rows = Canvas(side, side), full.VARIANT.text_tokens
    random = {"device": run.device, "dtype": run.dtype}
    tokens = torch.randn(2, 2 * canvas.tokens, config.in_channels, **random)  # type: ignore[call-overload]
    text = torch.randn(2, rows, config.context_channels, **random)  # type: ignore[call-overload]
    pooled = torch.randn(2, config.pooled_channels, **random)  # type: ignore[call-overload]
    ids = image_ids(canvas.grid, full.VARIANT.reference_ids)[0].to(run.device)
    return run.seconds(
        lambda: model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((2,), 0.5, **random),  # type: ignore[call-overload]
            img_ids=ids,
            txt_ids=torch.zeros(rows, 3, device=run.device),
            return_dict=False,
        )
    )


def profile(run: Run, name: str) -> None:
    """A profile under the cap that it claims: seconds of an edit at each size, and its peak beside the planned one."""
    settings, sizes = load_profile(name), model_sizes(None if run.smoke else full.VERSION)
    if run.device.type != "cuda":
        run.notes[name] = "no cap: not a GPU"
    elif 10 * settings.capability > capability(run.device):
        run.notes[name] = f"not measured: needs compute capability {settings.capability}"
        return
    limit(settings.budget_gb, run.device)
    engine, steps = _engine(run, settings), _steps(run)
    for side in sides(run):
        if run.late(f"{name} {side}"):
            return
        if not run.smoke:  # the first edit of a size compiles and warms up
            edit_and_save(engine, photograph(side, side), steps=2, guidance=GUIDANCE, size=side, seed=0)
        shown = photograph(side, side, 1)
        edit = edit_and_save(engine, shown, steps=steps, guidance=GUIDANCE, size=side, seed=0)
        run.put(f"{name}.{side}.edit", sum(edit.timings.values()), "s", "end-to-end")
        run.peak(f"{name}.{side}.peak_reserved")
        planned = plan(sizes, settings, canvas=Canvas(side, side), batch=1).peak.bytes
        run.put(f"{name}.{side}.planned", planned, "B", "info")


SHARES = {"full": (0.1, 0.25, 0.5, 1.0), "smoke": (0.25,)}  # of the picture that a mask marks


def skipping(run: Run) -> None:
    """Edits by a mask at every speed, and seconds of each kind of step: all tokens, some of them, none."""
    engine, steps = _engine(run, "fp8-80gb" if run.device.type == "cuda" else "cpu"), 8 if run.smoke else _steps(run)
    pictures = count()

    def edit(side: int, speed: str, share: float | None) -> "Edit":
        options = {} if share is None else {"mask": marked(side, share)}
        shown = photograph(side, side, next(pictures))
        return edit_and_save(engine, shown, steps=steps, guidance=GUIDANCE, size=side, seed=0, speed=speed, **options)

    for side in sorted(sides(run), reverse=True):
        for share in (None, *SHARES["smoke" if run.smoke else "full"]):
            for speed in ("exact", "balanced", "fast", "turbo"):
                name = f"skipping.{side}.{'none' if share is None else f'{share:.0%}'}.{speed}"
                if run.late(name):
                    return
                edit(side, speed, share)  # compiles and warms up
                made = edit(side, speed, share)
                run.put(f"{name}.edit", sum(made.timings.values()), "s", "end-to-end")
                run.put(f"{name}.denoise", made.timings["denoise"], "s", "info")
                for letter, seconds in by_letter(made).items():
                    run.put(f"{name}.step_{letter}", seconds, "s", "step")
                run.peak(f"{name}.peak_reserved")


def marked(side: int, share: float) -> "Image":
    """A mask that is white in a square of so much of the picture."""
    from PIL import Image

    edge = max(1, round(side * share**0.5))
    mask = Image.new("L", (side, side))
    mask.paste(255, (0, 0, edge, edge))
    return mask


def by_letter(edit: "Edit") -> dict[str, float]:
    """Median seconds of the steps of each letter of the plan; of "F" where there is none."""
    plan = str(edit.metadata.get("plan", "F" * len(edit.steps))).replace("-", "")
    found: dict[str, list[float]] = {}
    for letter, seconds in zip(plan, edit.steps, strict=True):
        found.setdefault(letter, []).append(seconds)
    return {letter: sorted(times)[len(times) // 2] for letter, times in found.items()}
