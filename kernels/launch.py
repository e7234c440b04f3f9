"""What the kernels share: how an operation is registered, which GPUs run it, and what is compiled ahead of time."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it exists for Linux only; everything of ours has a reference in plain torch
    triton = tl = None

log = logging.getLogger(__name__)

OLDEST = 80  # compute capability times ten: bf16 products need it
# Chip -> operations whose kernel was measured to lose on it to what would run instead; all others are used wherever
# Triton runs (docs/kernels.md). Empty: none was seen to lose.
EXCEPTIONS: dict[int, frozenset[str]] = {}


@dataclass(frozen=True, slots=True)
class Chip:
    """What a launch must respect. Source: CUDA C++ programming guide, table of compute capabilities."""

    shared_bytes: int  # of one block, at most
    fp8: bool  # has e4m3 conversions and products


# Compute capability times ten -> limits: A100, L40S and RTX 4090, H100 and H200, B200, RTX 5090.
CHIPS = {
    80: Chip(163 * 1024, False),
    89: Chip(99 * 1024, True),
    90: Chip(227 * 1024, True),
    100: Chip(227 * 1024, True),
    120: Chip(99 * 1024, True),
}

Example = tuple[Any, ...]  # positional arguments of an op


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operation: what the model calls, what defines the answer, and what launches the kernel."""

    name: str
    call: Callable[..., Any]  # the registered op: reference on CPU, kernel on a GPU that can run it
    reference: Callable[..., Any]
    kernel: Callable[..., Any]
    examples: Callable[[torch.device, torch.dtype], Iterable[Example]]  # fresh random arguments
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)  # that the kernel takes
    fp8: bool = False  # needs a chip that has e4m3
    tolerance: float = 0.0  # relative error of a row beyond that of the dtype: of what is rounded to e4m3 on the way


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """One specialisation of a Triton kernel that a launch on some chip makes.

    signature: argument -> Triton's name of its type ("*bf16", "*fp32", "i32", "fp32"), in the kernel's order, without
    those in `constants`. aligned: arguments that are multiples of 16 (pointers always are, but for those that the
    kernel does not specialise). All other integers the kernel does not specialise either, so that this is what every
    launch makes of them; aot.py insists on it.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True  # products may be added without having been rounded
    aligned: frozenset[str] = field(default_factory=frozenset)


def adjacent(x: Tensor) -> Tensor:
    """`x` as the kernels read it: elements of its last axis side by side in memory, in wide loads.

    A launch compiles a kernel anew for each set of strides and pointers that are multiples of 16 and that are not.
    Those of a model's widths all are, here by a copy if need be, so that what is compiled ahead of time
    (`Compilation`) is all there is. Rows of other widths have no such strides and stay as they are.
    """
    if x.stride(-1) != 1:
        return x.contiguous()
    aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:-1])
    return x if aligned or x.shape[-1] % 16 else x.clone(memory_format=torch.contiguous_format)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the bare function where there is no Triton: it is never launched there."""
    return function if triton is None else triton.jit(function)


def jit_for_sizes(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """As `jit`, with arguments that a launch compiles nothing apart for, be they 1 or multiples of 16.

    They are sizes, which change from request to request and buy nothing by it.
    """

    def decorated(function: Callable[..., Any]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(names))

    return decorated


_assumed: ContextVar[int | None] = ContextVar("assumed", default=None)


@contextmanager
def assumed(chip: int) -> Iterator[None]:
    """Within it, CUDA devices count as this chip with Triton and checked kernels: what would run there is counted so,
    without one.
    """
    token = _assumed.set(chip)
    try:
        yield
    finally:
        _assumed.reset(token)


def assuming() -> bool:
    """Whether a chip is assumed, of which nothing can be asked."""
    return _assumed.get() is not None


def capability(device: torch.device) -> int:
    """Compute capability times ten; 0 for anything but a CUDA device."""
    if device.type != "cuda":
        return 0
    known = _assumed.get()
    if known is not None:
        return known
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def nearest(chip: int) -> int:
    """The newest chip of CHIPS that is not newer than `chip`: whose launch settings it takes."""
    return max((known for known in CHIPS if known <= chip), default=OLDEST)


def by_default(op: Op, device: torch.device) -> bool:
    """Whether the kernel of an op is used on a device if nothing else is said."""
    if device.type != "cuda" or not runs_kernels(device.index or 0):
        return False
    return op.name not in EXCEPTIONS.get(nearest(capability(device)), ())


def lacking(device: torch.device, op: Op | None = None) -> str:
    """Why a CUDA device cannot run the kernels, or that of one op; empty if it can."""
    chip = capability(device)
    if triton is None and not assuming():
        return "Triton is not installed"
    if chip < OLDEST:
        return f"sm_{chip} is older than sm_{OLDEST}"
    return f"sm_{chip} has no e4m3" if op is not None and op.fp8 and not CHIPS[nearest(chip)].fp8 else ""


def runs_kernels(index: int) -> bool:
    """Whether a CUDA device can run the kernels; says once in the log why not."""
    why = lacking(torch.device("cuda", index))
    if why:
        _say_once(f"GPU {index} uses the reference operations, which are slower: {why}")
    return not why


@cache
def _say_once(message: str) -> None:
    log.warning("%s", message)


def define(
    name: str,
    reference: Callable[..., Any],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    examples: Callable[[torch.device, torch.dtype], Iterable[Example]],
    *,
    mutates: tuple[str, ...] = (),
    fp8: bool = False,
    tolerance: float = 0.0,
) -> Op:
    """Registers `step1x::name`: the reference everywhere, the kernel on CUDA devices that can run it.

    Parameters and results of `reference` are annotated; its results never share memory with arguments.
    """

    def on_cuda(*arguments: Any) -> Any:
        device = next(one for one in arguments if isinstance(one, Tensor)).device
        runs = runs_kernels(device.index or 0) and not lacking(torch.device("cuda", device.index or 0), op)
        return (kernel if runs else reference)(*arguments)

    call = torch.library.custom_op(f"step1x::{name}", reference, mutates_args=mutates)
    call.register_kernel("cuda")(on_cuda)
    call.register_fake(fake)
    op = Op(name=name, call=call, reference=reference, kernel=kernel, examples=examples, fp8=fp8, tolerance=tolerance)
    return op
