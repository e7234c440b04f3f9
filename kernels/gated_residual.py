"""Gated residual `x + gate * y` of the DiT's blocks, alone or with the adaptive LayerNorm of the next branch.

Formula and roundings of engine/dit.py: `torch.addcmul` (fused) or a product and a sum. One program holds a row.
Bytes per bfloat16 element: product and sum apart move 10, `gated_residual` 6. Whoever normalises the new x reads it
again: `gated_residual_adaln` moves 8 instead of 6 + 4, and `gated_residual_adaln_fp8` 7 instead of 6 + 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from step1x.kernels.adaln import (
    TYPES,
    WIDTHS,
    adaln_fake,
    adaln_fp8_fake,
    adaln_reference,
    check_rows,
    kernel_input,
    modulated_row,
    quantise_rows,
    quantised,
    row_scale,
    row_settings,
)
from step1x.kernels.launch import CHIPS, Compilation, Example, define, jit, tl


def gated_residual_reference(x: Tensor, gate: Tensor, y: Tensor, fused: bool) -> Tensor:
    """x + gate * y in x's dtype; `fused` rounds once, otherwise the product is rounded too.

    x, y (batch, rows, width); gate (batch, 1, width).
    """
    check_rows(x, (gate,), y)
    return (torch.addcmul(x, gate, y) if fused else x + gate * y).contiguous()


def gated_residual_adaln_reference(
    x: Tensor, gate: Tensor, y: Tensor, fused: bool, shift: Tensor, scale: Tensor, fp32: bool
) -> tuple[Tensor, Tensor]:
    """The new x and `adaln` of it."""
    x = gated_residual_reference(x, gate, y, fused)
    return x, adaln_reference(x, shift, scale, fp32)


def gated_residual_adaln_fp8_reference(
    x: Tensor, gate: Tensor, y: Tensor, fused: bool, shift: Tensor, scale: Tensor, fp32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The new x, and `adaln_fp8` of it: e4m3 (batch, rows, width) and float32 scales (batch, rows, 1)."""
    x, modulated = gated_residual_adaln_reference(x, gate, y, fused, shift, scale, fp32)
    return x, *quantise_rows(modulated)


@jit
def _gated_residual_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    gate_ptr,
    y_ptr,
    new_ptr,
    shift_ptr,  # None: nothing is modulated, and scale_ptr and modulated_ptr are None too
    scale_ptr,
    modulated_ptr,
    scales_ptr,  # None: the modulated row is not quantised
    x_batch,
    x_row,
    gate_batch,
    y_batch,
    y_row,
    shift_batch,
    scale_batch,
    WIDTH: tl.constexpr,
    FUSED: tl.constexpr,
    FP32: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    index = batch * tl.num_programs(0) + row
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    x = tl.load(x_ptr + batch * x_batch + row * x_row + cols, mask=mask, other=0.0)
    y = tl.load(y_ptr + batch * y_batch + row * y_row + cols, mask=mask, other=0.0)
    gate = tl.load(gate_ptr + batch * gate_batch + cols, mask=mask, other=0.0)
    gated = gate.to(tl.float32) * y.to(tl.float32)
    if not FUSED:
        gated = gated.to(x.dtype).to(tl.float32)
    new = (x.to(tl.float32) + gated).to(x.dtype)
    tl.store(new_ptr + index * WIDTH + cols, new, mask=mask)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + batch * shift_batch + cols, mask=mask, other=0.0)
        scale = tl.load(scale_ptr + batch * scale_batch + cols, mask=mask, other=0.0)
        modulated = modulated_row(new, shift, scale, mask, WIDTH, FP32)
        if scales_ptr is not None:
            modulated_scale = row_scale(tl.max(tl.abs(modulated.to(tl.float32))))
            tl.store(scales_ptr + index, modulated_scale)
            modulated = quantised(modulated, modulated_scale)
        tl.store(modulated_ptr + index * WIDTH + cols, modulated, mask=mask)


