"""pytest-benchmark suite of wall times: `pytest bench [--record FILE]`. Figures, not verdicts: paired.py judges.

The cases are those of worker.py, so that what is timed here is what the paired gate compares.
"""

from typing import Any

import pytest

from step1x.bench.record import ROOT
from step1x.bench.worker import Edits, help_page, kernel_names, operations

OPERATIONS = ("attention", "apply_rope", "modulate", "qk_norm")


@pytest.mark.benchmark(group="edit")
def test_edit(benchmark: Any) -> None:
    edits = Edits()
    edits()  # loads the engine
    benchmark.pedantic(edits, rounds=5)


@pytest.mark.benchmark(group="startup")
def test_help(benchmark: Any) -> None:
    benchmark.pedantic(help_page, rounds=5)


@pytest.mark.benchmark(group="operation")
@pytest.mark.parametrize("name", [*OPERATIONS, *(f"kernel_{name}" for name in kernel_names(ROOT))])
def test_operation(benchmark: Any, name: str) -> None:
    import torch

    run = operations()[name]
    with torch.no_grad():
        benchmark(run)
