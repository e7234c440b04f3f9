"""What a device can do at most, for ratios to the floor: known GPUs by name, any other by measuring.

Rates are dense (no sparsity), from the vendors' data sheets; measured ones come from the battery's GEMM at our shapes.
"""

import time
from dataclasses import dataclass

import torch

# Part of torch's device name -> dense bf16 TFLOP/s, GB/s of memory (data sheets of NVIDIA, SXM or the largest variant).
KNOWN = {
    "H200": (989.0, 4800.0),
    "H100": (989.0, 3350.0),
    "H800": (989.0, 3350.0),
    "A100": (312.0, 2039.0),
    "L40S": (362.0, 864.0),
    "RTX 4090": (165.2, 1008.0),
    "RTX 3090": (71.2, 936.0),
    "RTX 5090": (209.5, 1792.0),
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
        for part, (teraflops, _) in KNOWN.items():
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


def timed(run: "object", device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    assert callable(run)
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