def _launch(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    fused: bool,
    new: Tensor,
    modulation: tuple[Tensor, ...] = (),  # shift and scale
    fp32: bool = False,
    modulated: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    check_rows(x, (gate, *modulation), y)
    x, gate, y = kernel_input(x), kernel_input(gate), kernel_input(y)
    shift, scale = [kernel_input(one) for one in modulation] or (None, None)
    batch, rows, width = x.shape
    block, warps = row_settings(width)
    if new.numel():
        _gated_residual_kernel[(rows, batch)](
            x,
            gate,
            y,
            new,
            shift,
            scale,
            modulated,
            scales,
            x.stride(0),
            x.stride(1),
            gate.stride(0),
            y.stride(0),
            y.stride(1),
            0 if shift is None else shift.stride(0),
            0 if scale is None else scale.stride(0),
            WIDTH=width,
            FUSED=fused,
            FP32=fp32,
            BLOCK=block,
            num_warps=warps,
        )


def gated_residual_triton(x: Tensor, gate: Tensor, y: Tensor, fused: bool) -> Tensor:
    new = gated_residual_fake(x, gate, y, fused)
    _launch(x, gate, y, fused, new)
    return new


def gated_residual_adaln_triton(
    x: Tensor, gate: Tensor, y: Tensor, fused: bool, shift: Tensor, scale: Tensor, fp32: bool
) -> tuple[Tensor, Tensor]:
    new, modulated = gated_residual_adaln_fake(x, gate, y, fused, shift, scale, fp32)
    _launch(x, gate, y, fused, new, (shift, scale), fp32, modulated)
    return new, modulated


def gated_residual_adaln_fp8_triton(
    x: Tensor, gate: Tensor, y: Tensor, fused: bool, shift: Tensor, scale: Tensor, fp32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    new, modulated, scales = gated_residual_adaln_fp8_fake(x, gate, y, fused, shift, scale, fp32)
    _launch(x, gate, y, fused, new, (shift, scale), fp32, modulated, scales)
    return new, modulated, scales


def gated_residual_fake(x: Tensor, gate: Tensor, y: Tensor, fused: bool) -> Tensor:
    return x.new_empty(x.shape)


def gated_residual_adaln_fake(
    x: Tensor, gate: Tensor, y: Tensor, fused: bool, shift: Tensor, scale: Tensor, fp32: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), adaln_fake(x, shift, scale, fp32)


def gated_residual_adaln_fp8_fake(
    x: Tensor, gate: Tensor, y: Tensor, fused: bool, shift: Tensor, scale: Tensor, fp32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *adaln_fp8_fake(x, shift, scale, fp32)


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for fused in (True, False):
        yield (
            normal(2, 5, 150)[:, 1:4, 20:143],
            normal(2, 1, 300)[..., 100:223],
            normal(2, 3, 123),
            fused,
        )  # odd, slices
        yield normal(1, 1, 192), normal(1, 1, 192), normal(1, 2, 400)[:, 1:, 8:200], fused  # one row
        yield 1e4 * normal(1, 2, 64) + 1e5, 1e3 * normal(1, 1, 64), 1e3 * normal(1, 2, 64), fused  # large
        yield 1e-6 * normal(2, 2, 64), 1e-3 * normal(2, 1, 64), 1e-3 * normal(2, 2, 64), fused  # eps counts
        yield 0 * normal(1, 2, 48), normal(1, 1, 48), 0 * normal(1, 2, 48), fused  # all zeros
        yield normal(2, 0, 16), normal(2, 1, 16), normal(2, 0, 16), fused


def adaln_examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    for fp32 in (True, False):
        for x, gate, y, fused in examples(device, dtype):
            shift, scale = torch.randn_like(gate.repeat(1, 1, 3)).chunk(3, dim=-1)[1:]
            yield x, gate, y, fused, shift, scale, fp32


gated_residual_op = define(
    "gated_residual", gated_residual_reference, gated_residual_triton, gated_residual_fake, examples
)
gated_residual = gated_residual_op.call
gated_residual_adaln_op = define(
    "gated_residual_adaln",
    gated_residual_adaln_reference,
    gated_residual_adaln_triton,
    gated_residual_adaln_fake,
    adaln_examples,
)
gated_residual_adaln = gated_residual_adaln_op.call
gated_residual_adaln_fp8_op = define(
    "gated_residual_adaln_fp8",
    gated_residual_adaln_fp8_reference,
    gated_residual_adaln_fp8_triton,
    gated_residual_adaln_fp8_fake,
    adaln_examples,
    fp8=True,
)
gated_residual_adaln_fp8 = gated_residual_adaln_fp8_op.call
OPS = (gated_residual_op, gated_residual_adaln_op, gated_residual_adaln_fp8_op)


def compilations(chip: int) -> Iterator[Compilation]:
    """For every width, dtype and rounding: alone, modulated in both dtype flows; e4m3 where the chip has it."""
    strides = ("x_batch", "x_row", "gate_batch", "y_batch", "y_row", "shift_batch", "scale_batch")
    for width, dtype, fused in itertools.product(WIDTHS, TYPES, (True, False)):
        block, warps = row_settings(width)
        plain = dict.fromkeys(("x_ptr", "gate_ptr", "y_ptr", "new_ptr"), f"*{dtype}")
        vectors = dict.fromkeys(("shift_ptr", "scale_ptr"), f"*{dtype}")
        results = [{}, vectors | {"modulated_ptr": f"*{dtype}"}]
        if CHIPS[chip].fp8:
            results.append(vectors | {"modulated_ptr": "*fp8e4nv", "scales_ptr": "*fp32"})
        for more, fp32 in itertools.product(results, (True, False)):
            if fp32 and not more:
                continue
            absent = dict.fromkeys({"shift_ptr", "scale_ptr", "modulated_ptr", "scales_ptr"} - set(more))
            yield Compilation(
                kernel=_gated_residual_kernel,
                signature={**plain, **more, **dict.fromkeys(strides, "i32")},
                constants={**absent, "WIDTH": width, "FUSED": fused, "FP32": fp32, "BLOCK": block},
                num_warps=warps,
                num_stages=3,
                aligned=frozenset(strides),
            )
