"""Adaptive LayerNorm: `(1 + scale) * LayerNorm(x) + shift` with eps 1e-6 and no affine, `modulate` of engine/dit.py.

Operation by operation, the float32 flow moves 36 bytes per bfloat16 element. Here one program holds a row in registers,
reads it once and writes it once: 4 bytes. `adaln_fp8` quantises the rounded row before it leaves: 3 bytes, where a
quantisation of its own would read the row again: 7. Shift and scale are the same for all rows and stay in the cache.

gated_residual.py and gelu_quant.py, which work row by row too, take their checks and device functions from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.kernels.launch import CHIPS, Compilation, Example, adjacent, define, jit, tl

E4M3_MAX = 448.0
# The least maximum of a row in its scale: rows of zeros get a positive, normal scale, and no quotient exceeds 448.
SMALLEST = 2.0**-100
WIDTHS = (3072, 192)  # of the released models and of the bundled one
TYPES = ("bf16", "fp32")  # those compiled ahead of time, as Triton names them


def check_rows(x: Tensor, vectors: tuple[Tensor, ...], *others: Tensor) -> None:
    """x (batch, rows, width); each of `vectors` (batch, 1, width); `others` like x; one dtype."""
    if x.ndim != 3:
        raise ValueError(f"rows must be (batch, rows, width), got {tuple(x.shape)}")
    batch, _, width = x.shape
    for given, wanted in [(one, (batch, 1, width)) for one in vectors] + [(one, tuple(x.shape)) for one in others]:
        if given.shape != wanted or given.dtype != x.dtype:
            raise ValueError(f"expected {wanted} in {x.dtype}, got {tuple(given.shape)} in {given.dtype}")


def kernel_input(x: Tensor) -> Tensor:
    """x as the row kernels read it."""
    if x.dtype == torch.float64:
        raise ValueError("the kernels compute in float32: float64 is for the reference")
    return adjacent(x)


def row_settings(width: int) -> tuple[int, int]:
    """Block and warps of a program that holds a row of `width`, on any chip: 16 elements a thread up to 16 warps."""
    block = 1 << (width - 1).bit_length()
    return block, min(max(block // 512, 1), 16)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and float32 scales (..., 1) with values * scales ~ x; the largest of each row becomes 448."""
    scales = (row_peaks(x) / E4M3_MAX).unsqueeze(-1)
    return (x / scales).to(torch.float8_e4m3fn), scales


def row_peaks(x: Tensor) -> Tensor:
    """The largest magnitude of each row as float32, at least `SMALLEST`."""
    return x.abs().amax(-1).float().clamp(min=SMALLEST)


def adaln_reference(x: Tensor, shift: Tensor, scale: Tensor, fp32: bool) -> Tensor:
    """(1 + scale) * LayerNorm(x) + shift in x's dtype; with `fp32`, only 1 + scale and the result are rounded to it.

    x (batch, rows, width); shift, scale (batch, 1, width).
    """
    check_rows(x, (shift, scale))
    rows = x.to(torch.promote_types(x.dtype, torch.float32)) if fp32 else x
    normed = F.layer_norm(rows, x.shape[-1:], eps=1e-6)
    return ((1 + scale) * normed + shift).to(x.dtype).contiguous()


def adaln_fp8_reference(x: Tensor, shift: Tensor, scale: Tensor, fp32: bool) -> tuple[Tensor, Tensor]:
    """`adaln` as e4m3 (batch, rows, width) and float32 scales (batch, rows, 1)."""
    return quantise_rows(adaln_reference(x, shift, scale, fp32))


