"""A kernel module as kernels/ has them, of which one compilation is sound, one spills and one is too large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from step1x.kernels.launch import Compilation, define, jit, tl


def scale_rows_reference(x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x, each times its factor, and the largest of each."""
    out = x * factors
    return out, out.amax(-1, keepdim=True)


@jit
def _scale_rows_kernel(x_ptr, factors_ptr, out_ptr, largest_ptr, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * width + columns, columns < width, 0).to(tl.float32)
    out = (x * tl.load(factors_ptr + row).to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, out, columns < width)
    tl.store(largest_ptr + row, tl.max(tl.where(columns < width, out.to(tl.float32), -float("inf")), 0))


def scale_rows_triton(x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    x, factors = x.contiguous(), factors.contiguous()
    out, largest = torch.empty_like(x), torch.empty_like(factors)
    _scale_rows_kernel[(len(x),)](x, factors, out, largest, x.shape[1], BLOCK=1 << (x.shape[1] - 1).bit_length())
    return out, largest


def fake(x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(factors)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for rows, width in ((3, 5), (1, 16)):
        yield tuple(torch.randn(rows, columns, device=device, dtype=dtype) for columns in (width, 1))


@jit
def _product_kernel(a_ptr, b_ptr, out_ptr, length, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, length, SIZE):
        a = tl.load(a_ptr + rows * length + start + columns)
        b = tl.load(b_ptr + (start + rows) * SIZE + columns)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + rows * SIZE + columns, total)


scale_rows_op = define("planted_scale_rows", scale_rows_reference, scale_rows_triton, fake, examples)
OPS = (scale_rows_op,)


def compilations(chip: int) -> Iterator[Compilation]:
    pointers = {name: "*bf16" for name in ("x_ptr", "factors_ptr", "out_ptr", "largest_ptr")}
    for block, warps in ((4096, 8), (16384, 1)):  # the second has 512 values to a thread
        yield Compilation(
            kernel=_scale_rows_kernel,
            signature={**pointers, "width": "i32"},
            constants={"BLOCK": block},
            num_warps=warps,
            num_stages=1,
            aligned=frozenset({"width"}),
        )
    yield Compilation(
        kernel=_product_kernel,
        signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "length": "i32"},
        constants={"SIZE": 64},
        num_warps=4,
        num_stages=16,  # times two blocks of 8 KB
        aligned=frozenset({"length"}),
    )
