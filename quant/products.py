"""Products with quantised weights by torch's own kernels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Product", "Scaled", "fp8_product", "int8_product", "weight_only_product"]

Scaled = tuple[Tensor, Tensor]  # 8-bit values (rows, K) and the float32 scale of each row (rows, 1)
Product = Callable[[Scaled, Scaled, Tensor | None, torch.dtype], Tensor]  # (rows, weight, bias, dtype of the result)
INT_MM_ROWS = 17  # least number that `torch._int_mm` takes on CUDA
PIECE = 4096  # rows whose int32 and float32 sums are held at a time: of all rows they may take gigabytes


def fp8_product(rows: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows @ weight.T + bias (M, N) in dtype, summed in float32, scaled and rounded once.

    rows: e4m3 (M, K) and float32 scales (M, 1); weight: e4m3 (N, K) and scales (N, 1). K, N: multiples of 16 on CUDA.
    """
    (values, scales), (matrix, matrix_scales) = rows, weight
    if not takes_row_scales(values.device, dtype):
        one = scales.new_ones(())
        product = torch._scaled_mm(values, matrix.t(), one, one, out_dtype=torch.float32)
        return _with_bias(product.mul_(scales).mul_(matrix_scales.t()), bias).to(dtype)
    # Fast: Hopper leaves the sums in its tensor cores, which are less exact than float32 but far more so than e4m3, and
    # does not stop to add them up in registers. It means nothing elsewhere.
    return torch._scaled_mm(
        values, matrix.t(), scales, matrix_scales.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def takes_row_scales(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` takes a scale for each row with results of a dtype: on CUDA in bfloat16 alone."""
    return device.type == "cpu" or dtype == torch.bfloat16


def int8_product(rows: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows @ weight.T + bias (M, N) in dtype: exact sums, scaled in float32 and rounded once.

    rows: int8 (M, K) and float32 scales (M, 1); weight: int8 (N, K) and scales (N, 1). K, N: multiples of 8 on CUDA.
    """
    return int8_in_pieces(_scaled_sums, rows, weight, bias, dtype)


def int8_in_pieces(
    scaled_sums: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Scaled,
    weight: Scaled,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`int8_product` by what makes float32 sums * scales (M, N) of values (M, K), matrix (K, N) and scales (M, 1)."""
    (values, scales), (matrix, matrix_scales) = rows, weight
    out = scales.new_empty((values.shape[0], matrix.shape[0]), dtype=dtype)
    for some, own, place in zip(values.split(PIECE), scales.split(PIECE), out.split(PIECE), strict=True):
        missing = 0 if values.device.type == "cpu" else max(INT_MM_ROWS - some.shape[0], 0)
        if missing:
            some, own = F.pad(some, (0, 0, 0, missing)), F.pad(own, (0, 0, 0, missing))
        sums = scaled_sums(some, matrix.t(), own).mul_(matrix_scales.t())
        place.copy_(_with_bias(sums, bias).narrow(0, 0, place.shape[0]))
    return out


def weight_only_product(rows: Tensor, weight: Scaled, bias: Tensor | None) -> Tensor:
    """rows (..., K) @ weight.T + bias (..., N), where the weight is e4m3 or int8 (N, K) with scales (N, 1).

    The scales go to the result: e4m3 and int8 are exact in every dtype, and one pass over the weight is saved.
    """
    matrix, scales = weight
    product = F.linear(rows, matrix.to(rows.dtype))
    return product.mul_(scales.t()[0]) if bias is None else torch.addcmul(bias, product, scales.t()[0], out=product)


def _scaled_sums(values: Tensor, matrix: Tensor, scales: Tensor) -> Tensor:
    return torch._int_mm(values, matrix).float().mul_(scales)


def _with_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    """Writes into the product."""
    return product if bias is None else product.add_(bias)
