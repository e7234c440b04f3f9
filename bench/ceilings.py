"""What a device can do at most, for ratios to the floor: known GPUs by name, any other by measuring.

Rates are dense (no sparsity), from the vendors' data sheets; a measured one is that of a large square product.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Part of torch's device name -> dense bf16 TFLOP/s (data sheets of NVIDIA, SXM or the largest variant).
KNOWN = {
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
    "RTX 5090": 209.5,
}
SIDE = {"cpu": 512, "cuda": 8192}  # of the square product that an unknown device is measured by


@dataclass(frozen=True, slots=True)
class Ceiling:
    """FLOP/s of matrix products, and where the figure comes from."""

    flops: float
    source: str  # "data sheet", "measured"


def ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """The most that `device` can do in `dtype`: by the data sheet for bf16 on a known GPU, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, teraflops in KNOWN.items():
            if part in name:
                return Ceiling(teraflops * 1e12, "data sheet")
    return Ceiling(gemm_rate(device, dtype), "measured")


def gemm_rate(device: torch.device, dtype: torch.dtype, side: int | None = None, seconds: float = 0.3) -> float:
    """FLOP/s of a square product: the fastest of as many runs as fit into `seconds`."""
    side = side or SIDE.get(device.type, SIDE["cuda"])
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed(lambda: a @ b, device))
    return 2 * side**3 / best


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included, by the device's own clock where it has one."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Waits for a device without events."""
    if device.type == "mps":
        torch.mps.synchronize()
