"""The interpreter as conftest.py mends it agrees with torch, bit by bit for casts."""

from __future__ import annotations

import sys

import pytest
import torch

from step1x.kernels.launch import jit, tl

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not in the interpreter")


@jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    places = rows * SIZE + columns
    tl.store(out_ptr + places, tl.dot(tl.load(a_ptr + places), tl.load(b_ptr + places)))


@jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + places, tl.load(x_ptr + places).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_dot(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).to(dtype)
    out = torch.full((16, 16), torch.nan)
    _dot_kernel[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out, a.float() @ b.float())


def hard(dtype: torch.dtype) -> torch.Tensor:
    """Values around every place where a cast to e4m3, e5m2 or bf16 rounds, underflows or overflows."""
    torch.manual_seed(0)
    powers = torch.arange(-20, 20, dtype=torch.float64).exp2()
    eighths = 1 + torch.arange(0, 64, dtype=torch.float64) / 64  # ties of three bits of mantissa and their neighbours
    grid = (powers[:, None] * eighths).flatten()
    random = torch.randn(1024, dtype=torch.float64) * torch.tensor([1e-3, 1, 100, 1e4]).repeat(256)
    every = torch.cat((grid, grid * (1 + 2**-20), grid * (1 - 2**-20), random, torch.tensor([0.0, torch.nan])))
    every = torch.cat((every, -every)).to(dtype)
    return torch.cat((every, torch.zeros(-len(every) % 512, dtype=dtype)))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_cast(source, target):
    x = hard(source)
    out = torch.empty(x.shape, dtype=target)
    _cast_kernel[(len(x) // 512,)](x, out, SIZE=512)
    limit = torch.finfo(target).max
    expected = x.clamp(-limit, limit) if target.itemsize == 1 else x
    torch.testing.assert_close(out.float(), expected.to(target).float(), rtol=0, atol=0, equal_nan=True)


@jit
def _truncating_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@jit
def _adding_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(x_ptr))


def test_what_it_cannot_do_is_refused():
    x, out = torch.ones(1), torch.empty(1, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="not RTZ"):
        _truncating_kernel[(1,)](x, out)
    with pytest.raises(InterpreterError, match="no bfloat16 arithmetic"):
        _adding_kernel[(1,)](x.bfloat16(), out)


@jit
def _sum_kernel(x_ptr, out_ptr, length):
    total = 0.0
    for i in range(0, length):
        total += tl.exp(tl.load(x_ptr + i))
    tl.store(out_ptr, total)


def test_it_is_silent():
    """Warnings fail a test of ours; an infinity and a loop up to an argument are none on a GPU."""
    out = torch.empty(1)
    _sum_kernel[(1,)](torch.tensor([1.0, 100.0]), out, 2)
    assert out.item() == torch.inf
