"""How the forwards of a loaded model run: as they are, compiled block by block, or as one CUDA graph.

Blocks of a kind share one compilation for each shape, so a step of 57 blocks costs a handful of them. On a GPU the
whole step is then captured as a CUDA graph: one launch instead of hundreds. Shapes are static, and text rows rounded
up to `TEXT_BUCKET`, so that instructions of different lengths meet the same graphs.
"""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from step1x.engine.backends import exported_runner
from step1x.engine.caches import cache_folder, make_private
from step1x.engine.denoise import Runner, Velocity
from step1x.engine.dit import DiT, Rope, Step, here
from step1x.engine.errors import InputError
from step1x.engine.fused import Fused
from step1x.engine.vae import VAE
from step1x.engine.weights import Components
from step1x.kernels.attention import attention_op
from step1x.kernels.attention_backends import Attention, choose
from step1x.kernels.cfg_step import cfg_step_op
from step1x.kernels.launch import Op, pays
from step1x.profiles import BackendName, Profile

log = logging.getLogger(__name__)

TEXT_BUCKET = 64  # rows
BLOCKS = ("enter", "double_block", "single_block", "last_block", "final_block")
RECOMPILE_LIMIT = 256  # of shapes for each kind of block; torch's 8 would be reached by a few picture sizes
GRAPHS = 8  # captured steps that are kept: one for each size, aspect and length of text met last


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How a loaded model runs."""

    kernels: str = "auto"  # our own on a GPU: "auto" for those measured to be faster on it, "on" for all, or "off"
    attention: str = "auto"  # or a backend by name (kernels/attention_backends.py)
    backend: BackendName = "torch"
    compiled: bool = False  # compile the blocks: the first edit of a size is slow, the others fast
    strip_pixels: int = 1 << 21  # larger pictures go through the autoencoder in strips: the same in half the memory
    fp8_attention: tuple[float, float] | None = None  # shares of the steps between which attention is 8-bit

    def __post_init__(self) -> None:
        if self.kernels not in ("auto", "on", "off"):
            raise InputError(f"kernels must be 'auto', 'on' or 'off', got {self.kernels!r}")

    @classmethod
    def of(cls, profile: Profile) -> Self:
        """As a profile says."""
        return cls(**{field.name: getattr(profile, field.name) for field in fields(cls)})

    def operation(self, op: Op, device: torch.device) -> Callable[..., Any]:
        """What runs an operation on a device: where no kernel does, its reference, without the dispatcher's 0.2 ms."""
        wanted = self.kernels == "on" or (self.kernels == "auto" and pays(op.name, device))
        return op.call if wanted else op.reference

    def attend(self, device: torch.device, biased: tuple[int, int] | None) -> Attention:
        """The attention where only the keys from `biased` on, up to its end, may carry a bias; None: any may.

        Raises InputError for a backend that is not there.
        """
        if self.attention == "auto" and (self.kernels == "on" or device.type != "cuda"):
            attend: Attention = self.operation(attention_op, device)
            return attend
        try:
            found = choose(self.attention, device, None if biased is None else slice(*biased))
        except ValueError as error:
            raise InputError(str(error)) from error
        return choose("sdpa", device) if biased is None and self.attention not in ("triton", "fp8") else found


DEFAULT = Execution()


def prepared(components: Components, execution: Execution) -> Runner:
    """What runs the steps of a model; its autoencoder is set to run as `execution` says, too.

    Raises InputError for an attention backend that is not there.
    """
    components.vae.strip_pixels = execution.strip_pixels
    if components.exported is not None:
        return exported_runner(
            components.exported, None if is_hollow(components.dit) else stepper(components.dit, DEFAULT)
        )
    if execution.compiled:
        keep_compiled(components.compiled)
        compile_vae(components.vae)
    return stepper(components.dit, execution)


def is_hollow(dit: DiT) -> bool:
    """Whether its blocks have no weights."""
    return any(parameter.is_meta for parameter in dit.parameters())


def stepper(dit: DiT, execution: Execution, backend: str = "inductor") -> Runner:
    """What runs the steps of a transformer. backend: of torch.compile.

    Raises InputError for an attention backend that is not there.
    """
    fused = fused_of(dit, execution, backend)
    # A graph reads weights where they were when it was captured, so blocks that come and go are run without.
    captured = execution.compiled and dit.device.type == "cuda" and dit.present is here

    def whole(one: Fused) -> Velocity:
        return Replay(one.velocity) if captured else one.velocity

    runner = Runner(
        whole(fused),
        execution.operation(cfg_step_op, dit.device),
        TEXT_BUCKET if execution.compiled else 1,
        rows=fused.velocity,
    )
    if execution.fp8_attention is None:
        return runner
    coarse = fused_of(dit, replace(execution, attention="fp8"), backend)
    return replace(runner, coarse=whole(coarse), stretch=execution.fp8_attention)


