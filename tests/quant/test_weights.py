"""Quantised weights against torchao 0.18, whose results are recorded, and against the definition."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from step1x.engine.counting import Memory
from step1x.quant.schemes import SCHEMES
from step1x.quant.weights import PIECE, dequantise, quantise

GOLDEN = Path(__file__).parent.parent / "golden" / "quantisation.safetensors"
QUANTISED = [scheme for scheme in SCHEMES if scheme != "plain"]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """A bfloat16 weight (16, 256) with a large row (3), a tiny one (5) and an outlier (7), and what torchao makes."""
    return load_file(GOLDEN)


def squared(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).square().sum())


@pytest.mark.golden
def test_fp8_is_torchao_s(recorded):
    ours = quantise("fp8", recorded["weight"])
    assert torch.equal(ours["weight"].view(torch.uint8), recorded["fp8.weight"].view(torch.uint8))
    assert torch.equal(ours["weight_scale"], recorded["fp8.weight_scale"])


@pytest.mark.golden
def test_int8_is_torchao_s_but_for_ties(recorded):
    """torchao multiplies by the reciprocal, so that what lies between two values may go either way."""
    ours = quantise("int8", recorded["weight"])
    assert torch.equal(ours["weight_scale"], recorded["int8.weight_scale"])
    apart = (ours["weight"].int() - recorded["int8.weight"].int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-3


@pytest.mark.golden
def test_nvfp4_is_torchao_s_but_for_tiny_rows(recorded):
    """torchao's least block scale is 2**-6, where e4m3 has smaller ones."""
    ours = quantise("nvfp4", recorded["weight"])
    assert torch.equal(ours["weight_global_scale"], recorded["nvfp4.weight_global_scale"])
    rows = torch.arange(16) != 5
    for name in ("weight", "weight_scale"):
        assert torch.equal(ours[name][rows].view(torch.uint8), recorded[f"nvfp4.{name}"][rows].view(torch.uint8)), name
    plain, theirs = dequantise("nvfp4", ours, torch.float32), recorded["nvfp4.dequantised"]
    assert torch.equal(plain[rows], theirs[rows])
    assert squared(plain[5], recorded["weight"][5]) < 0.2 * squared(theirs[5], recorded["weight"][5])


@pytest.mark.golden
def test_int4_loses_less_than_torchao_s(recorded):
    """The same groups; torchao takes scale and zero from the extremes alone."""
    weight = recorded["weight"]
    ours = dequantise("int4-weight", quantise("int4-weight", weight), torch.float32)
    for row in range(16):
        least = squared(recorded["int4-weight.dequantised"][row], weight[row])
        assert squared(ours[row], weight[row]) < 1.1 * least
    rows = torch.arange(16) < 3
    assert squared(ours[rows], weight[rows]) < 0.9 * squared(recorded["int4-weight.dequantised"][rows], weight[rows])


@pytest.mark.parametrize("scheme", QUANTISED)
def test_weights_are_rounded_once(scheme):
    torch.manual_seed(0)
    parts = quantise(scheme, torch.randn(32, 192))
    exact = dequantise(scheme, parts, torch.float64)
    assert torch.equal(dequantise(scheme, parts, torch.bfloat16), exact.bfloat16())
    torch.testing.assert_close(dequantise(scheme, parts, torch.float32).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", QUANTISED)
def test_special_rows(scheme):
    """Zeros stay zeros, and neither huge nor tiny rows overflow."""
    weight = torch.randn(16, 64)
    weight[0], weight[1], weight[2] = 0, 1e30, 1e-30
    got = dequantise(scheme, quantise(scheme, weight), torch.float32)
    assert got.isfinite().all()
    assert got[0].abs().max() < 1e-29
    if scheme != "nvfp4":  # its scales are relative to the largest of the whole weight
        torch.testing.assert_close(got[3:], weight[3:], rtol=0.2, atol=0.3)


@pytest.mark.parametrize("scheme", QUANTISED)
def test_quantising_takes_little_memory(scheme):
    """Beside the weight: its result twice, and float32 copies of a piece."""
    weight = torch.randn(8 * PIECE // 64, 64)
    memory = Memory()
    with memory:
        parts = quantise(scheme, weight)
    assert memory.peak < 2 * sum(part.nbytes for part in parts.values()) + 12 * 4 * PIECE
