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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from step1x.engine.backends import exported_runner
from step1x.engine.caches import cache_folder, make_private
from step1x.engine.denoise import Halves, RowsVelocity, Runner, Velocity
from step1x.engine.dit import DiT, Rope, Step, here
from step1x.engine.errors import InputError
from step1x.engine.fused import Fused
from step1x.engine.kept import Active
from step1x.engine.vae import VAE
from step1x.engine.weights import Components
from step1x.kernels.attention import attention_op
from step1x.kernels.attention_backends import Attention, checked_by, choose
from step1x.kernels.cfg_step import cfg_step_op
from step1x.kernels.checks import right
from step1x.kernels.launch import Op, by_default
from step1x.kernels.merge_biased import merge_biased_op
from step1x.profiles import BackendName, Profile
from step1x.quant.choice import Products
from step1x.quant.linear import use_products

log = logging.getLogger(__name__)

TEXT_BUCKET = 64  # rows
BLOCKS = ("enter", "double_block", "single_block", "last_block", "final_block")
RECOMPILE_LIMIT = 256  # of shapes for each kind of block; torch's 8 would be reached by a few picture sizes
GRAPHS = 8  # captured steps that are kept: one for each size, aspect and length of text met last


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How a loaded model runs."""

    kernels: str = "auto"  # our own on a GPU: "auto" for all but the exceptions of its chip, "on" for all, or "off"
    attention: str = "auto"  # or a backend by name (kernels/attention_backends.py)
    backend: BackendName = "torch"
    compiled: bool = False  # compile the blocks: the first edit of a size is slow, the others fast
    strip_pixels: int = 1 << 21  # larger pictures go through the autoencoder in strips: the same in half the memory
    products: Products = "auto"  # who multiplies quantised rows (quant/choice.py)
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
        wanted = self.kernels == "on" or (self.kernels == "auto" and by_default(op, device))
        if wanted and device.type == "cuda":  # its first use there is a check (kernels/checks.py)
            wanted = right(op, device, cache_folder() / "kernels")
        return op.call if wanted else op.reference

    def attend(self, device: torch.device, biased: tuple[int, int] | None) -> Attention:
        """The attention where only the keys from `biased` on, up to its end, may carry a bias; None: any may.

        Raises InputError for a backend that is not there.
        """
        if self.attention == "auto" and device.type != "cuda":
            attend: Attention = self.operation(attention_op, device)
            return attend
        keys = None if biased is None else slice(*biased)
        try:
            found = choose(self.attention, device, keys, self.operation(merge_biased_op, device))
        except ValueError as error:
            raise InputError(str(error)) from error
        op = checked_by(self.attention, device, keys) if device.type == "cuda" else None
        usable = op is None or right(op, device, cache_folder() / "kernels")
        told = biased is not None or self.attention in ("triton", "fp8")
        return found if usable and told else choose("sdpa", device)

    def choose_products(self, module: nn.Module, device: torch.device) -> None:
        """Sets who multiplies in the quantised layers of a module. Raises InputError if torchao cannot be had."""
        try:
            use_products(module, self.products, device)
        except ValueError as error:
            raise InputError(str(error)) from error


DEFAULT = Execution()


def prepared(components: Components, execution: Execution) -> Runner:
    """What runs the steps of a model; its autoencoder is set to run as `execution` says, too.

    Raises InputError for an attention backend that is not there.
    """
    components.vae.strip_pixels = execution.strip_pixels
    execution.choose_products(components.conditioner.model, components.dit.device)
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


def captures(dit: DiT, execution: Execution) -> bool:
    """Whether steps run as CUDA graphs.

    A graph reads weights where they were when it was captured, so blocks that come and go are run without.
    """
    return execution.compiled and dit.device.type == "cuda" and dit.present is here


def stepper(dit: DiT, execution: Execution, backend: str = "inductor", *, graphs: bool = True) -> Runner:
    """What runs the steps of a transformer. backend: of torch.compile. graphs: as CUDA graphs, where it `captures`.

    Raises InputError for an attention backend that is not there.
    """
    execution.choose_products(dit, dit.device)
    fused = fused_of(dit, execution, backend)
    shared = Graphs() if graphs and captures(dit, execution) else None

    def whole(run: Velocity) -> Velocity:
        return run if shared is None else Replay(run, shared)

    def rows(run: RowsVelocity) -> RowsVelocity:
        return run if shared is None else ReplayRows(run, shared)

    runner = Runner(
        whole(fused.velocity),
        execution.operation(cfg_step_op, dit.device),
        TEXT_BUCKET if execution.compiled else 1,
        rows=rows(fused.velocity),
        halves=Halves(whole(fused.blocks), rows(fused.blocks), fused.final_block),
    )
    if execution.fp8_attention is None:
        return runner
    coarse = fused_of(dit, replace(execution, attention="fp8"), backend)
    return replace(runner, coarse=whole(coarse.velocity), stretch=execution.fp8_attention)


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

    def replay(self, given: Sequence[Tensor]) -> Tensor:
        torch._foreach_copy_(self.given, list(given))
        self.graph.replay()
        return self.out.clone()  # the next replay writes there again


class Graphs:
    """What the captured steps of a model share: one pool of memory, and the turn to use it.

    Together they take what the largest step takes: only one runs at a time, and what it gave is copied before the next.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def capture(self, run: Callable[..., Tensor], given: Sequence[Tensor], like: Step, *rest: Any) -> Captured:
        """A graph of `run`, which ran before: it is compiled, and libraries have chosen and reserved.

        given: the leaves of its arguments, `like` their step; rest: what follows them, read where it is. Raises
        OutOfMemoryError, also for what a capture makes of it.
        """
        device = given[0].device
        current = torch.cuda.current_stream(device)
        place = [torch.empty_like(one, memory_format=torch.contiguous_format).copy_(one) for one in given]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream(device)  # torch's own is of the first device that captured
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads encode and decode meanwhile: what they reserve must not end the capture.
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                out = run(*assembled(place, like), *rest)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
            if ran_out(error):
                raise torch.OutOfMemoryError(f"out of memory while a step was captured: {error}") from error
            raise
        return Captured(graph, place, out)


