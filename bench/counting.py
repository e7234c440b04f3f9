"""What a stretch of torch code does, counted exactly: FLOPs and operators that launch work (bytes: engine/counting.py).

Both see each operator on its way to the backend, so they count real tensors, and fake ones of shapes that would never
fit this machine, alike.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import step1x.kernels.attention  # noqa: F401  # registers the op that the counter knows

aten = torch.ops.aten
# Operators that reserve memory and run nothing.
IDLE = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.lift_fresh}


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
        if func.namespace != "prim" and not func.is_view and func.overloadpacket not in IDLE:
            self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))
