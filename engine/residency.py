"""Where weights are while they are not used: on the device, or in host memory until it is their turn.

What lies in host memory is one pinned stretch of bytes for each block, so that it comes in one copy, and it never
changes: what leaves the device is dropped, not copied back. Streamed blocks come through two places on the device: one
block runs in the first while the next arrives in the second, on a stream of its own.
"""

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from weakref import finalize

import torch
from torch import Tensor, nn

from step1x.engine.dit import DiT, is_modulation
from step1x.engine.planner import CONTEXT_BYTES
from step1x.profiles import Residency

if TYPE_CHECKING:
    from step1x.engine.weights import Components

log = logging.getLogger(__name__)

PAGE = 4096  # bytes
ALIGNMENT = 256  # bytes: of each tensor within its block, as CUDA aligns what it reserves
RESIDENT = Residency()
EMBEDDINGS = "embed_tokens."  # of the language model


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies within its block's bytes."""

    tensor: Tensor
    start: int
    dtype: torch.dtype
    shape: torch.Size

    def within(self, block: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return block[self.start : self.start + size].view(self.dtype).view(self.shape)


class Packed:
    """The tensors of a module side by side in host memory; the module reads them there until `point` says else."""

    def __init__(self, module: nn.Module, without: Callable[[str], bool] = lambda name: False) -> None:
        """without: names of tensors that are left where they are."""
        self.places: list[Place] = []
        end = 0
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not without(name):
                self.places.append(Place(tensor, end, tensor.dtype, tensor.shape))
                end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.host = pinned(end)
        for place in self.places:
            place.within(self.host).copy_(place.tensor)
        self.point(self.host)

    def point(self, block: Tensor) -> None:
        """Lets the module read its tensors from `block`, which holds the same bytes as `host`."""
        for place in self.places:
            place.tensor.data = place.within(block)


def current(device: torch.device) -> AbstractContextManager[None]:
    """Within it streams, events and Triton's launches are a CUDA device's, whichever it is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def given_back(device: torch.device) -> None:
    """What nothing holds any more of a device's memory is there for others."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def limit(budget_gb: float, device: torch.device) -> None:
    """Lets PyTorch take no more of a GPU's memory than a budget in GB (1e9 bytes) leaves it; 0: all of it.

    device: with its index. The CUDA context is part of the budget and of the plan, but not PyTorch's to count.
    """
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(1.0, (budget_gb * 1e9 - CONTEXT_BYTES) / total) if budget_gb else 1.0
    torch.cuda.set_per_process_memory_fraction(max(share, 0.0), device)


def pinned(size: int) -> Tensor:
    """Bytes of host memory that a GPU, if there is one, can copy from on its own.

    Registered as they are: PyTorch's own pinned memory comes in powers of two. CUDA registers whole pages, each once,
    so that no two stretches may share one. Where it refuses, the memory serves unregistered: copies wait for the host.
    """
    if not (torch.cuda.is_available() and size):
        return torch.empty(size, dtype=torch.uint8)
    whole = -(-size // PAGE) * PAGE
    host = torch.empty(whole + PAGE, dtype=torch.uint8)
    host = host[-host.data_ptr() % PAGE :][:whole]
    cuda = torch.cuda.cudart()
    try:
        torch.cuda.check_error(cuda.cudaHostRegister(host.data_ptr(), whole, 0))
    except RuntimeError as error:
        log.warning("host memory is not pinned, copies to the GPU are slower: %s", error)
        with suppress(RuntimeError):  # CUDA remembers the refusal and tells the next launch of it: this one
            torch.empty(1, device="cuda").zero_()
    else:
        finalize(host.untyped_storage(), cuda.cudaHostUnregister, host.data_ptr())
    return host[:size]


class Visiting:
    """A module that is brought to the device as a whole, and dropped when the last of its users has left.

    without: names of tensors that are left where they are.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, without: Callable[[str], bool] = lambda name: False
    ) -> None:
        self._packed = Packed(module, without)
        self._device = device
        self._users = 0
        self._lock = threading.Lock()

    @contextmanager
    def using(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._packed.point(self._packed.host.to(self._device, non_blocking=True, copy=True))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._packed.point(self._packed.host)


class Stream:
    """Blocks that run one after the other, of which two are on the device at a time.

    One pass at a time: a second thread waits for the first one's to end. around: after the last block the first is
    fetched again, for the next pass.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        around: bool,
        without: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._packed = [Packed(block, without) for block in blocks]
        self._index = {block: index for index, block in enumerate(blocks)}
        self._device, self._around = device, around
        self._lock = threading.Lock()
        self._halves: list[Tensor] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[torch.cuda.Event | None] = [None, None]  # when what ran in each half has ended
        self._coming: tuple[int, int, torch.cuda.Event | None] | None = None  # block, half, when it is there

    @property
    def largest(self) -> int:
        """Bytes of the largest block."""
        return max(packed.host.numel() for packed in self._packed)

    @contextmanager
    def running(self) -> Iterator[None]:
        """One pass, or several of one thread: the two places are there for as long."""
        with self._lock:
            self._halves = [torch.empty(self.largest, dtype=torch.uint8, device=self._device) for _ in range(2)]
            try:
                yield
            finally:
                if self._copies is not None:  # a block may still be on its way to a place that is given back here
                    torch.cuda.current_stream(self._device).wait_stream(self._copies)
                self._halves, self._coming, self._free = [], None, [None, None]

    @contextmanager
    def present(self, block: nn.Module) -> Iterator[None]:
        """Within it a block can run; one that is not streamed always can. To be called within `running`."""
        index = self._index.get(block)
        if index is None:
            yield
            return
        if self._coming is None or self._coming[0] != index:
            self._fetch(index, 0 if self._coming is None else 1 - self._coming[1])
        assert self._coming is not None
        _, half, there = self._coming
        if there is not None:
            torch.cuda.current_stream(self._device).wait_event(there)
        self._packed[index].point(self._halves[half])
        following = (index + 1) % len(self._packed)
        if following or self._around:
            self._fetch(following, 1 - half)
        try:
            yield
        finally:
            self._packed[index].point(self._packed[index].host)
            if self._copies is not None:
                self._free[half] = torch.cuda.current_stream(self._device).record_event()

    def _fetch(self, index: int, half: int) -> None:
        host = self._packed[index].host
        place = self._halves[half][: host.numel()]
        if self._copies is None:
            self._coming = (index, half, None)
            place.copy_(host)
            return
        free = self._free[half] or torch.cuda.current_stream(self._device).record_event()
        self._copies.wait_event(free)
        with torch.cuda.stream(self._copies):
            place.copy_(host, non_blocking=True)
        self._coming = (index, half, self._copies.record_event())


def spaced(count: int, of: int) -> list[int]:
    """`count` indices below `of`, evenly spaced, so that a streamed block has resident ones to arrive under."""
    return [(2 * turn + 1) * of // (2 * count) for turn in range(count)]


def dit_blocks(dit: DiT) -> list[nn.Module]:
    """All blocks in the order in which they run."""
    return [*dit.double_blocks, *dit.single_blocks]


class Home:
    """Keeps a model's weights as a profile's residency says."""

    def __init__(self, components: "Components", residency: Residency, device: torch.device) -> None:
        self._device = device
        self._parts: dict[str, nn.Module] = {
            "text": components.conditioner.model.language_model,
            "vision": components.conditioner.model.visual,
            "vae": components.vae,
        }
        self._dit = components.dit
        self._away: dict[str, Callable[[], AbstractContextManager[None]]] = {}
        self._stream: Stream | None = None
        components.conditioner.using, components.conditioner.device = self.using, device
        for part in self._parts:
            self.keep(part, getattr(residency, part))
        if residency.folded == "host":  # their memory is pinned for as long as they are kept
            self._folded = [
                Packed(module)
                for name, module in components.dit.named_modules()
                if isinstance(module, nn.Linear) and is_modulation(f"{name}.weight")
            ]
        if residency.dit == "stream":
            self.stream_dit(residency.stream_blocks)

    def using(self, part: str) -> AbstractContextManager[None]:
        """Within it the weights of a part are on the device."""
        return self._away[part]() if part in self._away else nullcontext()

    def denoising(self) -> AbstractContextManager[None]:
        """Within it the transformer can run."""
        return nullcontext() if self._stream is None else self._stream.running()

    @property
    def streams_dit(self) -> bool:
        return self._stream is not None

    def is_resident(self, part: str) -> bool:
        return part not in self._away

    def keep(self, part: str, how: str) -> None:
        """how: "resident", "evict" or "stream" (profiles.Residency); only a resident part can be moved elsewhere."""
        if how == "evict":
            self._away[part] = Visiting(self._parts[part], self._device).using
        elif how == "stream":
            module = self._parts[part]
            name, blocks = _blocks(module)
            stream = Stream(blocks, self._device, around=False)
            for block in blocks:
                _while_running(block, stream)
            # The few tensors around the blocks come as a whole; of the embeddings an edit needs some hundred rows.
            rest = Visiting(module, self._device, without=lambda key: key.startswith((f"{name}.", EMBEDDINGS)))
            self._away[part] = partial(_both, rest, stream)

    def stream_dit(self, count: int) -> None:
        """Streams `count` of the transformer's blocks, evenly spaced."""
        blocks = dit_blocks(self._dit)
        chosen = [blocks[index] for index in spaced(min(count, len(blocks)), len(blocks))]
        self._stream = Stream(chosen, self._device, around=True, without=_of_modulation)
        self._dit.present = self._stream.present


def _of_modulation(name: str) -> bool:
    """`is_modulation` by a name within a block; modulations are not used where the block runs."""
    return is_modulation(f"block.{name}")


@contextmanager
def _both(rest: Visiting, stream: Stream) -> Iterator[None]:
    with rest.using(), stream.running():
        yield


def _blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The blocks of a vision tower or a language model, and the name of their list (transformers' Qwen2.5-VL)."""
    name = "layers" if hasattr(model, "layers") else "blocks"
    return name, list(getattr(model, name))


def _while_running(block: nn.Module, stream: Stream) -> None:
    """Makes a block present whenever it is called."""
    entered = ExitStack()

    def enter(*_: object) -> None:
        entered.enter_context(stream.present(block))

    def leave(*_: object) -> None:
        entered.close()

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave, always_call=True)


def dit_at_host(residency: Residency, depth: int, depth_single: int) -> Callable[[str], bool]:
    """Which tensors of the transformer are loaded to host memory, by key."""
    names = [f"double_blocks.{i}." for i in range(depth)] + [f"single_blocks.{i}." for i in range(depth_single)]
    streamed = tuple(names[i] for i in spaced(min(residency.stream_blocks, len(names)), len(names)))
    folded = residency.folded == "host"

    def picked(key: str) -> bool:
        if is_modulation(key):
            return folded
        return bool(streamed) and key.startswith(streamed)

    return picked


def text_at_host(residency: Residency) -> Callable[[str], bool]:
    """The same of the text model."""
    prefixes = {"text": "language_model.", "vision": "visual."}
    away = tuple(prefix for part, prefix in prefixes.items() if getattr(residency, part) != "resident")
    return lambda key: bool(away) and key.startswith(away)
