"""The battery's part about TensorRT: engines of some full-size blocks, whether they load, their steps beside torch's.

TensorRT-RTX has no target for Hopper, so engines for its neighbours are tried there.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from step1x.bench import full
from step1x.bench.battery import Run
from step1x.bench.battery_model import released_config, sides
from step1x.engine.algebra import ON
from step1x.engine.denoise import Runner
from step1x.engine.dit import DiT, Rope, Step, is_modulation
from step1x.engine.errors import InputError
from step1x.engine.executor import Execution, stepper
from step1x.engine.image import Canvas
from step1x.engine.parts import architecture
from step1x.export import onnx
from step1x.export.core import inputs_of
from step1x.export.tensorrt import build, profiles
from step1x.export.tensorrt_library import LIBRARIES, TENSORRT, TENSORRT_RTX, Library, library_for
from step1x.export.tensorrt_runtime import Plan, TensorRT
from step1x.quant.linear import swap
from step1x.quant.schemes import Scheme

DEPTHS = {"full": (2, 4), "smoke": (1, 1)}  # double and single blocks
TARGETS = ("sm_80", "sm_89", "sm_120")  # tried where the GPU's own is none that can be built for
SCHEMES: dict[str, tuple[Scheme, ...]] = {"full": ("plain", "fp8", "int8"), "smoke": ("fp8",)}
Given = tuple[Tensor, Step, Rope, int | None]  # of a velocity


def tensorrt(run: Run) -> None:
    """Engines of each scheme for this GPU: built, loaded, compared with torch and timed beside it."""
    if not (TENSORRT.installed or TENSORRT_RTX.installed):
        run.notes["tensorrt"] = "not measured: neither TensorRT nor TensorRT-RTX is installed (bench/gpu/tensorrt.sh)"
        return
    targets = targets_of(run)
    for scheme in SCHEMES["smoke" if run.smoke else "full"]:
        with tempfile.TemporaryDirectory() as folder:
            if targets and not run.late(f"tensorrt {scheme}"):
                targets -= _scheme(run, scheme, Path(folder), targets)


def targets_of(run: Run) -> set[str]:
    """What engines are built for: this GPU, or its neighbours."""
    own = architecture(str(run.device))
    if run.device.type != "cuda":
        return {TARGETS[1]}
    library = library_for(own, own)
    try:
        if not library.timed:
            library.target(own)
    except InputError as error:
        run.notes["tensorrt"] = str(error)
        return {*TARGETS}
    return {own}


def _scheme(run: Run, scheme: Scheme, folder: Path, targets: set[str]) -> set[str]:
    """Measures one scheme; returns the targets whose engines do not load here."""
    model, refused = blocks(run, scheme), set()
    save_file({key: value for key, value in model.state_dict().items() if _exported(key)}, folder / "dit.safetensors")
    given = {side: step_of(model, Canvas(side, side)) for side in sides(run)}
    exact = stepper(model, Execution(kernels="off"))
    graph = folder / "step.onnx"
    graph.write_bytes(onnx.graph("step", model, folder / "dit.safetensors"))
    for target in sorted(targets):
        name = f"tensorrt.{scheme}.{target}"
        try:
            engine = _built(run, name, graph, target)
        except InputError as error:
            run.notes[name] = str(error).replace(str(folder), "")
            continue
        try:
            plan = Plan(*engine, run.device)
        except InputError as error:
            run.notes[name] = str(error).replace(str(folder), "")
            refused.add(target)
            continue
        for side, one in given.items():
            compare(run, f"{name}.{side}", TensorRT({"step": plan}), (model, exact), one)
    return refused


def _exported(key: str) -> bool:
    return not is_modulation(key) and not key.startswith("connector.")


def _built(run: Run, name: str, graph: Path, target: str) -> tuple[Path, Library]:
    """An engine and the library that runs it. Raises InputError."""
    plan = graph.with_name(f"step.{target}.engine")
    report = build(graph, plan, target=target, profiles=profiles("step", levels=sides(run)))
    run.put(f"{name}.build", report.seconds, "s", "info")
    run.put(f"{name}.bytes", report.bytes, "B", "memory")
    run.put(f"{name}.activations", report.activation_bytes, "B", "memory")
    run.put(f"{name}.build_peak", report.peak_bytes, "B", "memory")
    run.notes[f"{name}.kernels"] = ", ".join(f"{count} {kind}" for kind, count in report.kernels.items())
    return plan, LIBRARIES[report.library]


def compare(run: Run, name: str, engine: TensorRT, torches: tuple[DiT, Runner], given: Given) -> None:
    """The error of an engine's step to torch's, and seconds of both, torch's compiled with our kernels."""
    model, exact = torches
    inputs = inputs_of(*given)
    expected, found = exact.velocity(*given), engine.step(inputs)
    run.put(f"{name}.error", float((found - expected).float().norm() / expected.float().norm()), "", "info")
    seconds = run.seconds(lambda: engine.step(inputs))
    run.put(f"{name}.seconds", seconds, "s", "step")
    run.peak(f"{name}.peak_reserved")
    torch._dynamo.reset()
    compiled = stepper(model, Execution(kernels="on", compiled=True), "aot_eager" if run.smoke else "inductor")
    run.put(f"{name}.of_compiled", seconds / run.seconds(lambda: compiled.velocity(*given)), "", "info")


def blocks(run: Run, scheme: Scheme) -> DiT:
    """Some of the released blocks with random weights; for smoke runs, of the bundled checkpoint's sizes."""
    depth, single = DEPTHS["smoke" if run.smoke else "full"]
    model = full.hollow_dit(replace(released_config(run), depth=depth, depth_single=single)).to(run.dtype)
    swap(model, "dit", scheme)
    full.fill(model, full.random(run.device), run.dtype)
    return model.eval()


def step_of(model: DiT, canvas: Canvas) -> Given:
    """What a velocity is given in a step of a size, its tokens random."""
    seen: list[Given] = []

    def velocity(tokens: Tensor, step: Step, rope: Rope, kept: int | None) -> Tensor:
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
        seen.append((noise.to(tokens), step, rope, kept))
        return tokens[:, :kept]

    full.step(model, canvas, ON, Runner(velocity))()
    return seen[0]
