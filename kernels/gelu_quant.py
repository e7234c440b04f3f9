"""tanh-GELU of the MLP's hidden rows, `F.gelu(hidden, approximate="tanh")`, beside the attention's rows if given.

    gelu(x) = x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x**3),  since (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))

exp may become infinite, then the quotient is the right zero; nothing cancels, where 1 + tanh u has lost all but a few
bits at x = -5. The single block's product takes [attended, gelu(hidden)]: `gelu_join` writes both where they belong.
Per row of W attended and M hidden bfloat16 elements, GELU and concatenation apart move 8 M + 4 W bytes, gelu_join
4 M + 4 W, and `gelu_quant` 3 M + 3 W, where a quantisation of its own would read the joined row again: 7 M + 7 W.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.kernels.adaln import TYPES, kernel_input, quantise_rows, quantised, row_scale, row_settings
from step1x.kernels.launch import CHIPS, Compilation, Example, define, jit, tl

WIDTHS = ((3072, 12288), (192, 768))  # attended and hidden, of the released models and of the bundled one


def joined_shape(attended: Tensor | None, hidden: Tensor) -> tuple[int, int, int]:
    """Shape of the result; raises ValueError where the rows do not go together."""
    if hidden.ndim != 3:
        raise ValueError(f"hidden rows must be (batch, rows, width), got {tuple(hidden.shape)}")
    batch, rows, width = hidden.shape
    if attended is None:
        return batch, rows, width
    if attended.ndim != 3 or attended.shape[:2] != hidden.shape[:2] or attended.dtype != hidden.dtype:
        raise ValueError(
            f"attended {tuple(attended.shape)} in {attended.dtype} does not go beside "
            f"hidden {tuple(hidden.shape)} in {hidden.dtype}"
        )
    return batch, rows, attended.shape[2] + width


def gelu_join_reference(attended: Tensor | None, hidden: Tensor) -> Tensor:
    """[attended, gelu(hidden)] along the last axis. attended (batch, rows, W) or None, hidden (batch, rows, M)."""
    joined_shape(attended, hidden)
    gelu = F.gelu(hidden, approximate="tanh")
    return gelu.contiguous() if attended is None else torch.cat((attended, gelu), dim=-1)


def gelu_quant_reference(attended: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu_join` as e4m3 (batch, rows, W + M) and float32 scales (batch, rows, 1)."""
    return quantise_rows(gelu_join_reference(attended, hidden))


@jit
def _gelu_join_kernel(  # type: ignore[no-untyped-def]
    attended_ptr,  # None: hidden alone
    hidden_ptr,
    out_ptr,
    scales_ptr,  # None: the result is not quantised
    attended_batch,
    attended_row,
    hidden_batch,
    hidden_row,
    ATTENDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    ATTENDED_BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    index = batch * tl.num_programs(0) + row
    out_ptr += index * (ATTENDED + HIDDEN)
    cols = tl.arange(0, HIDDEN_BLOCK)
    mask = cols < HIDDEN
    hidden = tl.load(hidden_ptr + batch * hidden_batch + row * hidden_row + cols, mask=mask, other=0.0)
    x = hidden.to(tl.float32)
    minus_2u = -1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi)
    gelu = (x / (1.0 + tl.exp(minus_2u))).to(hidden.dtype)
    if attended_ptr is not None:
        attended_cols = tl.arange(0, ATTENDED_BLOCK)
        attended_mask = attended_cols < ATTENDED
        attended_ptr += batch * attended_batch + row * attended_row
        attended = tl.load(attended_ptr + attended_cols, mask=attended_mask, other=0.0)
    if scales_ptr is not None:
        peak = tl.max(tl.abs(gelu.to(tl.float32)))
        if attended_ptr is not None:
            peak = tl.maximum(peak, tl.max(tl.abs(attended.to(tl.float32))))
        scale = row_scale(peak)
        tl.store(scales_ptr + index, scale)
        gelu = quantised(gelu, scale)
        if attended_ptr is not None:
            attended = quantised(attended, scale)
    if attended_ptr is not None:
        tl.store(out_ptr + attended_cols, attended, mask=attended_mask)
    tl.store(out_ptr + ATTENDED + cols, gelu, mask=mask)


