"""Weights (out, in) -> the tensors of a scheme (schemes.layout), and back."""

from collections.abc import Callable

import torch
from torch import Tensor

from step1x.kernels.adaln import E4M3_MAX, SMALLEST, quantise_rows, row_peaks
from step1x.quant.schemes import BLOCK, Scheme, fits, group_size

__all__ = ["dequantise", "quantise", "quantise_int8"]

PIECE = 1 << 20  # weights that are quantised at a time: their float32 copies stay in the cache
INT8_MAX = 127.0
INT4_MAX = 15
# Shares of a group's range that are tried for its scale and zero: the extremes may be worth cutting.
SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign
E4M3_LEAST = 2.0**-9  # above 0


def quantise(scheme: Scheme, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of `schemes.layout` for a weight (out, in) of any floating dtype, on its device.

    Raises ValueError if the scheme does not fit the shape.
    """
    if scheme == "plain" or not fits(scheme, *weight.shape):
        raise ValueError(f"a weight of {tuple(weight.shape)} cannot be {scheme}")
    make: Callable[[Tensor], dict[str, Tensor]]
    whole = {}
    match scheme:
        case "fp8" | "fp8-weight":
            make = _fp8
        case "int8" | "int8-weight":
            make = _int8
        case "int4-weight":
            make = _int4
        case _:
            scale = _nvfp4_global(weight)
            whole = {"weight_global_scale": scale}

            def make(rows: Tensor) -> dict[str, Tensor]:
                return _nvfp4(rows, scale)

    parts = [make(rows) for rows in weight.detach().split(max(PIECE // weight.shape[1], 1))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | whole


def dequantise(scheme: Scheme, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that the tensors of a scheme stand for, computed in float32 and rounded once to dtype.

    Makes one tensor of the weight's size in dtype, besides the unpacked bytes of a 4-bit scheme.
    """
    weight, scale = parts["weight"], parts["weight_scale"]
    match scheme:
        case "int4-weight":
            codes = _unpacked(weight).unflatten(-1, (scale.shape[-1], -1)).to(dtype)
            zero = parts["weight_zero"]
            return torch.addcmul(zero[..., None].to(dtype), codes, scale[..., None].to(dtype)).flatten(-2)
        case "nvfp4":
            values = torch.tensor(E2M1 + tuple(-value for value in E2M1), dtype=dtype, device=weight.device)
            blocks = values[_unpacked(weight).int()].unflatten(-1, (scale.shape[-1], -1))
            return blocks.mul_(scale.float()[..., None] * parts["weight_global_scale"]).flatten(-2)
        case _:
            return weight.to(dtype).mul_(scale)  # e4m3 and int8 are exact in every dtype, and the product rounds once


def quantise_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales (..., 1) with values * scales ~ x; the largest of each row becomes 127."""
    scales = (row_peaks(x) / INT8_MAX).unsqueeze(-1)
    return (x / scales).round_().to(torch.int8), scales


def _fp8(rows: Tensor) -> dict[str, Tensor]:
    weight, scale = quantise_rows(rows)
    return {"weight": weight, "weight_scale": scale}


def _int8(rows: Tensor) -> dict[str, Tensor]:
    weight, scale = quantise_int8(rows)
    return {"weight": weight, "weight_scale": scale}


def _int4(rows: Tensor) -> dict[str, Tensor]:
    """Code c of a group's weights stands for c * scale + zero: of SHRINKS, what leaves the least squared error."""
    groups = rows.float().unflatten(-1, (-1, group_size(rows.shape[-1])))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    middle, span = (low + high) / 2, (high - low) / INT4_MAX
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        tried = (span * shrink).clamp(min=SMALLEST).bfloat16().float()
        offset = (middle - tried * (INT4_MAX / 2)).bfloat16().float()
        error = (_int4_codes(groups, tried, offset) * tried + offset - groups).square_().sum(-1, keepdim=True)
        better = error < best
        best, scale, zero = (torch.where(better, *pair) for pair in ((error, best), (tried, scale), (offset, zero)))
    codes = _int4_codes(groups, scale, zero).flatten(-2)
    return {
        "weight": _packed(codes.to(torch.uint8)),
        "weight_scale": scale.squeeze(-1).bfloat16(),
        "weight_zero": zero.squeeze(-1).bfloat16(),
    }


def _int4_codes(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((groups - zero) / scale).round_().clamp_(0, INT4_MAX)


def _nvfp4_global(weight: Tensor) -> Tensor:
    """The scale with which the largest block's own scale becomes 448."""
    low, high = torch.aminmax(weight.detach())
    peak = torch.maximum(-low, high).float()
    return (peak / (E2M1[-1] * E4M3_MAX)).clamp(min=SMALLEST)


def _nvfp4(rows: Tensor, global_scale: Tensor) -> dict[str, Tensor]:
    """Code c of a block's weights stands for e2m1(c) * scale * global_scale."""
    blocks = rows.float().unflatten(-1, (-1, BLOCK))
    peak = blocks.abs().amax(-1)
    scale = (peak / E2M1[-1] / global_scale).clamp(E4M3_LEAST, E4M3_MAX).to(torch.float8_e4m3fn)
    scaled = blocks / (scale.float() * global_scale)[..., None]
    size = scaled.abs()
    # E2M1 counts in halves, ones and twos; ties go to the even code, as everywhere in floating point.
    coarse = torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
    codes = torch.where(size < 2, (2 * size).round(), coarse).clamp_(max=7) + 8 * (scaled < 0)
    return {"weight": _packed(codes.flatten(-2).to(torch.uint8)), "weight_scale": scale}


def _packed(codes: Tensor) -> Tensor:
    """Two codes of 4 bits in a byte, the first in the low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _unpacked(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
