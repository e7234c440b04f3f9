"""Products of rows that are quantised as they come with quantised weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Scaled", "fp8_product", "int8_product"]

Scaled = tuple[Tensor, Tensor]  # 8-bit values (rows, K) and the float32 scale of each row (rows, 1)
INT_MM_ROWS = 17  # least number that `torch._int_mm` takes on CUDA
PIECE = 4096  # rows whose int32 and float32 sums are held at a time: of all rows they may take gigabytes


def fp8_product(rows: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows @ weight.T + bias (M, N) in dtype, summed in float32, scaled and rounded once.

    rows: e4m3 (M, K) and float32 scales (M, 1); weight: e4m3 (N, K) and scales (N, 1). K, N: multiples of 16 on CUDA.
    """
    (values, scales), (matrix, matrix_scales) = rows, weight
    if values.device.type != "cpu" and dtype != torch.bfloat16:  # row-wise scales come with bfloat16 results only there
        one = scales.new_ones(())
        product = torch._scaled_mm(values, matrix.t(), one, one, out_dtype=torch.float32)
        return _scaled(product, scales, matrix_scales, bias, dtype)
    # Fast: Hopper leaves the sums in its tensor cores, which are less exact than float32 but far more so than e4m3, and
    # does not stop to add them up in registers. It means nothing elsewhere.
    return torch._scaled_mm(
        values, matrix.t(), scales, matrix_scales.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def int8_product(rows: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows @ weight.T + bias (M, N) in dtype: exact sums, scaled in float32 and rounded once.

    rows: int8 (M, K) and float32 scales (M, 1); weight: int8 (N, K) and scales (N, 1). K, N: multiples of 8 on CUDA.
    """
    (values, scales), (matrix, matrix_scales) = rows, weight
    out = scales.new_empty((values.shape[0], matrix.shape[0]), dtype=dtype)
    for some, own, place in zip(values.split(PIECE), scales.split(PIECE), out.split(PIECE), strict=True):
        place.copy_(_scaled(_sums(some, matrix), own, matrix_scales, bias, dtype))
    return out


def _sums(values: Tensor, matrix: Tensor) -> Tensor:
    """values @ matrix.T of int8, exact in int32 or float64, as float32."""
    if values.device.type == "cpu":
        # The same integers as `torch._int_mm`, which takes 13 times as long there.
        return (values.double() @ matrix.double().t()).float()
    missing = max(INT_MM_ROWS - values.shape[0], 0)
    padded = F.pad(values, (0, 0, 0, missing)) if missing else values
    return torch._int_mm(padded, matrix.t())[: values.shape[0]].float()


def _scaled(product: Tensor, scales: Tensor, matrix_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """product * scales * matrix_scales + bias; writes into the product."""
    product.mul_(scales).mul_(matrix_scales.t())
    return (product if bias is None else product.add_(bias)).to(dtype)
