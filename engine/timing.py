"""Stage names and the recorder that all figures come from: results, the command line and the benchmarks."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

STAGES = (
    "preprocess",
    "encode_text",
    "encode_image",
    "prepare",
    "denoise",
    "decode",
    "postprocess",
    "save",
)
NVTX = "STEP1X_NVTX"  # environment variable: any value but "" and "0" marks the stages for Nsight

OnStep = Callable[[int, int], None]  # (step that ended, from 1; steps)
Mark = float | torch.cuda.Event  # a point in time


class Recorder:
    """Seconds per stage and per denoise step of one edit.

    On the CPU marks are taken from `perf_counter`. On CUDA they are events on the current stream, so that nothing
    waits for the device while the edit runs; the figures are read once, when all of it is done.
    """

    def __init__(self, device: torch.device, on_stage: Callable[[str], None] | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._nvtx = self._cuda and os.environ.get(NVTX, "") not in ("", "0")
        self._on_stage = on_stage
        self._stages: list[tuple[str, Mark, Mark]] = []
        self._steps: list[Mark] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stretch of the stage `name`; a stage may have several."""
        assert name in STAGES, name
        if self._on_stage is not None:
            self._on_stage(name)
        if self._nvtx:
            torch.cuda.nvtx.range_push(name)
        start = self._mark()
        yield
        self._stages.append((name, start, self._mark()))
        if self._nvtx:
            torch.cuda.nvtx.range_pop()

    def step(self) -> None:
        """A denoise step ends; before the first one: it begins."""
        self._steps.append(self._mark())

    def listening(self, on_step: OnStep | None) -> OnStep:
        """A callback for the end of each step: takes a mark, then calls `on_step`."""

        def ended(step: int, steps: int) -> None:
            self.step()
            if on_step is not None:
                on_step(step, steps)

        return ended

    def _mark(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage that ran, in order. Waits for the device."""
        total: dict[str, float] = {}
        for name, start, end in self._stages:
            total[name] = total.get(name, 0.0) + between(start, end)
        return total

    @property
    def steps(self) -> list[float]:
        """Seconds per denoise step. Waits for the device."""
        return [between(start, end) for start, end in zip(self._steps, self._steps[1:], strict=False)]


def between(start: Mark, end: Mark) -> float:
    """Seconds from one mark to another of the same kind."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - start
