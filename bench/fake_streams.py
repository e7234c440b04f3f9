"""Streams and events of a CUDA machine that is not there, and what comes before what.

Work is done at once, in the order in which the host asks for it: one of the orders that a GPU may choose. What it could
do in another order, because nothing makes one piece of work wait for the other, is found by vector clocks (Fidge 1988;
Mattern 1989): each stream knows how much of every other stream's work is surely over when its own next piece begins.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar
from weakref import finalize

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Clock = dict[int, int]  # number of a stream -> how many pieces of its work are over


class Race(RuntimeError):
    """Two streams use the same memory, one of them writes it, and nothing makes one wait for the other."""


def joined(one: Clock, other: Clock) -> None:
    """Adds what `other` knows to `one`."""
    for number, done in other.items():
        one[number] = max(one.get(number, 0), done)


@dataclass(slots=True)
class _Uses:
    """Who used a storage last."""

    home: int  # the stream it was reserved on
    written: tuple[int, int] | None = None  # stream and piece of work
    read: Clock = field(default_factory=dict)


class Order:
    """Keeps the clocks, and refuses work that nothing puts in order."""

    def __init__(self) -> None:
        self.host: Clock = {}  # what the host knows to be over: all later work comes after it
        self.faults: list[str] = []  # found where nothing can be raised: when memory is given back
        self._clocks: dict[int, Clock] = {}
        self._uses = WeakIdKeyDictionary()
        self._lock = threading.RLock()

    def clock(self, number: int) -> Clock:
        return self._clocks.setdefault(number, {})

    def reserved(self, tensor: Tensor, number: int) -> None:
        """The storage of a tensor was taken from the pool of a stream."""
        storage = tensor.untyped_storage()
        with self._lock:
            uses = _Uses(number)
            self._uses[storage] = uses
            finalize(storage, self._given_back, uses, storage.nbytes())

    def run(self, what: str, number: int, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """A piece of work on a stream. Raises Race."""
        with self._lock:
            clock = self.clock(number)
            joined(clock, self.host)
            clock[number] = clock.get(number, 0) + 1
            for tensor, changed in (*((one, False) for one in reads), *((one, True) for one in writes)):
                uses = self._uses.get(tensor.untyped_storage())
                if uses is not None:
                    self._use(what, number, clock, uses, changed)

    def _use(self, what: str, number: int, clock: Clock, uses: _Uses, changed: bool) -> None:
        before = dict(uses.read) if changed else {}
        if uses.written is not None:
            before[uses.written[0]] = max(before.get(uses.written[0], 0), uses.written[1])
        for other, piece in before.items():
            if other != number and clock.get(other, 0) < piece:
                verb = "overwrites what" if changed else "reads what"
                raise Race(f"{what} on stream {number} {verb} stream {other} may still be using")
        if changed:
            uses.written = (number, clock[number])
        else:
            uses.read[number] = clock[number]

    def _given_back(self, uses: _Uses, size: int) -> None:
        """Its memory is for the next who asks on its home stream, who must not meet another stream's work there."""
        with self._lock:
            home = self.clock(uses.home) | {}
            joined(home, self.host)
            used = dict(uses.read)
            if uses.written is not None:
                used[uses.written[0]] = max(used.get(uses.written[0], 0), uses.written[1])
            late = [other for other, piece in used.items() if other != uses.home and home.get(other, 0) < piece]
            if late:
                self.faults.append(
                    f"{size} bytes of stream {uses.home} were given back while stream {late[0]} used them"
                )


class FakeStream:
    """Stands in for torch.cuda.Stream; `machine` is the FakeCuda it belongs to (a subclass of this sets it)."""

    machine: ClassVar[Any]
    numbers: ClassVar = count(1)

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None) -> None:
        self.device: torch.device = self.machine.placed("cuda" if device is None else device)
        self.number = next(self.numbers) if number is None else number
        self.cuda_stream = self.number
        if number is None:
            self.machine.record("stream_create", self.device)

    def wait_event(self, event: "FakeEvent") -> None:
        self.machine.record("wait_event", self.device, stream=self.number, about=event.number)
        joined(self.machine.order.clock(self.number), event.clock)

    def wait_stream(self, other: "FakeStream") -> None:
        self.machine.record("wait_stream", self.device, stream=self.number, about=other.number)
        joined(self.machine.order.clock(self.number), self.machine.order.clock(other.number))

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        made: FakeEvent = event or torch.cuda.Event()  # type: ignore[assignment]
        made.record(self)
        return made

    def synchronize(self) -> None:
        self.machine.synchronized(self)

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)


class FakeEvent:
    """Stands in for torch.cuda.Event."""

    machine: ClassVar[Any]
    numbers: ClassVar = count(1)

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.timing = enable_timing
        self.number = next(self.numbers)
        self.clock: Clock = {}
        self.device: torch.device | None = None
        self.when = 0.0

    def record(self, stream: FakeStream | None = None) -> None:
        stream = stream or self.machine.current_stream()
        if self.device is not None and self.device != stream.device:
            raise RuntimeError(f"CUDA error: invalid resource handle (event of {self.device} on {stream.device})")
        self.device, self.when = stream.device, time.perf_counter()
        self.clock = self.machine.order.clock(stream.number) | {}
        self.machine.record("record_event", stream.device, stream=stream.number, about=self.number)

    def wait(self, stream: FakeStream | None = None) -> None:
        (stream or self.machine.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self.machine.forbidden_in_capture("event synchronize")
        joined(self.machine.order.host, self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "FakeEvent") -> float:
        if not (self.timing and end.timing and self.device and end.device):
            raise RuntimeError("both events must have been made with enable_timing and recorded")
        return 1000 * (end.when - self.when)


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph: keeps the operators of a capture with their operands, and runs them again.

    Results go where the capture's went, so a replay overwrites what the one before it gave, as on a GPU.
    """

    machine: ClassVar[Any]

    def __init__(self, keep_graph: bool = False) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []  # operator, arguments, keywords, results
        self._pool: object = None

    def pool(self) -> object:
        return self._pool

    def replay(self) -> None:
        self.machine.replayed(self)

    def add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.steps.append((func, args, kwargs, out))
