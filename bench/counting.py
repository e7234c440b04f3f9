"""What a stretch of torch code does, counted exactly: FLOPs, operators that launch work, and the bytes that those move
which neither multiply matrices nor attend (bytes of memory: engine/counting.py).

Both see each operator on its way to the backend, so they count real tensors, and fake ones of shapes that would never
fit this machine, alike.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import step1x.kernels.attention
import step1x.kernels.attention_fp8  # noqa: F401  # both register an op that is known here

aten = torch.ops.aten
# Operators that reserve memory, look at it in another shape or ask for a type, and run nothing.
RESERVING = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.lift_fresh}
IDLE = RESERVING | {aten._unsafe_view, aten.promote_types}
OUR_ATTENTION = {torch.ops.step1x.attention, torch.ops.step1x.attention_lse, torch.ops.step1x.attention_fp8}
# Operators that are bound by arithmetic: matrix products, convolutions and attention.
MULTIPLYING = OUR_ATTENTION | {
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._scaled_mm, aten._int_mm, aten.convolution),
    *(getattr(aten, name) for name in dir(aten) if name.startswith("_scaled_dot_product_")),
}
FILLING = {aten.copy_, aten.fill_, aten.zero_}  # what they write they do not read


def _sdpa(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def flop_counter() -> FlopCounterMode:
    """Counts FLOPs (2 per multiply-add) of matrix products, convolutions and attention; the CPU's and ours too."""
    ours = (torch.ops.step1x.attention, torch.ops.step1x.attention_fp8)
    attention = (aten._scaled_dot_product_flash_attention_for_cpu, *ours)
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(attention, _sdpa))


class Launches(TorchDispatchMode):
    """Counts operators that do work on the device: all but views, reservations and reads of metadata."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.operators.total()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if launches(func):
            self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


def launches(func: Any) -> bool:
    """Whether an operator does work on the device."""
    return func.namespace != "prim" and not func.is_view and func.overloadpacket not in IDLE


class Traffic(TorchDispatchMode):
    """Counts the bytes that elementwise launches move: every launch that is not MULTIPLYING.

    Each reads every tensor that it is given and writes every tensor that it returns or changes; what it changes it
    reads too, unless it fills it. Rows that an expanded axis repeats are one. What lies in a cache counts as moved.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_operator: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_operator.total()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if launches(func) and func.overloadpacket not in MULTIPLYING:
            self.by_operator[str(func)] += moved(func, args, kwargs or {}, out)
        return out


def moved(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes that a launch reads and writes."""
    given, changed = [], []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        changed += tensors if writes else []
        given += [] if writes and (argument.kwarg_only or func.overloadpacket in FILLING) else tensors
    returned = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    written = {id(one): one for one in (*changed, *returned)}.values()
    return sum(map(_bytes, (*given, *written)))


def _bytes(x: Tensor) -> int:
    """Of the elements that lie apart in memory."""
    counts = [size if stride else min(size, 1) for size, stride in zip(x.shape, x.stride(), strict=True)]
    return prod(counts) * x.element_size()
