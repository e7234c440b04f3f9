"""Memory of a CUDA machine that is not there: what is taken of each card, its cap, and registered host memory."""

import threading
from dataclasses import dataclass
from weakref import finalize

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

PAGE = 4096  # bytes: host memory is registered by whole pages
ALREADY_REGISTERED, NOT_REGISTERED = 712, 713  # cudaErrorHostMemoryAlreadyRegistered, ...NotRegistered


@dataclass(slots=True)
class Bytes:
    """Of one card. share: of `total` that this process may take."""

    total: int
    share: float = 1.0
    allocated: int = 0
    peak: int = 0
    reserved: int = 0
    peak_reserved: int = 0


class FakeMemory:
    """Counts the storages that are on each card, and runs out at the cap, or where a test wants it."""

    def __init__(self, totals: list[int]) -> None:
        self.of = [Bytes(total) for total in totals]
        self.registered: dict[int, int] = {}  # address of host memory -> bytes
        self._ends = WeakIdKeyDictionary()  # storage -> what ends its accounting
        self._left = 0  # allocations until one fails; 0: none does
        self._lock = threading.RLock()

    def fail_at(self, number: int) -> None:
        """The allocation that is the `number`-th from now runs out of memory."""
        self._left = number

    def take(self, tensor: Tensor, index: int) -> None:
        """A storage on a card. Raises OutOfMemoryError."""
        storage = tensor.untyped_storage()
        size, own = storage.nbytes(), self.of[index]
        if not size:
            return
        with self._lock:
            failing = self._left == 1
            self._left = max(self._left - 1, 0)
            if failing or own.allocated + size > own.share * own.total:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes on GPU {index}.")
            own.allocated += size
            own.peak = max(own.peak, own.allocated)
            own.reserved = max(own.reserved, own.allocated)
            own.peak_reserved = max(own.peak_reserved, own.reserved)
        self._ends[storage] = finalize(storage, self._freed, index, size)

    def give(self, tensor: Tensor) -> None:
        """The storage is on no card any more."""
        end = self._ends.pop(tensor.untyped_storage(), None)
        if end is not None:
            end()

    def _freed(self, index: int, size: int) -> None:
        with self._lock:
            self.of[index].allocated -= size

    def empty_cache(self) -> None:
        for one in self.of:
            one.reserved = one.allocated

    def reset_peak(self, index: int) -> None:
        own = self.of[index]
        own.peak, own.peak_reserved = own.allocated, own.reserved

    def register(self, address: int, size: int, flags: int) -> int:
        """cudaHostRegister: 0, or the error that pages of it are registered already."""
        first, last = address // PAGE, (address + size - 1) // PAGE
        for other, its in self.registered.items():
            if first <= (other + its - 1) // PAGE and other // PAGE <= last:
                return ALREADY_REGISTERED
        self.registered[address] = size
        return 0

    def unregister(self, address: int) -> int:
        """cudaHostUnregister."""
        return 0 if self.registered.pop(address, None) else NOT_REGISTERED
