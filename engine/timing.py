"""Stage names and the recorder that all figures come from."""

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


class Recorder:
    """Seconds per stage of one edit. On CUDA a stage ends when the device has finished its work."""

    def __init__(self, device: torch.device, on_stage: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._on_stage = on_stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        assert name in STAGES, name
        if self._on_stage is not None:
            self._on_stage(name)
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