def _launch(attended: Tensor | None, hidden: Tensor, out: Tensor, scales: Tensor | None) -> None:
    hidden = kernel_input(hidden)
    if attended is not None:
        attended = kernel_input(attended)
    batch, rows, width = hidden.shape
    attended_width = 0 if attended is None else attended.shape[2]
    block, warps = row_settings(width)
    if out.numel():
        _gelu_join_kernel[(rows, batch)](
            attended,
            hidden,
            out,
            scales,
            0 if attended is None else attended.stride(0),
            0 if attended is None else attended.stride(1),
            hidden.stride(0),
            hidden.stride(1),
            ATTENDED=attended_width,
            HIDDEN=width,
            ATTENDED_BLOCK=row_settings(attended_width)[0],
            HIDDEN_BLOCK=block,
            num_warps=warps,
        )


def gelu_join_triton(attended: Tensor | None, hidden: Tensor) -> Tensor:
    out = gelu_join_fake(attended, hidden)
    _launch(attended, hidden, out, None)
    return out


def gelu_quant_triton(attended: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    out, scales = gelu_quant_fake(attended, hidden)
    _launch(attended, hidden, out, scales)
    return out, scales


def gelu_join_fake(attended: Tensor | None, hidden: Tensor) -> Tensor:
    return hidden.new_empty(joined_shape(attended, hidden))


def gelu_quant_fake(attended: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    batch, rows, width = joined_shape(attended, hidden)
    out = hidden.new_empty((batch, rows, width), dtype=torch.float8_e4m3fn)
    return out, hidden.new_empty((batch, rows, 1), dtype=torch.float32)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    wide = 3 * normal(2, 5, 300)
    yield wide[:, 1:4, 5:42], wide[:, 2:, 111:234]  # odd, slices of a wider product
    yield None, wide[:, 1:4, 111:234]
    yield normal(1, 1, 192), normal(1, 1, 768)  # one row
    yield 1e-3 * normal(1, 2, 16), 1e4 * normal(1, 2, 64)  # large
    yield 1e-30 * normal(1, 2, 16), 1e-30 * normal(1, 2, 64)  # tiny
    yield 0 * normal(2, 1, 16), 0 * normal(2, 1, 64)
    yield normal(2, 0, 16), normal(2, 0, 64)


gelu_join_op = define("gelu_join", gelu_join_reference, gelu_join_triton, gelu_join_fake, examples)
gelu_join = gelu_join_op.call
gelu_quant_op = define("gelu_quant", gelu_quant_reference, gelu_quant_triton, gelu_quant_fake, examples, fp8=True)
gelu_quant = gelu_quant_op.call
OPS = (gelu_join_op, gelu_quant_op)


def compilations(chip: int) -> Iterator[Compilation]:
    """For all widths and dtypes, with and without attended rows; e4m3 results where the chip has them."""
    strides = ("attended_batch", "attended_row", "hidden_batch", "hidden_row")
    for (attended, hidden), dtype, beside, fp8 in itertools.product(WIDTHS, TYPES, (True, False), (False, True)):
        if fp8 and not CHIPS[chip].fp8:
            continue
        block, warps = row_settings(hidden)
        attended_width = attended if beside else 0
        inputs = {"attended_ptr": f"*{dtype}"} if beside else {}
        results = {"out_ptr": "*fp8e4nv", "scales_ptr": "*fp32"} if fp8 else {"out_ptr": f"*{dtype}"}
        absent = dict.fromkeys({"attended_ptr", "scales_ptr"} - {*inputs, *results})
        yield Compilation(
            kernel=_gelu_join_kernel,
            signature={**inputs, "hidden_ptr": f"*{dtype}", **results, **dict.fromkeys(strides, "i32")},
            constants={
                **absent,
                "ATTENDED": attended_width,
                "HIDDEN": hidden,
                "ATTENDED_BLOCK": row_settings(attended_width)[0],
                "HIDDEN_BLOCK": block,
            },
            num_warps=warps,
            num_stages=3,
            aligned=frozenset(strides),
        )
