"""Exact counters of the bundled checkpoint and of the full-size model: a latency gate that needs no GPU.

Every figure is the same on every run and every machine with the same versions, and lower is better, so that any
increase is a regression. `GROUPS` maps a group's name to the function that measures it.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from step1x.bench import full
from step1x.bench.counting import Launches, Traffic, flop_counter
from step1x.bench.own_cache import own_cache
from step1x.bench.pretend import Pretend
from step1x.bench.record import Metric, Record, counts, place
from step1x.engine import Engine, released
from step1x.engine.algebra import OFF, ON, Algebra
from step1x.engine.counting import Memory
from step1x.engine.denoise import Runner
from step1x.engine.dit import DiT, Text
from step1x.engine.executor import Execution
from step1x.engine.fused import Fused
from step1x.engine.hollow import see
from step1x.engine.image import Canvas, image_ids
from step1x.engine.weights import load
from step1x.kernels.cfg_step import cfg_step_op
from step1x.kernels.launch import assumed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

Metrics = dict[str, Metric]

STEPS = 4
SIZE = 128  # level of the bundled checkpoint's edit
GUIDANCE = 2.0
GRID = (18, 18)  # merged cells that the vision tower sees of a square picture at the released limits (model.md §1.5)
TEXT_TOKENS = 560  # of the language model: template, picture and a short instruction (model.md §3.13)
# Twenty canvases in the order in which an edit service might meet them, at two batch sizes.
SWEEP = tuple(Canvas(16 * (4 + i % 5), 16 * (4 + i // 5)) for i in range(20))
BATCHES = (1, 2)
CHIP = 90  # whose defaults are counted: H100 and H200


def photograph(width: int = 96, height: int = 96, moved: int = 0) -> "Image":
    """A picture to edit that needs no file: smooth colours with edges. moved: another one for each number below 256."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width]
    channels = [(x * 255 / width + moved) % 256, y * 255 / height, 255 * ((x // 16 + y // 16) % 2)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@contextmanager
def counted_calls(modules: dict[str, nn.Module]) -> "Iterator[Counter[str]]":
    """Counts forwards of the named modules."""
    calls: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
            hooks.callback(handle.remove)
        yield calls


@contextmanager
def _one_thread() -> "Iterator[None]":
    """Some operators are split by the number of threads; what is counted must not be."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Stages:
    """Splits what a counter has seen by stage: call it as each stage begins, and with "" at the end."""

    def __init__(self, total: Callable[[], int]) -> None:
        self._total = total
        self._stage, self._since = "", 0
        self.by_stage: Counter[str] = Counter()

    def __call__(self, stage: str) -> None:
        self.by_stage[self._stage] += self._total() - self._since
        self._stage, self._since = stage, self._total()


def edit() -> Metrics:
    """One guided edit with the bundled checkpoint, as if it lay on an accelerator that runs all of our kernels."""
    loaded = load(None, device="cpu", dtype=torch.float32)
    networks = {
        "vlm": loaded.conditioner.model.language_model,
        "vision": loaded.conditioner.model.visual,
        "dit": loaded.dit.final_layer.linear,
        "vae_encoder": loaded.vae.encoder,
        "vae_decoder": loaded.vae.decoder,
    }
    pretend, flops, launches = Pretend(), flop_counter(), Launches()
    for network in (loaded.dit, loaded.vae, loaded.conditioner.model):
        pretend.adopt(network)
    with pretend:
        engine = Engine(loaded, Execution(kernels="on"))
    flops_of, launches_of = _Stages(flops.get_total_flops), _Stages(lambda: launches.total)

    def on_stage(name: str) -> None:
        pretend.stage(name)
        flops_of(name)
        launches_of(name)

    with _one_thread(), counted_calls(networks) as calls, flops, launches, pretend:
        engine.edit(
            photograph(),
            "make it black and white",
            steps=STEPS,
            guidance=GUIDANCE,
            size=SIZE,
            seed=0,
            on_stage=on_stage,
        )
        on_stage("")
    return _edit_metrics(calls, pretend, flops_of.by_stage, launches_of.by_stage)


def _edit_metrics(calls: Counter[str], pretend: Pretend, flops: Counter[str], launches: Counter[str]) -> Metrics:
    found = counts({f"edit.{name}_forwards": calls[name] for name in calls})
    found |= counts({f"edit.{stage}.flops": value for stage, value in flops.items() if value}, "FLOP")
    found |= counts({f"edit.{stage}.launches": value for stage, value in launches.items() if stage and value})
    found["edit.denoise.launches_per_step"] = Metric(value=launches["denoise"] / STEPS, unit="", kind="count")
    found |= counts({f"edit.{stage}.to_device_bytes": n for stage, n in pretend.to_device.items()}, "B")
    found |= counts({f"edit.{stage}.from_device_bytes": n for stage, n in pretend.from_device.items()}, "B")
    waits: Counter[str] = Counter()
    for (stage, _), number in pretend.waits.items():
        waits[stage] += number
    # Named for every stage that runs on the device, so that a first wait in a stage that had none is a worse figure.
    stages = ("encode_text", "encode_image", "prepare", "denoise", "decode", "postprocess")
    return found | counts({f"edit.{stage}.waits": waits[stage] for stage in stages})


def graphs() -> Metrics:
    """Graph breaks and recompilations of a denoise step over SWEEP x BATCHES, traced by Dynamo without a compiler."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    engine = Engine.load(device="cpu", dtype=torch.float32)
    # One block of each kind: what breaks a graph in one block breaks it in all.
    dit, made = DiT(replace(engine.dit.config, depth=1, depth_single=1), engine.variant.dtype_flow != "pure"), 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal made
        made += 1
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    with _one_thread(), torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1000):
        compiled = torch.compile(Fused(dit).velocity, backend=backend)
        for batch in BATCHES:
            rows, width = engine.variant.text_tokens, dit.config.connector.in_channels
            text = Text(torch.zeros(batch, rows, width), torch.ones(batch, rows, dtype=torch.long))
            request = dit.prepare(text)
            step = dit.condition(request, torch.full((batch,), 0.5))
            for canvas in SWEEP:
                ids = image_ids(canvas.grid, engine.variant.reference_ids)
                rope = dit.rope(torch.zeros(1, rows, 3), ids)
                compiled(torch.zeros(batch, ids.shape[1], dit.config.in_channels), step, rope, canvas.tokens)
    breaks = sum(counters["graph_break"].values())
    torch._dynamo.reset()
    return counts({"graphs.breaks": breaks, "graphs.compilations": made})


class _Stretch:
    """Counts what is run within `with`: FLOPs, launches, elementwise traffic, and bytes above what was there."""

    def __init__(self) -> None:
        self._memory, self._launches, self._traffic, self._flops = Memory(), Launches(), Traffic(), flop_counter()
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        for mode in (self._memory, self._launches, self._traffic, self._flops):
            self._modes.enter_context(mode)
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()

    @property
    def launches(self) -> Counter[str]:
        return self._launches.operators

    def metrics(self, name: str) -> Metrics:
        return {
            f"{name}.flops": Metric(value=self._flops.get_total_flops(), unit="FLOP", kind="count"),
            f"{name}.launches": Metric(value=self._launches.total, unit="", kind="count"),
            f"{name}.elementwise_bytes": Metric(value=self._traffic.total, unit="B", kind="count"),
            f"{name}.peak_bytes": Metric(value=self._memory.peak, unit="B", kind="count"),
        }


def full_size(canvases: Sequence[Canvas] = full.CANVASES) -> Metrics:
    """The released v1.1 in bf16 with fake tensors: both guidance branches of a step, VAE, bytes of the weights.

    "guided_step" is what a GPU of CHIP runs where nothing is said, "plain_step" its velocity without exact algebra and
    fused operations.
    """
    from torch._subclasses import FakeTensorMode

    dit, vae, dtype = full.hollow_dit(), full.hollow_vae(), torch.bfloat16
    found: Metrics = {}
    with _one_thread(), torch.no_grad(), FakeTensorMode():
        for module in (dit, vae):
            full.fill(module, lambda shape, dtype: torch.empty(shape, dtype=dtype), dtype)
        found |= counts({f"full.{name}.weight_bytes": n for name, n in _weights(dit, vae).items()}, "B")
        for canvas in canvases:
            size = f"full.{canvas.width}x{canvas.height}"
            pixels = torch.zeros(1, 3, canvas.height, canvas.width, dtype=dtype)
            latents = torch.zeros(1, released.VAE.z_channels, *canvas.latent_size, dtype=dtype)
            step, plain = guided_step(dit, canvas, Execution()), one_step(dit, canvas, OFF)
            with _Stretch() as encoding:
                vae.encode(pixels)
            with _Stretch() as decoding:
                vae.decode(latents)
            stretches = {"guided_step": step, "plain_step": plain, "encode_image": encoding, "decode": decoding}
            for stage, stretch in stretches.items():
                found |= stretch.metrics(f"{size}.{stage}")
    return found


def one_step(dit: DiT, canvas: Canvas, algebra: Algebra) -> _Stretch:
    """`full.step`, counted."""
    run = full.step(dit, canvas, algebra)
    with _Stretch() as stretch:
        run()
    return stretch


def guided_step(dit: DiT, canvas: Canvas, execution: Execution, chip: int = CHIP) -> _Stretch:
    """A whole step of `denoise.denoise` after the first, as `execution` runs it on a GPU, counted.

    The tensors are not on one: what runs is chosen as for one, and our operations are one launch each there, too.
    """
    device, latents = torch.device("cuda", 0), torch.zeros(1, canvas.tokens, dit.config.in_channels)
    reference = latents.to(dit.dtype)
    with assumed(chip):
        operation = partial(execution.operation, device=device)
        fused, cfg_step = Fused(dit, operation, partial(execution.attend, device)), operation(cfg_step_op)
        run = full.step(dit, canvas, ON, Runner(fused.velocity))
        with _Stretch() as stretch:
            torch.cat((latents.to(dit.dtype), reference), dim=1)
            cfg_step(latents, run(), 6.0, -1 / 28, True, full.VARIANT.dtype_flow)
    return stretch


def _weights(dit: nn.Module, vae: nn.Module) -> dict[str, int]:
    """Bytes of each component in bf16; the text model's without its head."""
    networks = {"dit": dit, "vae": vae, "qwen": full.hollow_qwen()}
    return {name: full.weight_bytes(network, torch.bfloat16) for name, network in networks.items()}


def text() -> Metrics:
    """FLOPs of the full-size text stage for one prompt: vision tower block by block, and the language model."""
    model = full.hollow_qwen()
    with torch.no_grad(), torch.device("meta"):
        with flop_counter() as tower:
            see(model.visual, *GRID)
        with flop_counter() as language:
            model.language_model(
                inputs_embeds=torch.empty(1, TEXT_TOKENS, model.config.text_config.hidden_size),
                position_ids=torch.zeros(3, 1, TEXT_TOKENS, dtype=torch.long),
                use_cache=False,
            )
    seen = {"full.encode_text.vision_flops": tower.get_total_flops()}
    return counts({**seen, "full.encode_text.language_flops": language.get_total_flops()}, "FLOP")


def startup() -> Metrics:
    """Files opened and bytes read to load the bundled checkpoint; modules that --help and an edit import."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found"
        environment = {**os.environ, "STEP1X_STARTUP": str(out)}
        subprocess.run([sys.executable, "-c", _PROBE], check=True, env=environment, capture_output=True)
        values = [int(number) for number in re.findall(r"\d+", out.read_text())]
    names = ("help_modules", "help_foreign", "files_opened", "bytes_read", "bytes_mapped")
    units = ("", "", "", "B", "B")
    return {
        f"startup.{name}": Metric(value=value, unit=unit, kind="count")
        for name, value, unit in zip(names, values, units, strict=True)
    }


# Run in a fresh interpreter. The second load is counted: by then every import has been done.
_PROBE = """
import os, sys
before = set(sys.modules)
from step1x.engine.cli import program
try: program.main(["--help"])
except SystemExit: pass
new = set(sys.modules) - before
ours = sum(name.split(".")[0] == "step1x" for name in new)
tops = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names) - {"step1x", "click"}
import step1x.engine.weights
from step1x.engine import Engine
from pathlib import Path
Engine.load(device="cpu")
root = os.path.realpath(Path(step1x.engine.weights.__file__).parent / "bundled")
opened, mapped, on = [], [], True
def heard(event, words):
    if on and event == "open" and isinstance(words[0], str) and os.path.realpath(words[0]).startswith(root):
        opened.append(words[0])
    elif on and event == "mmap.__new__":
        mapped.append(words[1])
sys.addaudithook(heard)
def read():
    text = open("/proc/self/io").read()
    return int(text.split()[1]), len(text)
first, own = read()
Engine.load(device="cpu")
last, _ = read()
on = False
foreign = sum(not name.startswith("_") for name in tops)
facts = (ours, foreign, len(opened), last - first - own, sum(mapped))
Path(os.environ["STEP1X_STARTUP"]).write_text(" ".join(map(str, facts)))
"""

GROUPS: dict[str, Callable[[], Metrics]] = {
    "edit": edit,
    "graphs": graphs,
    "full": full_size,
    "text": text,
    "startup": startup,
}


def measure(groups: Iterable[str] = GROUPS) -> Record:
    """The counters of the named groups. Raises KeyError for an unknown one."""
    found: Metrics = {}
    with own_cache():  # an engine in the user's would be loaded instead of the checkpoint
        for name in groups:
            found |= GROUPS[name]()
    return Record(suite="counters", place=place(), profile="cpu", size="all", metrics=found)
