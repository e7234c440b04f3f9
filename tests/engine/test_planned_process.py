"""What a process on a CPU takes, as planned and as it is.."""

import statistics
import sys
from pathlib import Path

import pytest

from step1x.bench.counters import photograph
from step1x.engine.counting import CHANNELS, HEAP, HostMemory
from step1x.engine.engine_config import model_sizes
from step1x.engine.image import Canvas
from step1x.engine.planner import LIBRARY_BYTES, plan
from step1x.profiles import load_profile

# In a process of its own the peak is that of the edit alone, and nothing of the tests is in it.
EDIT = """
import resource, sys
from step1x.engine import Engine
engine = Engine.load(profile="cpu", cache=False)
engine.edit(sys.argv[1], "make it darker", seed=1, size=int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
RUNS = 3  # slow: processes of their own, for runs of one size differ by a tenth with where glibc puts what is small


def peak(source: Path, size: int) -> int:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", EDIT, str(source), str(size)], check=True, capture_output=True, text=True
    )
    return 1024 * int(done.stdout)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="resident sets are counted in other ways elsewhere")
@pytest.mark.parametrize("size", [256, 512, 768])
def test_the_plan_of_a_process_is_within_a_tenth_of_its_peak(size: int, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    photograph(size, size).save(source)
    planned = plan(model_sizes(None), load_profile("cpu"), canvas=Canvas(size, size)).peak.bytes
    measured = statistics.median(peak(source, size) for _ in range(RUNS))
    assert planned == pytest.approx(measured, rel=0.1)


def test_libraries_are_in_every_phase_of_a_cpu_alone() -> None:
    for name, there in (("cpu", True), ("int8-24gb", False)):
        phases = plan(model_sizes(None), load_profile(name), canvas=Canvas(64, 64)).phases
        found = [[item.bytes for item in phase.items if item.name == "Python and libraries"] for phase in phases]
        assert found == [[LIBRARY_BYTES] if there else []] * len(phases)


def convolved(inputs: int, outputs: int, side: int) -> int:
    """Peak of a convolution whose input was there before."""
    import torch

    x = torch.empty(1, inputs, side, side, device="meta")
    weight = torch.empty(outputs, inputs, 3, 3, device="meta")
    with HostMemory() as memory:
        torch.nn.functional.conv2d(x, weight, padding=1)
    return memory.peak


@pytest.mark.parametrize(
    ("inputs", "outputs", "values"),
    # Values a cell beside the input, as measured with large mappings on an AVX-512 CPU with torch 2.13.
    [(3, 16, 31.8), (16, 16, 32.0), (32, 16, 47.9), (32, 32, 64.0), (16, 3, 31.9), (12, 12, 27.9)],
)
def test_a_convolution_takes_what_onednn_was_seen_to_take(inputs: int, outputs: int, values: float) -> None:
    side = 1024  # every storage is larger than HEAP, but that of three channels
    assert convolved(inputs, outputs, side) / 4 / side**2 == pytest.approx(values, rel=0.02)
    assert CHANNELS == 16


def test_the_heap_is_the_middle_of_two_bounds() -> None:
    """Two storages of unlike sizes, one after the other: the second one takes the gap of the first, or it does not."""
    import torch

    with HostMemory() as memory:
        first = torch.empty(HEAP // 2, dtype=torch.uint8, device="meta")
        del first
        second = torch.empty(HEAP // 4, dtype=torch.uint8, device="meta")
        assert memory.peak == (HEAP // 2 + (HEAP // 2 + HEAP // 4)) // 2
        del second
        third = torch.empty(HEAP + 1, dtype=torch.uint8, device="meta")  # a mapping of its own, given back
        assert memory.peak == (HEAP // 2 + (HEAP // 2 + HEAP // 4)) // 2 + HEAP + 1
        del third
    assert memory.now == 0
