"""Bytes that a stretch of torch code needs, counted exactly, whether its tensors are real, fake or on the meta device.

On the meta device nothing is computed, so that shapes of any size are counted in an instant.
"""

from collections.abc import Sequence
from typing import Any
from weakref import finalize

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Memory(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, now and at most.

    What was there before (weights, inputs) is not counted; storages are, not tensors, so views are free.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._seen.setdefault(leaf.untyped_storage(), True)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._seen:
                storage = leaf.untyped_storage()
                self._seen[storage] = True
                self.now += storage.nbytes()
                finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


class FlashAttention(TorchFunctionMode):
    """PyTorch's attention with the memory that its kernels on a GPU take: the result, and no logits.

    For the meta device, where PyTorch would take its slow way and write the logits out. On a GPU none of our calls
    does: those without a mask go to its flash kernels, those with one to the memory-efficient ones. Both write a result
    with its heads side by side, so that they are joined for free.
    """

    def __torch_function__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, _, value = args[:3]
        batch, heads, rows, _ = query.shape
        return query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
