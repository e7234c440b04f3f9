"""The counted step is the default one of a GPU, and its figures stay below what was promised."""

from collections import Counter

import pytest
import torch
from torch._subclasses import FakeTensorMode

from step1x.bench import full
from step1x.bench.counters import guided_step
from step1x.bench.gate import Baseline
from step1x.engine.executor import Execution
from step1x.engine.image import Canvas
from step1x.kernels.launch import assuming

BLOCKS = (19, 38)  # double and single
SQUARE = Canvas(1024, 1024)


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[dict[str, float], Counter[str]]]:
    """Figures and operators of a guided step at 1024 x 1024, by what is asked for and the chip."""
    asked = {
        "default": (Execution(), 90),
        "on a 4090": (Execution(), 89),
        "kernels off": (Execution(kernels="off", attention="sdpa"), 90),
    }
    found = {}
    with torch.no_grad(), FakeTensorMode():
        dit = full.hollow_dit()
        full.fill(dit, lambda shape, dtype: torch.empty(shape, dtype=dtype), torch.bfloat16)
        for name, (execution, chip) in asked.items():
            step = guided_step(dit, SQUARE, execution, chip)
            found[name] = {key: one.value for key, one in step.metrics("step").items()}, step.launches
    assert not assuming()
    return found


def test_the_default_step_is_within_its_bounds(counted: dict[str, tuple[dict[str, float], Counter[str]]]) -> None:
    for name in ("default", "on a 4090"):
        figures, _ = counted[name]
        assert figures["step.launches"] <= 700
        assert figures["step.elementwise_bytes"] <= 140e9
    figures, _ = counted["kernels off"]
    assert figures["step.launches"] > 3000
    assert figures["step.elementwise_bytes"] > 600e9


def test_where_the_launches_go(counted: dict[str, tuple[dict[str, float], Counter[str]]]) -> None:
    """The table of docs/kernels.md: per double block 19, per single block 7, but for the last one, and the rest."""
    operators = counted["default"][1]
    double, single = BLOCKS
    assert operators["aten._scaled_dot_product_flash_attention_for_cpu.default"] == double + single
    assert operators["step1x.merge_biased.default"] == double + single
    assert operators["step1x.qk_norm_rope.default"] == double
    assert operators["step1x.qk_norm_rope_single.default"] == single
    assert operators["step1x.gelu_join.default"] == 2 * double + single
    copies = sum(number for name, number in operators.items() if "copy" in name or "clone" in name)
    assert copies == 1, "of the latents, which are float32 after the first step"
    rest = operators.total() - 19 * double - 7 * single
    assert rest == 14


def test_the_gate_counts_what_is_tested_here(counted: dict[str, tuple[dict[str, float], Counter[str]]]) -> None:
    kept = Baseline.read().metrics
    figures, _ = counted["default"]
    for name in ("launches", "elementwise_bytes", "flops"):
        assert kept[f"full.1024x1024.guided_step.{name}"].value == figures[f"step.{name}"]
