"""Convolutions and group norms in horizontal strips: the whole picture's result from a fraction of its memory.

Pictures decoded in tiles differ from whole ones and have seams, since a group norm takes its mean and variance over
the whole picture. Here these are gathered strip by strip first; then normalisation, SiLU and convolution run on one
strip at a time, with the rows above and below that the convolution reaches. Only inputs and outputs of convolutions
are ever whole.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 32  # of a strip: two more are read, and computed again, for each
Rows = Callable[[int, int], Tensor]  # (first, end) -> these rows of something (batch, channels, height, width)


def spans(height: int) -> Iterator[tuple[int, int]]:
    for top in range(0, height, ROWS):
        yield top, min(top + ROWS, height)


def rows_of(x: Tensor) -> Rows:
    return lambda first, end: x[:, :, first:end]


def activated(norm: nn.GroupNorm, x: Tensor) -> Rows:
    """Rows of SiLU(norm(x)): rounded where the modules round, statistics in float32 or wider."""
    scale, shift = affine(norm, x)

    def rows(first: int, end: int) -> Tensor:
        part = x[:, :, first:end]
        return F.silu(torch.addcmul(shift, part.to(scale.dtype), scale).to(x.dtype))

    return rows


def affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (batch, channels, 1, 1) that are the norm of the whole x: norm(x) = scale x + shift.

    The strips' moments are merged as in Chan, Golub and LeVeque (1983), so that no large sums cancel.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    count, mean = 0, torch.zeros((), dtype=wide, device=x.device)
    squares = mean
    for first, end in spans(x.shape[2]):
        part = x[:, :, first:end].to(wide).unflatten(1, (norm.num_groups, -1)).flatten(2)
        added = part.shape[2]
        variance, middle = torch.var_mean(part, dim=2, correction=0)  # (batch, groups)
        difference = middle - mean
        mean = mean + difference * (added / (count + added))
        squares = squares + variance * added + difference.square() * (count * added / (count + added))
        count += added
    inverse = torch.rsqrt(squares / count + norm.eps)
    repeats = norm.num_channels // norm.num_groups
    inverse, mean = (each.repeat_interleave(repeats, dim=1) for each in (inverse, mean))
    scale = norm.weight.to(wide) * inverse
    return scale[..., None, None], (norm.bias.to(wide) - mean * scale)[..., None, None]


def convolved(conv: nn.Conv2d, rows: Rows, height: int) -> Iterator[tuple[slice, Tensor]]:
    """A 3 x 3 convolution with a border of one zero, of an input of that height: output rows, strip by strip."""
    for top, bottom in spans(height):
        first, end = max(top - 1, 0), min(bottom + 1, height)
        part = F.pad(rows(first, end), (1, 1, int(top == 0), int(bottom == height)))
        yield slice(top, bottom), F.conv2d(part, conv.weight, conv.bias)


def gathered(strips: Iterator[tuple[slice, Tensor]], height: int, out: Tensor | None = None) -> Tensor:
    """Strips as one tensor of that height. out: where to, if each strip no longer needs what it replaces."""
    for rows, strip in strips:
        if out is None:
            out = strip.new_empty(*strip.shape[:2], height, strip.shape[3])
        out[:, :, rows] = strip
    assert out is not None
    return out


def doubled(x: Tensor) -> Rows:
    """Rows of x at twice its size, nearest neighbours."""

    def rows(first: int, end: int) -> Tensor:
        part = F.interpolate(x[:, :, first // 2 : (end + 1) // 2], scale_factor=2.0, mode="nearest")
        return part[:, :, first % 2 : first % 2 + end - first]

    return rows
