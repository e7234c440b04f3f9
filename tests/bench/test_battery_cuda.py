"""Each part of the battery on a card that is not there, at small sizes: what a GPU hour must not be lost to."""

from collections.abc import Callable

import pytest
import torch

from step1x.bench import battery_model
from step1x.bench.battery import PROFILES, run_part
from step1x.bench.cards import CARDS
from step1x.bench.fake_cuda import FakeCuda
from step1x.engine.planner import CONTEXT_BYTES
from step1x.profiles import load_profile


def profiled(edit: Callable[[Callable[[str], None]], object]) -> tuple[float, float]:
    """In place of CUDA's profiler, which cannot be had here."""
    edit(lambda _: torch.cuda.synchronize())
    return 1.0, 2.0


@pytest.mark.parametrize("part", ["kernels", "dit", "e2e", pytest.param("skipping", marks=pytest.mark.long)])
def test_a_part_runs_on_cuda(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(battery_model, "busy_seconds", profiled)
    with FakeCuda(CARDS["H100"]) as machine:
        record = run_part(part, smoke=True, commit="c0ffee")
    assert record.place.device == CARDS["H100"].name
    assert record.metrics
    assert machine.calls
    assert not [note for note in record.notes.values() if "not a GPU" in note]


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_a_profile_runs_under_its_cap(name: str) -> None:
    with FakeCuda(CARDS["H100"]) as machine:
        record = run_part(name, smoke=True, commit="c0ffee")
    [cap] = machine.named("set_per_process_memory_fraction")
    budget = load_profile(name).budget_gb * 1e9 - CONTEXT_BYTES
    assert cap.about * CARDS["H100"].total_memory == pytest.approx(min(budget, CARDS["H100"].total_memory))
    assert record.metrics[f"{name}.64.peak_reserved"].value > 0
    assert record.metrics[f"{name}.64.edit"].value > 0