def fused_of(dit: DiT, execution: Execution, backend: str = "inductor") -> Fused:
    """The blocks of a transformer as `execution` says, but for CUDA graphs.

    Raises InputError for an attention backend that is not there.
    """
    device = dit.device
    execution.attend(device, None)  # a name that is not there is an error now, not in the first edit
    fused = Fused(dit, partial(execution.operation, device=device), partial(execution.attend, device))
    if execution.compiled:
        compile_blocks(fused, backend)
    return fused


def compile_blocks(fused: Fused, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles the block functions of `fused` in place, each whole and for static shapes."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for name in BLOCKS:
        function = torch.compile(getattr(fused, name), fullgraph=True, dynamic=False, backend=backend)
        setattr(fused, name, function)


def compile_vae(vae: VAE) -> None:
    """Compiles both halves for static shapes, in the layout that convolutions on a GPU are fastest in."""
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for half in (vae.encoder, vae.decoder):
        half.compile(fullgraph=True, dynamic=False)


@dataclass(frozen=True, slots=True)
class Captured:
    """One CUDA graph, the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    out: Tensor


class Replay:
    """A velocity as CUDA graphs: captured once for each set of shapes, replayed after that.

    A step's tensors are copied to where the graph reads them: some MB, most of them modulations.
    """

    def __init__(self, run: Callable[[Tensor, Step, Rope, int | None], Tensor]) -> None:
        self._run = run
        self._captured: OrderedDict[Any, Captured] = OrderedDict()
        self._lock = threading.Lock()  # all replays share the tensors that the graphs read

    def __call__(self, tokens: Tensor, step: Step, rope: Rope, kept: int | None = None) -> Tensor:
        with self._lock:
            return self._replayed(tokens, step, rope, kept)

    def _replayed(self, tokens: Tensor, step: Step, rope: Rope, kept: int | None) -> Tensor:
        given = leaves(tokens, step, rope)
        key = (kept, step.bias is None, step.biased, *((one.shape, one.dtype) for one in given))
        found = self._captured.pop(key, None)
        if found is None:
            found = self._capture(given, step, kept)
        self._captured[key] = found
        if len(self._captured) > GRAPHS:
            self._captured.popitem(last=False)
        torch._foreach_copy_(found.given, given)
        found.graph.replay()
        return found.out.clone()  # the next replay writes there again

    def _capture(self, given: Sequence[Tensor], like: Step, kept: int | None) -> Captured:
        place = [torch.empty_like(one, memory_format=torch.contiguous_format).copy_(one) for one in given]
        tokens, step, rope = assembled(place, like)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets libraries choose and reserve
                self._run(tokens, step, rope, kept)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._run(tokens, step, rope, kept)
        return Captured(graph, place, out)


def leaves(tokens: Tensor, step: Step, rope: Rope) -> list[Tensor]:
    """The tensors of a velocity's arguments, in the order of `assembled`."""
    mods = step.mods
    double = [vectors for pair in mods.double for vectors in pair]
    bias = [] if step.bias is None else [step.bias]
    return [tokens, *rope, step.text, mods.final, *double, *mods.single, *bias]


def assembled(given: Sequence[Tensor], like: Step) -> tuple[Tensor, Step, Rope]:
    """The arguments of which `given` are the leaves; `like` says how many there are of each."""
    tokens, cos, sin, text, final = given[:5]
    doubles = 2 * len(like.mods.double)
    vectors = given[5 : 5 + doubles]
    single = list(given[5 + doubles : 5 + doubles + len(like.mods.single)])
    mods = type(like.mods)(list(zip(vectors[::2], vectors[1::2], strict=True)), single, final)
    return tokens, Step(text, mods, None if like.bias is None else given[-1], like.biased), (cos, sin)


def keep_compiled(folder: Path | None = None) -> None:
    """Lets the compiler keep what it makes, so that the next process starts warm. folder: default in the user's cache.

    Code found there is run, so a folder that anyone else may write to is not used. Where TORCHINDUCTOR_CACHE_DIR says
    where to keep it, that holds.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing the compiler sets the variable to a folder of the temporary ones.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        return
    folder = folder or cache_folder() / "compiled"
    try:
        make_private(folder)
    except OSError as error:  # a full or read-only disk costs the next start its warmth, not this edit
        log.warning("compiled code is not kept: %s: %s", folder, error.strerror)
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
