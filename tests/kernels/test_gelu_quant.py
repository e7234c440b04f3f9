"""tanh-GELU beside the attended rows: against PyTorch's, and against float64 at every bfloat16 number."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.kernels import gelu_quant as ops
from step1x.kernels.adaln import quantise_rows
from step1x.kernels.launch import CHIPS

# The interpreter computes with numpy, which warns where a GPU quietly returns infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16)
E4M3 = torch.float8_e4m3fn
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def exact_gelu(x: Tensor) -> Tensor:
    x = x.double()
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def steps(a: Tensor, b: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between a and b."""
    bits = [x.view(torch.int16).int() for x in (a, b)]
    ordered = [torch.where(x < 0, -(x & 0x7FFF), x) for x in bits]
    return (ordered[0] - ordered[1]).abs()


def every_bfloat16() -> Tensor:
    """All finite bfloat16 numbers, (1, 16, 4080)."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return x[x.isfinite()].view(1, 16, -1).to(DEVICE)


def test_every_bfloat16_number() -> None:
    x = every_bfloat16()
    result, exact = ops.gelu_join_triton(None, x), exact_gelu(x)
    assert result.isfinite().all()
    distance = steps(result, exact.bfloat16())
    # exp is infinite in float32 below x = -10.07: zero there instead of at most 4e-38.
    reached = (result - exact).abs() > 4e-38
    assert distance[reached].max() <= 1
    assert (distance[reached] > 0).sum() <= 5

    # PyTorch rounds 1 + tanh to multiples of 2**-24, which shows where it is small.
    torch_gelu = F.gelu(x, approximate="tanh")
    above = x > -1
    assert steps(result, torch_gelu)[above].max() <= 1
    assert (result != torch_gelu)[above].sum() <= 5
    assert (result.double() - torch_gelu.double()).abs()[~above].max() <= 2.0**-8 * 0.17
    assert (result.double() - torch_gelu.double()).abs()[x < -4].max() <= 6 * 2.0**-24


def test_float32_is_near_float64() -> None:
    powers = 10.0 ** torch.linspace(-40, 38, 48)
    x = torch.cat((torch.linspace(-9, 9, 1999), powers, -powers)).to(DEVICE).view(1, 1, -1)
    result, exact = ops.gelu_join_triton(None, x), exact_gelu(x)
    assert ((result - exact).abs() <= 1e-5 * exact.abs() + 4e-38).all()  # the argument of exp is rounded: up to 60
    assert ((result - exact).abs() <= 4e-7 * exact.abs())[x > -1].all()
    # Nearer than PyTorch's own where 1 + tanh cancels.
    low = (x < -3) & (x > -8)
    errors = [((y - exact).abs() / exact.abs())[low].max() for y in (result, F.gelu(x, approximate="tanh"))]
    assert errors[0] < 0.01 * errors[1]


def test_infinities_and_nan() -> None:
    x = torch.tensor([[[float("inf"), -float("inf"), float("nan"), 0.0, -0.0]]], device=DEVICE)
    result = ops.gelu_join_triton(None, x)
    torch.testing.assert_close(result, F.gelu(x, approximate="tanh"), equal_nan=True)
    assert result.signbit().tolist()[0][0][3:] == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_rows(dtype: torch.dtype) -> None:
    for attended, hidden in ops.examples(DEVICE, dtype):
        result, wanted = ops.gelu_join_triton(attended, hidden), ops.gelu_join_reference(attended, hidden)
        assert (result.shape, result.dtype, result.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        assert result.is_contiguous()
        width = 0 if attended is None else attended.shape[2]
        if attended is not None:
            assert torch.equal(result[..., :width], attended)
        relative = 2.0**-7 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(result[..., width:], wanted[..., width:], rtol=relative, atol=6 * 2.0**-23)


@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3_is_the_joined_row_quantised(dtype: torch.dtype) -> None:
    for attended, hidden in ops.examples(DEVICE, dtype):
        values, scales = ops.gelu_quant_triton(attended, hidden)
        wanted, wanted_scales = quantise_rows(ops.gelu_join_triton(attended, hidden))
        assert (values.shape, values.dtype, values.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
        assert scales.stride() == wanted_scales.stride()
        assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("factors", [(100.0, 1.0), (1.0, 100.0)], ids=["attended", "hidden"])
def test_one_scale_for_both_parts(factors: tuple[float, float]) -> None:
    attended = factors[0] * torch.randn(1, 2, 37, device=DEVICE)
    hidden = factors[1] * torch.randn(1, 2, 75, device=DEVICE)
    _, scales = ops.gelu_quant_triton(attended, hidden)
    torch.testing.assert_close(scales, ops.gelu_quant_reference(attended, hidden)[1])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(0, 40), st.integers(1, 70), st.integers(0, 9))
def test_any_shape(batch: int, rows: int, width: int, hidden_width: int, margin: int) -> None:
    attended = torch.randn(batch, rows, width, device=DEVICE)
    hidden = torch.randn(batch, rows, margin + hidden_width, device=DEVICE)[..., margin:]
    torch.testing.assert_close(ops.gelu_join_triton(attended, hidden), ops.gelu_join_reference(attended, hidden))


def test_any_strides() -> None:
    attended, hidden = (torch.randn(5, width, 2, device=DEVICE).permute(2, 0, 1) for width in (3, 7))
    for left in (attended, None):
        result, wanted = ops.gelu_join_triton(left, hidden), ops.gelu_join_reference(left, hidden)
        assert result.stride() == wanted.stride()
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_registration(op: Any) -> None:
    for dtype in DTYPES:
        for example in list(op.examples(torch.device("cpu"), dtype))[:2]:
            torch.library.opcheck(op.call, example)


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_wrong_inputs_are_named(op: Any, implementation: str) -> None:
    call = getattr(op, implementation)
    attended, hidden = torch.randn(2, 3, 4), torch.randn(2, 3, 8)
    for arguments, message in [
        ((None, hidden[0]), r"hidden rows must be \(batch, rows, width\), got \(3, 8\)"),
        ((attended[0], hidden), r"attended \(3, 4\) in torch.float32 does not go beside hidden \(2, 3, 8\)"),
        ((attended[:, :2], hidden), r"attended \(2, 2, 4\)"),
        ((attended.bfloat16(), hidden), "in torch.bfloat16 does not go beside"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(*arguments)


def test_float64_has_no_kernel() -> None:
    with pytest.raises(ValueError, match="float64"):
        ops.gelu_join_triton(None, torch.randn(1, 2, 8, dtype=torch.float64))


def test_examples_have_strided_inputs() -> None:
    attended, hidden = next(ops.examples(DEVICE, torch.float32))
    assert attended.stride() == hidden.stride() == (1500, 300, 1)


def test_what_is_launched_is_what_is_compiled(recorded: Any) -> None:
    launched = recorded(ops._gelu_join_kernel)
    for width, hidden_width in ops.WIDTHS:
        for dtype in DTYPES:
            attended = torch.empty(2, 1, width, dtype=dtype)
            hidden = torch.empty(2, 1, 3 * width + hidden_width, dtype=dtype)[..., 3 * width :]
            for left in (attended, None):
                ops.gelu_join_triton(left, hidden)
                ops.gelu_quant_triton(left, hidden)
    ops.gelu_join_triton(None, hidden[:, :0])  # a GPU refuses an empty grid
    described = launched.described(ops.compilations(90))
    assert len(described) == len(launched.seen)
    assert all(one in described for one in launched.seen)


def test_e4m3_is_compiled_where_the_chip_has_it() -> None:
    for chip, limits in CHIPS.items():
        assert any("*fp8e4nv" in one.signature.values() for one in ops.compilations(chip)) == limits.fp8
