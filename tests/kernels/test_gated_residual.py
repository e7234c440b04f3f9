"""Gated residual, alone and with the next adaptive LayerNorm: against the blocks' arithmetic, float64 and roundings."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.kernels import gated_residual as ops
from step1x.kernels.adaln import WIDTHS, adaln_fp8_triton, adaln_triton
from step1x.kernels.launch import CHIPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16)
E4M3 = torch.float8_e4m3fn
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit and in form."""
    bits = [x.view(torch.uint8) if x.dtype == E4M3 else x for x in (a, b)]
    return (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) and torch.equal(*bits)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_reference_is_the_blocks_residual(dtype: torch.dtype) -> None:
    for x, gate, y, fused in ops.examples(DEVICE, dtype):
        wanted = torch.addcmul(x, gate, y) if fused else x + gate * y
        assert torch.equal(ops.gated_residual_reference(x, gate, y, fused), wanted)


def test_bfloat16_is_exact() -> None:
    for x, gate, y, fused in ops.examples(DEVICE, torch.bfloat16):
        result = ops.gated_residual_triton(x, gate, y, fused)
        assert same(result, ops.gated_residual_reference(x, gate, y, fused))
        if fused:  # float64 holds the sum exactly or nearly so
            assert torch.equal(result, (x.double() + gate.double() * y.double()).bfloat16())


def test_the_two_roundings_differ() -> None:
    x, gate, y = (torch.randn(1, rows, 192, device=DEVICE, dtype=torch.bfloat16) for rows in (2, 1, 2))
    different = ops.gated_residual_triton(x, gate, y, True) != ops.gated_residual_triton(x, gate, y, False)
    assert different.sum() > 0.1 * x.numel()


def test_float32_is_near_float64() -> None:
    for x, gate, y, fused in ops.examples(DEVICE, torch.float32):
        result = ops.gated_residual_triton(x, gate, y, fused)
        product = gate.double() * y.double()
        assert ((result - (x.double() + product)).abs() <= 2.0**-23 * (x.abs() + product.abs())).all()


def test_modulation_of_float32_is_near_float64() -> None:
    for x, gate, y, fused, shift, scale, fp32 in ops.adaln_examples(DEVICE, torch.float32):
        _, modulated = ops.gated_residual_adaln_triton(x, gate, y, fused, shift, scale, fp32)
        doubles = (one.double() for one in (x, gate, y, shift, scale))
        x, gate, y, shift, scale = doubles
        _, exact = ops.gated_residual_adaln_reference(x, gate, y, fused, shift, scale, fp32)
        if x.numel():
            assert (modulated - exact).abs().amax() <= 2e-6 * exact.abs().amax()


def test_modulation_of_bfloat16_follows_the_reference() -> None:
    for example in ops.adaln_examples(DEVICE, torch.bfloat16):
        new, modulated = ops.gated_residual_adaln_triton(*example)
        wanted, wanted_modulated = ops.gated_residual_adaln_reference(*example)
        assert same(new, wanted)
        # A sum in another order may move a value across a rounding boundary; normalising the unrounded x moves more.
        assert (modulated != wanted_modulated).sum() <= 0.005 * modulated.numel()
        torch.testing.assert_close(modulated, wanted_modulated, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fusion_changes_no_bit(dtype: torch.dtype) -> None:
    for x, gate, y, fused, shift, scale, fp32 in ops.adaln_examples(DEVICE, dtype):
        new = ops.gated_residual_triton(x, gate, y, fused)
        both = ops.gated_residual_adaln_triton(x, gate, y, fused, shift, scale, fp32)
        three = ops.gated_residual_adaln_fp8_triton(x, gate, y, fused, shift, scale, fp32)
        apart = (new, *adaln_fp8_triton(new, shift, scale, fp32))
        assert all(map(same, both, (new, adaln_triton(new, shift, scale, fp32))))
        assert all(map(same, three, apart))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(0, 9), st.booleans())
def test_any_shape(batch: int, rows: int, width: int, margin: int, fused: bool) -> None:
    x, y = torch.randn(2, batch, rows, width + margin, device=DEVICE)[..., margin:]
    gate, shift, scale = torch.randn(batch, 1, 3 * width, device=DEVICE).chunk(3, dim=-1)
    results = ops.gated_residual_adaln_triton(x, gate, y, fused, shift, scale, True)
    for result, wanted in zip(
        results, ops.gated_residual_adaln_reference(x, gate, y, fused, shift, scale, True), strict=True
    ):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


def test_any_strides() -> None:
    x, y = torch.randn(2, 5, 3, 2, device=DEVICE).permute(0, 3, 1, 2)  # (2, 5, 3) in other orders than the axes'
    y = y.mT.contiguous().mT
    gate = torch.randn(1, 1, 3, device=DEVICE).expand(2, 1, 3)
    for fused in (True, False):
        result, wanted = (call(x, gate, y, fused) for call in (ops.gated_residual_triton, ops.gated_residual_reference))
        assert result.stride() == wanted.stride() == (15, 3, 1)
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_registration(op: Any) -> None:
    for dtype in DTYPES:
        torch.library.opcheck(op.call, next(iter(op.examples(torch.device("cpu"), dtype))))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_wrong_inputs_are_named(op: Any, implementation: str) -> None:
    call = getattr(op, implementation)
    x, vector = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    modulation = () if op is ops.gated_residual_op else (vector, vector, True)
    for arguments, message in [
        ((x[0], vector, x[0]), r"rows must be \(batch, rows, width\), got \(3, 8\)"),
        ((x, vector[:1], x), r"expected \(2, 1, 8\) in torch.float32, got \(1, 1, 8\)"),
        ((x, vector, x[:, :2]), r"expected \(2, 3, 8\) in torch.float32, got \(2, 2, 8\)"),
        ((x, vector, x.bfloat16()), "got .* in torch.bfloat16"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(*arguments, True, *modulation)
    if modulation:
        with pytest.raises(ValueError, match=r"expected \(2, 1, 8\) in torch.float32, got \(2, 1, 7\)"):
            call(x, vector, x, True, vector, vector[..., :7], True)


def test_float64_has_no_kernel() -> None:
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        ops.gated_residual_triton(x, x[:, :1], x, True)


def test_examples_have_strided_inputs() -> None:
    x, gate, *_ = next(ops.examples(DEVICE, torch.float32))
    assert x.stride() == (750, 150, 1)
    assert gate.stride(0) == 300


def test_what_is_launched_is_what_is_compiled(recorded: Any) -> None:
    launched = recorded(ops._gated_residual_kernel)
    for width in WIDTHS:
        for dtype in DTYPES:
            x, mod = torch.empty(2, 1, width, dtype=dtype), torch.empty(2, 1, 6 * width, dtype=dtype)
            shift, scale, gate = mod.chunk(6, dim=-1)[:3]
            for fused in (True, False):
                ops.gated_residual_triton(x, gate, x, fused)
                for fp32 in (True, False):
                    ops.gated_residual_adaln_triton(x, gate, x, fused, shift, scale, fp32)
                    ops.gated_residual_adaln_fp8_triton(x, gate, x, fused, shift, scale, fp32)
    ops.gated_residual_triton(x[:, :0], gate, x[:, :0], True)  # a GPU refuses an empty grid
    described = launched.described(ops.compilations(90))
    assert len(described) == len(launched.seen)
    assert all(one in described for one in launched.seen)


def test_e4m3_is_compiled_where_the_chip_has_it() -> None:
    for chip, limits in CHIPS.items():
        assert any("*fp8e4nv" in one.signature.values() for one in ops.compilations(chip)) == limits.fp8
