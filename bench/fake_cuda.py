"""A CUDA machine that is not there: torch.cuda as the engine uses it, on a CPU, recorded, and as strict as CUDA.

    with FakeCuda(CARDS["RTX 4090"]) as machine:
        engine = Engine.load(profile="fp8-24gb")
        engine.edit(...)
    machine.named("host_register")

The engine's own code runs: placing, streaming, capturing, planning. Arithmetic is the CPU's and kernels of ours run
their references, so results are real. `calls` has what was asked of the driver, in order. Refused, as CUDA refuses it:
a device without an index where one is needed, host memory registered twice, waiting or reserving during a capture, a
kernel launched while another device is current, shapes and types that cuBLAS has no product for, memory beyond the cap,
and streams that nothing puts in order (fake_streams.py). Every thread begins on device 0.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from step1x.bench.cards import Card
from step1x.bench.fake_api import names
from step1x.bench.fake_libraries import EIGHT_BIT, LIBRARIES, again, changed_operands, check_product
from step1x.bench.fake_memory import FakeMemory
from step1x.bench.fake_streams import FakeGraph, FakeStream, Order
from step1x.bench.pretend import Pretend, tensors
from step1x.kernels import checks
from step1x.kernels.launch import Op

CUDA = "13.0"  # what torch says it was built for


class HostGenerator(torch.Generator):
    """Stands in for torch.Generator: the CPU's, whatever device is asked for."""

    def __new__(cls, device: Any = "cpu") -> Self:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class Call(NamedTuple):
    """Something that was asked of the driver. about: bytes, a number of an event or stream, a name."""

    what: str
    device: str
    stream: int
    about: Any


class _Thread(threading.local):
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, FakeStream] = {}
        self.capturing: FakeGraph | None = None
        self.quiet = 0  # within it operators are the stand-in's own


