"""Bytes that a stretch of torch code needs, counted exactly, whether its tensors are real, fake or on the meta device.

On the meta device nothing is computed, so that shapes of any size are counted in an instant.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

HEAP = 32 << 20  # bytes: glibc maps what is larger by itself, and gives it back when it is freed
CHANNELS = 16  # that oneDNN keeps side by side with AVX-512; 8 without


class Memory(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, now and at most.

    What was there before (weights, inputs) is not counted; storages are, not tensors, so views are free.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, size: int) -> None:
        self.now -= size

    def _ran(self, func: Any, args: Any, out: Any) -> None:
        """Told of each operator after its results are counted."""

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
                self._add(storage.nbytes())
                finalize(storage, self._freed, storage.nbytes())
        self._ran(func, args, out)
        return out


class HostMemory(Memory):
    """What the operators of a process without a GPU take of its memory: storages, and two things beside them.

    oneDNN convolves in layouts of its own, so that beside what a convolution reads and writes there are its input or
    its output once more. And glibc keeps what was freed for the next one unless it was large enough for a mapping of
    its own. A freed gap takes a new storage in part: the heap is the middle between what it would be if each gap took
    any that fits, and if it took those of its own size only. Runs of an edit differ by as much.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mapped = 0
        self._together = 0  # heap of all sizes together, at most
        self._apart = 0  # heap with a place of its own for each storage of a size that lived at once
        self._lives: Counter[int] = Counter()  # size -> how many of it live
        self._most: Counter[int] = Counter()  # and at most

    def _add(self, size: int) -> None:
        self.now += size
        if size > HEAP:
            self._mapped += size
        else:
            self._lives[size] += 1
            if self._lives[size] > self._most[size]:
                self._most[size] += 1
                self._apart += size
        self._together = max(self._together, self.now - self._mapped)
        self.peak = max(self.peak, self._mapped + (self._together + self._apart) // 2)

    def _freed(self, size: int) -> None:
        super()._freed(size)
        if size > HEAP:
            self._mapped -= size
        else:
            self._lives[size] -= 1

    def _ran(self, func: Any, args: Any, out: Any) -> None:
        if func is not torch.ops.aten.convolution.default:
            return
        blocked = out.nbytes // out.shape[1] * (-(-out.shape[1] // CHANNELS) * CHANNELS)
        # Its result is made while input and output lie there blocked, and after that is copied to a plain one.
        more = max(args[0].nbytes + blocked - out.nbytes, blocked)
        self._add(more)
        self._freed(more)


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