def shapes_of(given: Sequence[Tensor], step: Step, kept: int | None) -> Any:
    """What a graph is good for: the shapes of its tensors, and which keys carry a bias."""
    return (kept, step.bias is None, step.biased, *((one.shape, one.dtype) for one in given))


class Replay:
    """A velocity as CUDA graphs: captured once for each set of shapes, replayed after that.

    A step's tensors are copied to where the graph reads them: some MB, most of them modulations.
    """

    def __init__(self, run: Velocity, graphs: Graphs | None = None) -> None:
        self._run = run
        self._graphs = graphs or Graphs()
        self._captured: OrderedDict[Any, Captured] = OrderedDict()

    def __call__(self, tokens: Tensor, step: Step, rope: Rope, kept: int | None = None) -> Tensor:
        given = leaves(tokens, step, rope)
        key = shapes_of(given, step, kept)
        with self._graphs.lock:
            found = self._captured.pop(key, None)
            if found is None:
                if len(self._captured) >= GRAPHS:
                    self._captured.popitem(last=False)
                self._warm(given, step, kept)
                found = self._graphs.capture(self._run, given, step, kept)
            self._captured[key] = found
            return found.replay(given)

    def _warm(self, given: Sequence[Tensor], like: Step, kept: int | None) -> None:
        """Runs twice, on a stream of its own, as PyTorch asks for before a capture."""
        device = given[0].device
        current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(*assembled(given, like), kept)
        current.wait_stream(stream)


class ReplayRows:
    """Steps that keep keys and values, or compute some rows alone, as CUDA graphs of one request.

    A graph reads and writes keys and values where they are, and they are the request's: it dies with them. So the first
    step of a kind runs as it is, which warms up; the second is captured, and those after it replayed.
    """

    def __init__(self, run: RowsVelocity, graphs: Graphs) -> None:
        self._run = run
        self._graphs = graphs
        self._met: WeakKeyDictionary[Active, dict[Any, Captured | None]] = WeakKeyDictionary()

    def __call__(self, tokens: Tensor, step: Step, rope: Rope, kept: int | None, active: Active) -> Tensor:
        given = leaves(tokens, step, rope)
        key = shapes_of(given, step, kept)
        with self._graphs.lock:
            met = self._met.setdefault(active, {})
            if key not in met:
                met[key] = None
                return self._run(tokens, step, rope, kept, active)
            found = met[key]
            if found is None:
                found = met[key] = self._graphs.capture(self._run, given, step, kept, active)
            return found.replay(given)


def ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out, however deep below an error: a capture ends in one of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


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