class FakeCuda(Pretend):
    """Within `with` this process has these cards."""

    def __init__(self, *cards: Card, wrong: Collection[str] = ()) -> None:
        """wrong: operations whose kernels fail their check here; the others' pass it, and run their references."""
        super().__init__(torch.device("cuda", 0))
        self.cards = cards
        self.wrong = wrong
        self.calls: list[Call] = []
        self.order = Order()
        self.memory = FakeMemory([card.total_memory for card in cards])
        self._refusal = 0  # of the last call that was refused, until a launch has been told
        self._mode = ""  # of the capture that is under way
        self._capturing_thread = 0
        self._capture_stream: FakeStream | None = None
        self._thread = _Thread()
        self._lock = threading.RLock()
        self.stream_type = type("Stream", (FakeStream,), {"machine": self})
        self.defaults = [self.stream_type(torch.device("cuda", index), number=-index) for index in range(len(cards))]

    # What the test asks.

    def named(self, *names: str) -> list[Call]:
        """The calls of these names, in order."""
        return [call for call in self.calls if call.what in names]

    def record(self, what: str, device: torch.device, *, stream: int | None = None, about: Any = None) -> None:
        with self._lock:
            number = self.current_stream(device).number if stream is None else stream
            self.calls.append(Call(what, str(device), number, about))

    # Devices and streams.

    def placed(self, device: Any) -> torch.device | None:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if found.type != "cuda":
            return None
        index = self._thread.device if found.index is None else found.index
        if index >= len(self.cards):
            raise torch.AcceleratorError(f"CUDA error: invalid device ordinal ({index} of {len(self.cards)})")
        return torch.device("cuda", index)

    def index(self, device: Any = None, *, optional: bool = True) -> int:
        """As torch._utils._get_device_index."""
        if device is None or isinstance(device, int):
            return self._thread.device if device is None else device
        found = torch.device(device)
        if found.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {found}")
        if found.index is None and not optional:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{found}")
        return self._thread.device if found.index is None else found.index

    def current_stream(self, device: Any = None) -> FakeStream:
        index = self.index(device)
        return self._thread.streams.get(index, self.defaults[index])

    def synchronized(self, stream: FakeStream) -> None:
        """The host waits for a stream."""
        self.forbidden_in_capture("synchronize")
        self.record("synchronize", stream.device, stream=stream.number)
        for number, done in self.order.clock(stream.number).items():
            self.order.host[number] = max(self.order.host.get(number, 0), done)

    # Memory.

    def mark(self, tensor: Tensor, device: torch.device | None = None) -> None:
        """Reserves memory for a tensor that is not there yet. Raises OutOfMemoryError."""
        place = device or self._device
        if self.device_of(tensor) == place:
            return
        if self._mode == "global" and self._capturing_thread != threading.get_ident():
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
        try:
            self.memory.take(tensor, place.index)
        except torch.OutOfMemoryError:
            self.record("out_of_memory", place, about=tensor.untyped_storage().nbytes())
            raise
        if self._thread.capturing is None:  # a graph's pool is no stream's
            self.order.reserved(tensor, self.current_stream(place).number)
        super().mark(tensor, place)

    def unmark(self, tensor: Tensor) -> None:
        self.memory.give(tensor)
        super().unmark(tensor)

    def empty_cache(self) -> None:
        self.forbidden_in_capture("empty_cache")
        self.record("empty_cache", torch.device("cuda", self._thread.device))
        self.memory.empty_cache()

    def set_share(self, fraction: float, device: Any = None) -> None:
        index = self.index(device, optional=device is None)
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        self.memory.of[index].share = fraction
        self.record("set_per_process_memory_fraction", torch.device("cuda", index), about=fraction)

    def register(self, address: int, size: int, flags: int) -> int:
        code = self._refusal = self.memory.register(address, size, flags)
        self.record("host_register", torch.device("cuda", self._thread.device), about=(size, code))
        return code

    # Copies.

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Within it operators are the stand-in's own: they take no memory of a device and no place in the order."""
        self._thread.quiet += 1
        try:
            yield
        finally:
            self._thread.quiet -= 1

    def moved(self, tensor: Tensor, to: torch.device | None) -> Tensor:
        """A copy elsewhere; one to the host waits for what comes before it."""
        here = self.device_of(tensor)
        with self._quietly():
            copy = tensor.clone()
        if self.device_of(copy) is not None:
            self.unmark(copy)
        size = copy.untyped_storage().nbytes()
        if here is not None:
            self.order.run("copy", self.current_stream(here).number, [tensor], [])
        if to is None:
            assert here is not None
            self.from_device[self._stage] += size
            self.wait("copy to the host")
            self.record("copy_to_host", here, about=size)
            self.synchronized(self.current_stream(here))
            return copy
        self._pageable(tensor)
        self.mark(copy, to)
        self.to_device[self._stage] += size if here is None else 0
        self._arrives(copy, to, size)
        return copy

    def filled(self, copy: Callable[..., Tensor], place: Tensor, source: Tensor, *rest: Any, **words: Any) -> Tensor:
        to, here = self.device_of(place), self.device_of(source)
        if to is None or here is not None:
            return copy(place, self.moved(source, to), *rest, **words)
        self._pageable(source)
        size = source.numel() * source.element_size()
        self.to_device[self._stage] += size
        with self._quietly():
            out = copy(place, source, *rest, **words)
        self._arrives(place, to, size)
        return out

    def _arrives(self, place: Tensor, device: torch.device, size: int) -> None:
        stream = self.current_stream(device)
        self.record("copy_to_device", device, stream=stream.number, about=size)
        self.order.run("copy", stream.number, [], [place])

    def _pageable(self, source: Tensor) -> None:
        """A capture takes copies from registered memory alone; ours has none."""
        self.forbidden_in_capture("copy from the host")

    def wait(self, reason: str) -> None:
        self.forbidden_in_capture(reason)
        super().wait(reason)

    # Operators.

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._thread.quiet:
            return func(*args, **kwargs)
        operands = tensors((args, kwargs))
        device = next((found for found in map(self.device_of, operands) if found is not None), None)
        if device is not None:
            if self._refusal:
                code, self._refusal = self._refusal, 0
                raise torch.AcceleratorError(f"CUDA error {code} of an earlier call")
            self.check(func, operands)
            self._checked(func, args, kwargs, device)
        with self._quietly():
            out = LIBRARIES.get(func.overloadpacket, func)(*args, **kwargs)
        if device is None:
            if self._thread.capturing is not None:  # a factory, whose result is marked afterwards
                self._thread.capturing.add(func, args, kwargs, out)
            return out
        self._waits(func, operands, device)
        made = tensors(out)
        for leaf in made:
            self.mark(leaf, device)
        if self._thread.capturing is not None:
            self._thread.capturing.add(func, args, kwargs, out)
        elif not func.is_view:
            changed = [one for one in tensors(changed_operands(func, args, kwargs)) if self.holds(one)]
            reads = [one for one in operands if self.holds(one)]
            self.order.run(str(func), self.current_stream(device).number, reads, [*changed, *made])
        return out

    def _waits(self, func: Any, operands: Sequence[Tensor], device: torch.device) -> None:
        """A number that the host asks for comes after the work before it."""
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            self.synchronized(self.current_stream(device))

    def _checked(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> None:
        """Refuses what CUDA refuses; records our kernels, the libraries' attention and their 8-bit products."""
        packet = func.overloadpacket
        if func.namespace == "step1x":
            if device.index != self._thread.device:
                raise RuntimeError(
                    f"{func} launched on {device} while device {self._thread.device} is current: Triton launches there"
                )
            self.record("launch", device, about=packet.__name__)
        elif packet in LIBRARIES:
            self.record("attention", device, about=packet.__name__)
        elif packet in EIGHT_BIT:
            check_product(packet, args, kwargs)
            self.record("product", device, about=packet.__name__)

    def _checked_kernel(self, op: Op, device: torch.device) -> str:
        """Stands in for kernels.checks.check: why a kernel is wrong on a device."""
        self.record("check", device, about=op.name)
        return "planted" if op.name in self.wrong else ""

    # Captures.

    @property
    def is_capturing(self) -> bool:
        return self._thread.capturing is not None

    def forbidden_in_capture(self, what: str) -> None:
        if self._thread.capturing is not None:
            raise torch.AcceleratorError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    @contextmanager
    def capture(
        self,
        graph: FakeGraph,
        pool: object = None,
        stream: FakeStream | None = None,
        capture_error_mode: str = "global",
    ) -> Iterator[None]:
        """Stands in for torch.cuda.graph, with two traps of torch's: after an error the capture's stream stays current,
        and the stream of captures that are given none was made once, on the device that was current then.
        """
        index, before = self._thread.device, self.current_stream()
        if stream is None:
            self._capture_stream = stream = self._capture_stream or self.stream_type()
        beside = self.current_stream(stream.device)
        self.synchronized(before)
        self.empty_cache()
        with self._lock:
            if self._mode:
                raise torch.AcceleratorError("CUDA error: another capture is under way in this process")
            self._mode, self._capturing_thread = capture_error_mode, threading.get_ident()
        graph._pool = pool if pool is not None else object()
        self.record("capture_begin", before.device, about=(graph._pool, capture_error_mode))
        self.set_stream(stream)
        self._thread.capturing = graph
        try:
            yield
        except BaseException as error:
            raise torch.AcceleratorError(
                "CUDA error: operation failed due to a previous error during capture"
            ) from error
        finally:
            self._mode, self._thread.capturing = "", None
            self.record("capture_end", before.device, about=len(graph.steps))
        self._thread.device, self._thread.streams[stream.device.index] = index, beside

    def replayed(self, graph: FakeGraph) -> None:
        """The captured operators again, on what their operands hold now."""
        stream = self.current_stream()
        self.forbidden_in_capture("replay")
        self.record("replay", stream.device, about=graph.pool())
        reads, writes = [], []
        with self._quietly():
            for func, args, kwargs, out in graph.steps:
                operands = tensors((args, kwargs))
                reads += [one for one in operands if self.holds(one)]
                again(func, args, kwargs, out)
                writes += [one for one in tensors(out) if self.holds(one)]
        self.order.run("replay", stream.number, reads, writes)

    # torch.cuda.

    def properties(self, device: Any = None) -> SimpleNamespace:
        card = self.cards[self.index(device)]
        major, minor = card.capability
        return SimpleNamespace(
            name=card.name,
            total_memory=card.total_memory,
            major=major,
            minor=minor,
            multi_processor_count=card.multiprocessors,
        )

    @contextmanager
    def device_context(self, device: Any) -> Iterator[None]:
        """Stands in for torch.cuda.device."""
        before, self._thread.device = self._thread.device, self.index(device)
        try:
            yield
        finally:
            self._thread.device = before

    @contextmanager
    def on_stream(self, stream: FakeStream | None) -> Iterator[None]:
        """Stands in for torch.cuda.stream: its device is current, too."""
        if stream is None:
            yield
            return
        index = stream.device.index
        with self.device_context(index):
            before = self.current_stream(index)
            self._thread.streams[index] = stream
            try:
                yield
            finally:
                self._thread.streams[index] = before

    def set_stream(self, stream: FakeStream) -> None:
        self._thread.device = stream.device.index
        self._thread.streams[stream.device.index] = stream

    def set_device(self, device: Any) -> None:
        self._thread.device = self.index(device)

    def __enter__(self) -> Self:
        def compiled(function: Any = None, **_: Any) -> Any:
            return compiled if function is None else function

        original = threading.Thread.run

        def run(thread: threading.Thread) -> None:
            with self.attached():
                original(thread)

        swaps: list[tuple[Any, dict[str, Any]]] = [
            (torch.cuda, names(self)),
            (torch, {"compile": compiled, "Generator": HostGenerator}),
            (torch.version, {"cuda": CUDA}),
        ]
        swaps += [
            (checks, {"check": self._checked_kernel, "_known": {}, "_read": lambda _: {}, "_write": lambda *_: None})
        ]
        swaps += [(nn.Module, {"compile": lambda *_, **__: None}), (threading.Thread, {"run": run})]
        for owner, values in swaps:
            for name, value in values.items():
                self._modes.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and self.order.faults:
            raise RuntimeError("; ".join(self.order.faults))
