"""What the kernels share: how an operation is registered, which GPUs run it, and what is compiled ahead of time."""

import logging
from collections.abc import Callable, Iterable, Mapping
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
# Chip -> operations whose kernel was measured to beat the compiled reference by 1.2 times or more on it
# (docs/kernels.md). Empty until a GPU has measured them.
PAYS: dict[int, frozenset[str]] = {}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """One specialisation of a Triton kernel that a launch on some chip makes.

    signature: argument -> Triton's name of its type ("*bf16", "*fp32", "i32", "fp32"), in the kernel's order, without
    those in `constants`. aligned: arguments that are multiples of 16 (pointers always are).
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True  # products may be added without having been rounded
    aligned: frozenset[str] = field(default_factory=frozenset)


def rows_of(x: Tensor) -> Tensor:
    """`x` with elements of its last axis side by side in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the bare function where there is no Triton: it is never launched there."""
    return function if triton is None else triton.jit(function)


def capability(device: torch.device) -> int:
    """Compute capability times ten; 0 for anything but a CUDA device."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def nearest(chip: int) -> int:
    """The newest chip of CHIPS that is not newer than `chip`: whose launch settings it takes."""
    return max((known for known in CHIPS if known <= chip), default=OLDEST)


def pays(name: str, device: torch.device) -> bool:
    """Whether the kernel of an op is used by default on a device."""
    return device.type == "cuda" and name in PAYS.get(nearest(capability(device)), ())


@cache
def runs_kernels(index: int) -> bool:
    """Whether a CUDA device can run the kernels; says once in the log why not."""
    found = capability(torch.device("cuda", index))
    if triton is None:
        log.warning("Triton is not installed: GPU %d uses the reference operations, which are slower", index)
    elif found < OLDEST:
        log.warning("GPU %d (sm_%d) is older than sm_%d: it uses the reference operations", index, found, OLDEST)
    return triton is not None and found >= OLDEST


def define(
    name: str,
    reference: Callable[..., Any],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    examples: Callable[[torch.device, torch.dtype], Iterable[Example]],
    *,
    mutates: tuple[str, ...] = (),
) -> Op:
    """Registers `step1x::name`: the reference everywhere, the kernel on CUDA devices that can run it.

    Parameters and results of `reference` are annotated; its results never share memory with arguments.
    """

    def on_cuda(*arguments: Any) -> Any:
        first = next(one for one in arguments if isinstance(one, Tensor))
        return (kernel if runs_kernels(first.device.index or 0) else reference)(*arguments)

    call = torch.library.custom_op(f"step1x::{name}", reference, mutates_args=mutates)
    call.register_kernel("cuda")(on_cuda)
    call.register_fake(fake)
    return Op(name=name, call=call, reference=reference, kernel=kernel, examples=examples)
