"""Timesteps, guidance and the Euler step: pure functions (model.md §5.3, §5.4)."""

import math

import torch
from torch import Tensor

# The shift's exponent is linear in the number of target tokens: 0.5 at 256 tokens, 1.15 at 4096.
SHIFT_SLOPE = (1.15 - 0.5) / (4096 - 256)
SHIFT_OFFSET = 0.5 - 256 * SHIFT_SLOPE


def shift(tokens: int) -> float:
    """exp(mu): how far the schedule leans towards noise for `tokens` target tokens."""
    return math.exp(SHIFT_SLOPE * tokens + SHIFT_OFFSET)


def timesteps(steps: int, tokens: int, strength: float | None = None) -> Tensor:
    """The steps + 1 points of the schedule from 1 to 0, float32, shifted for `tokens` target tokens.

    With `strength` in (0, 1] (img2img, §5.5) the first int((1 - strength) * steps) steps fall away; at least one stays.
    Raises ValueError for steps < 1 or a strength outside (0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float32)
    e = shift(tokens)
    t = e / (e + (1 / t - 1))
    if strength is None:
        return t
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    return t[min(int((1 - strength) * steps), steps - 1) :]


def rescale(difference: Tensor, power: float = 0.4) -> Tensor:
    """Divisor of the norm-rescaled guidance: ||d||^power per token where the norm is above 1, else 1.

    difference: (batch, tokens, channels). Returns (batch, tokens, 1).
    """
    size = difference.norm(dim=-1, keepdim=True)
    return torch.where(size > 1.0, size**power, torch.ones_like(size))


def guided(cond: Tensor, uncond: Tensor, guidance: float, rescaled: bool, fp32_norm: bool = False) -> Tensor:
    """Classifier-free guidance u + g (c - u), with (c - u) divided by `rescale` when `rescaled` (§5.4).

    fp32_norm: the rescaled part, and with it the result, is float32 at least, as under the official autocast.
    """
    difference = cond - uncond
    if rescaled:
        if fp32_norm:
            difference = difference.to(torch.promote_types(difference.dtype, torch.float32))
        difference = difference / rescale(difference)
    return uncond + guidance * difference
