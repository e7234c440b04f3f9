"""Adaptive LayerNorm: the kernel against the model's own arithmetic, float64 and its roundings."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.engine.dit import modulate
from step1x.kernels import adaln as ops
from step1x.kernels.launch import CHIPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16)
E4M3 = torch.float8_e4m3fn
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def steps(a: Tensor, b: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between a and b."""
    bits = [x.view(torch.int16).int() for x in (a, b)]
    ordered = [torch.where(x < 0, -(x & 0x7FFF), x) for x in bits]
    return (ordered[0] - ordered[1]).abs()


def assert_same_form(result: Tensor, wanted: Tensor) -> None:
    assert (result.shape, result.dtype, result.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert result.is_contiguous()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_reference_is_the_models_modulation(dtype: torch.dtype) -> None:
    for x, shift, scale, fp32 in ops.examples(DEVICE, dtype):
        assert torch.equal(ops.adaln_reference(x, shift, scale, fp32), modulate(x, shift, scale, fp32))


def test_float32_is_near_float64() -> None:
    for x, shift, scale, fp32 in ops.examples(DEVICE, torch.float32):
        result = ops.adaln_triton(x, shift, scale, fp32)
        exact = ops.adaln_reference(x.double(), shift.double(), scale.double(), fp32)
        assert_same_form(result, ops.adaln_reference(x, shift, scale, fp32))
        if x.numel():
            assert (result - exact).abs().amax() <= 2e-6 * exact.abs().amax()


def test_bfloat16_rounds_where_the_model_rounds() -> None:
    for x, shift, scale, fp32 in ops.examples(DEVICE, torch.bfloat16):
        result, wanted = ops.adaln_triton(x, shift, scale, fp32), ops.adaln_reference(x, shift, scale, fp32)
        assert_same_form(result, wanted)
        # A sum in another order may move a value across a rounding boundary; a rounding left out moves every tenth.
        assert (result != wanted).sum() <= 0.005 * result.numel()
        if x.numel():
            assert steps(result, wanted).max() <= 1


def test_the_two_dtype_flows_differ() -> None:
    x, shift, scale = (torch.randn(1, rows, 192, device=DEVICE, dtype=torch.bfloat16) for rows in (2, 1, 1))
    different = ops.adaln_triton(x, shift, scale, True) != ops.adaln_triton(x, shift, scale, False)
    assert different.sum() > 0.1 * x.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3_is_the_rounded_result_quantised(dtype: torch.dtype) -> None:
    for example in ops.examples(DEVICE, dtype):
        values, scales = ops.adaln_fp8_triton(*example)
        wanted, wanted_scales = ops.quantise_rows(ops.adaln_triton(*example))
        assert_same_form(values, wanted)
        assert_same_form(scales, wanted_scales)
        assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1.0, 1e37])
def test_quantised_rows(factor: float) -> None:
    x = torch.cat((torch.randn(3, 200) * factor, torch.zeros(1, 200)))
    values, scales = ops.quantise_rows(x)
    assert torch.equal(scales, x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100) / 448)
    assert torch.equal(values.float(), (x / scales).clamp(-448, 448).to(E4M3).float())
    assert values[3].float().eq(0).all()
    if factor > 1e-30:
        assert values[:3].float().abs().amax(-1).eq(448).all()
        # Three bits follow the leading one, down to 2**-6; below that the step is 2**-9.
        tolerance = torch.maximum(x.abs() / 16, scales * 2**-10) * 1.000001
        assert ((values.float() * scales - x).abs() <= tolerance).all()


def test_device_quantisation_divides_exactly() -> None:
    """Quotients halfway between two e4m3 values: x is a row of (1 + scale) * 0 + shift, so any row can be made."""
    peaks = torch.tensor([1.0, 7.0, 1.75, 3.140625, 3e38, 1e-25, 2.0**-120], device=DEVICE)
    codes = torch.arange(0, 2.0, 1 / 128, device=DEVICE)  # of bfloat16 significands, many of them halfway
    shift = (peaks[:, None, None] * (codes / codes.max())).bfloat16()
    x = torch.zeros_like(shift)
    values, scales = ops.adaln_fp8_triton(x, shift, x, True)
    wanted, wanted_scales = ops.quantise_rows(shift)
    assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(0, 9), st.booleans())
def test_any_shape(batch: int, rows: int, width: int, margin: int, fp32: bool) -> None:
    x = torch.randn(batch, rows, width + margin, device=DEVICE)[..., margin:]
    shift, scale = torch.randn(batch, 1, 2 * width, device=DEVICE).chunk(2, dim=-1)
    wanted = ops.adaln_reference(x, shift, scale, fp32)
    torch.testing.assert_close(ops.adaln_triton(x, shift, scale, fp32), wanted, rtol=1e-4, atol=1e-5)


def test_any_strides() -> None:
    x = torch.randn(5, 3, 2, device=DEVICE).mT.transpose(0, 1)  # (2, 5, 3), none of its axes contiguous
    shift, scale = torch.randn(16, 1, 2, device=DEVICE).permute(2, 1, 0)[:, :, ::2][..., :3].expand(2, 1, 3), x[:, :1]
    for fp32 in (True, False):
        wanted = ops.adaln_reference(x, shift, scale, fp32)
        torch.testing.assert_close(ops.adaln_triton(x, shift, scale, fp32), wanted)


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(op: Any, dtype: torch.dtype) -> None:
    for example in list(op.examples(torch.device("cpu"), dtype))[:2]:
        torch.library.opcheck(op.call, example)


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_wrong_inputs_are_named(op: Any, implementation: str) -> None:
    call = getattr(op, implementation)
    x, vector = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    for arguments, message in [
        ((x[0], vector, vector), r"rows must be \(batch, rows, width\), got \(3, 8\)"),
        ((x, vector[:1], vector), r"expected \(2, 1, 8\) in torch.float32, got \(1, 1, 8\)"),
        ((x, vector, vector[..., :7]), r"expected \(2, 1, 8\) in torch.float32, got \(2, 1, 7\)"),
        ((x, vector.bfloat16(), vector), "got .* in torch.bfloat16"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(*arguments, True)


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_float64_has_no_kernel(op: Any) -> None:
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        op.kernel(x, x[:, :1], x[:, :1], True)


def test_examples_have_strided_inputs() -> None:
    x, shift, scale, _ = next(ops.examples(DEVICE, torch.float32))
    assert x.stride() == (750, 150, 1)
    assert shift.stride(0) == scale.stride(0) == 6 * 123


def test_what_is_launched_is_what_is_compiled(recorded: Any) -> None:
    launched = recorded(ops._adaln_kernel)
    for width in ops.WIDTHS:
        for dtype in DTYPES:
            x, mod = torch.empty(2, 1, width, dtype=dtype), torch.empty(2, 1, 6 * width, dtype=dtype)
            for op in ops.OPS:
                for fp32 in (True, False):
                    op.kernel(x, mod[..., :width], mod[..., width : 2 * width], fp32)
    for op in ops.OPS:
        op.kernel(x[:, :0], mod[..., :width], mod[..., :width], True)  # a GPU refuses an empty grid
    described = launched.described(ops.compilations(90))
    assert len(described) == len(launched.seen)
    assert all(one in described for one in launched.seen)


def test_e4m3_is_compiled_where_the_chip_has_it() -> None:
    for chip, limits in CHIPS.items():
        assert any("*fp8e4nv" in one.signature.values() for one in ops.compilations(chip)) == limits.fp8
