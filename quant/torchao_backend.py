"""Products by torchao's kernels over the stored parts of a weight, which are wrapped without a copy.

Importing this imports torchao: see choice.py, which says when. Tensors are wrapped anew for each product, so weights
that a residency moves are read where they lie.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.float8.inference import Float8MMConfig
from torchao.kernel import int_scaled_matmul
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

from step1x.quant import products
from step1x.quant.products import Scaled

__all__ = ["fp8_product", "int8_product"]

FAST = Float8MMConfig(use_fast_accum=True)  # as products.fp8_product


def fp8_product(rows: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`products.fp8_product`, by whichever kernel torchao prefers on the device."""
    if not products.takes_row_scales(rows[0].device, dtype):
        return products.fp8_product(rows, weight, bias, dtype)
    return F.linear(float8_tensor(rows, dtype), float8_tensor(weight, dtype), bias)


def float8_tensor(scaled: Scaled, dtype: torch.dtype) -> Tensor:
    """torchao's view of e4m3 values (rows, K) and scales (rows, 1); products with it are of a dtype."""
    values, scales = scaled
    # Without act_quant_kwargs: a weight that has them refuses rows that are quantised already.
    wrapped: Tensor = Float8Tensor(
        values,
        scales,
        block_size=[1, values.shape[1]],
        mm_config=FAST,
        kernel_preference=KernelPreference.AUTO,
        dtype=dtype,
    )
    return wrapped


def int8_product(rows: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`products.int8_product`, by torchao's scaled product.

    On CUDA only in compiled code: outside, torchao prints the rows to look at them, which waits for the GPU and cannot
    be captured in a graph, and copies the weight.
    """
    if rows[0].device.type == "cuda" and not torch.compiler.is_compiling():
        return products.int8_product(rows, weight, bias, dtype)
    return products.int8_in_pieces(_scaled_sums, rows, weight, bias, dtype)


# On a CPU torchao asks for the chip, which Dynamo does not follow.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _scaled_sums(values: Tensor, matrix: Tensor, scales: Tensor) -> Tensor:
    sums: Tensor = int_scaled_matmul(values, matrix, scales)
    return sums