@jit
def modulated_row(x, shift, scale, mask, WIDTH: tl.constexpr, FP32: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of adaln, rounded to x's dtype; elements outside `mask` must be zero and remain so."""
    wide = x.to(tl.float32)
    centred = tl.where(mask, wide - tl.sum(wide) / WIDTH, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + 1e-6)
    factor = (1.0 + scale.to(tl.float32)).to(x.dtype).to(tl.float32)
    if not FP32:
        normed = normed.to(x.dtype).to(tl.float32)
    scaled = factor * normed
    if not FP32:
        scaled = scaled.to(x.dtype).to(tl.float32)
    return (scaled + shift.to(tl.float32)).to(x.dtype)


@jit
def row_scale(peak):  # type: ignore[no-untyped-def]
    """Scale of a row whose largest magnitude is `peak`, as in `quantise_rows`."""
    return tl.div_rn(tl.maximum(peak, 2.0**-100), 448.0)


@jit
def quantised(row, scale):  # type: ignore[no-untyped-def]
    """e4m3 of row / scale: a true division, since quotients halfway between two values are common."""
    return tl.div_rn(row.to(tl.float32), scale).to(tl.float8e4nv)


@jit
def _adaln_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    scales_ptr,  # None: the result is not quantised
    x_batch,
    x_row,
    shift_batch,
    scale_batch,
    WIDTH: tl.constexpr,
    FP32: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    x = tl.load(x_ptr + batch * x_batch + row * x_row + cols, mask=mask, other=0.0)
    shift = tl.load(shift_ptr + batch * shift_batch + cols, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + batch * scale_batch + cols, mask=mask, other=0.0)
    out = modulated_row(x, shift, scale, mask, WIDTH, FP32)
    index = batch * tl.num_programs(0) + row
    if scales_ptr is not None:
        out_scale = row_scale(tl.max(tl.abs(out.to(tl.float32))))
        tl.store(scales_ptr + index, out_scale)
        out = quantised(out, out_scale)
    tl.store(out_ptr + index * WIDTH + cols, out, mask=mask)


def _launch(x: Tensor, shift: Tensor, scale: Tensor, fp32: bool, out: Tensor, scales: Tensor | None) -> None:
    check_rows(x, (shift, scale))
    x, shift, scale = kernel_input(x), kernel_input(shift), kernel_input(scale)
    batch, rows, width = x.shape
    block, warps = row_settings(width)
    if out.numel():
        _adaln_kernel[(rows, batch)](
            x,
            shift,
            scale,
            out,
            scales,
            x.stride(0),
            x.stride(1),
            shift.stride(0),
            scale.stride(0),
            WIDTH=width,
            FP32=fp32,
            BLOCK=block,
            num_warps=warps,
        )


def adaln_triton(x: Tensor, shift: Tensor, scale: Tensor, fp32: bool) -> Tensor:
    out = adaln_fake(x, shift, scale, fp32)
    _launch(x, shift, scale, fp32, out, None)
    return out


def adaln_fp8_triton(x: Tensor, shift: Tensor, scale: Tensor, fp32: bool) -> tuple[Tensor, Tensor]:
    out, scales = adaln_fp8_fake(x, shift, scale, fp32)
    _launch(x, shift, scale, fp32, out, scales)
    return out, scales


def adaln_fake(x: Tensor, shift: Tensor, scale: Tensor, fp32: bool) -> Tensor:
    return x.new_empty(x.shape)


def adaln_fp8_fake(x: Tensor, shift: Tensor, scale: Tensor, fp32: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for fp32 in (True, False):
        mod = normal(2, 1, 6 * 123)
        wide = normal(2, 5, 150)
        yield wide[:, 1:4, 20:143], mod[..., :123], mod[..., 246:369], fp32  # odd, and slices of wider rows
        yield normal(1, 1, 192), normal(1, 1, 192), normal(1, 1, 192), fp32  # one row
        yield 1e4 * normal(1, 2, 64) + 1e5, normal(1, 1, 64), 1e-3 * normal(1, 1, 64), fp32  # large, far from zero
        yield 1e-6 * normal(2, 2, 64), 1e-6 * normal(2, 1, 64), normal(2, 1, 64), fp32  # eps counts
        yield 0 * normal(1, 2, 48), 0 * normal(1, 1, 48), normal(1, 1, 48), fp32  # all zeros
        yield normal(2, 0, 16), normal(2, 1, 16), normal(2, 1, 16), fp32


adaln_op = define("adaln", adaln_reference, adaln_triton, adaln_fake, examples)
adaln = adaln_op.call
adaln_fp8_op = define("adaln_fp8", adaln_fp8_reference, adaln_fp8_triton, adaln_fp8_fake, examples, fp8=True)
adaln_fp8 = adaln_fp8_op.call
OPS = (adaln_op, adaln_fp8_op)


def compilations(chip: int) -> Iterator[Compilation]:
    """For every width and dtype: both dtype flows, and e4m3 results where the chip has them."""
    strides = ("x_batch", "x_row", "shift_batch", "scale_batch")
    for width, dtype, fp32, fp8 in itertools.product(WIDTHS, TYPES, (True, False), (False, True)):
        if fp8 and not CHIPS[chip].fp8:
            continue
        block, warps = row_settings(width)
        inputs = dict.fromkeys(("x_ptr", "shift_ptr", "scale_ptr"), f"*{dtype}")
        results = {"out_ptr": "*fp8e4nv", "scales_ptr": "*fp32"} if fp8 else {"out_ptr": f"*{dtype}"}
        constants = {"WIDTH": width, "FP32": fp32, "BLOCK": block}
        yield Compilation(
            kernel=_adaln_kernel,
            signature={**inputs, **results, **dict.fromkeys(strides, "i32")},
            constants=constants if fp8 else {"scales_ptr": None, **constants},
            num_warps=warps,
            num_stages=3,
            aligned=frozenset(strides),
        )
