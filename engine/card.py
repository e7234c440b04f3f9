"""What a machine is, as far as the choice of a profile depends on it: a GPU, and the host memory that is free."""

import os
from dataclasses import dataclass
from pathlib import Path

from step1x.engine.errors import InputError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Card:
    """A CUDA device as `torch.cuda.get_device_properties` describes it."""

    name: str
    total_memory: int  # bytes
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def compute(self) -> float:
        """Its compute capability as profiles write it: 8.9."""
        return float("{}.{}".format(*self.capability))

    @property
    def half_rate(self) -> bool:
        """Whether products of bfloat16 that are summed in float32 run at half the rate of the chip.

        They do on the cards sold for games, by NVIDIA's whitepapers of GA102, AD102 and GB202; 8-bit ones do not.
        """
        return "GeForce" in self.name

    def __str__(self) -> str:
        return f"{self.name} ({self.total_memory / 1e9:.1f} GB, compute capability {self.compute})"


def card_at(device: str) -> Card:
    """The card of a CUDA device; "cuda" is the current one. Raises InputError if there is none such."""
    import torch

    _, _, index = device.partition(":")
    at, count = int(index) if index else torch.cuda.current_device(), torch.cuda.device_count()
    if at >= count:
        raise InputError(f"device {device!r} cannot be used here: there are {count} CUDA devices, from cuda:0 on")
    found = torch.cuda.get_device_properties(at)
    return Card(found.name, found.total_memory, (found.major, found.minor), found.multi_processor_count)


def total_host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, _number(CGROUP / "memory.max") or total)


def free_host_memory() -> int:
    """Bytes that this process can still take without swapping: of the machine, and of its container.

    What only caches files can be taken, so it counts as free.
    """
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    free = 1024 * _field(MEMINFO, "MemAvailable:") or total_host_memory()
    if not limit:
        return free
    return max(0, min(free, limit - used + _field(CGROUP / "memory.stat", "inactive_file")))


def _number(path: Path) -> int:
    """What a file holds; 0 if there is none, or if it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def _field(path: Path, name: str) -> int:
    """The number behind a name in a file with one on each line; 0 if it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
