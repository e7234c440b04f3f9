"""Positions of text rows: in the language model (M-RoPE) and, for v1.2, in the DiT (model.md §1.6, §1.9)."""

from dataclasses import dataclass

import torch
from torch import Tensor

# §1.9: one latent token covers 16 pixels; its coordinate 0 lies at pixel 11.
TOKEN_PIXELS = 16
TOKEN_ORIGIN = 11


@dataclass(frozen=True, slots=True)
class Grid:
    """What the vision tower saw in merged patches of `factor` pixels; the level-resized picture's size."""

    rows: int
    columns: int
    factor: int
    width: int
    height: int


def rope_positions(ids: Tensor, image_pad: int, grid: Grid) -> Tensor:
    """M-RoPE positions (3, T) int64 of a chat string (T,) with one picture: time, row, column (§1.6).

    Text counts up on all three axes; picture tokens share one time and add their row and column; text
    behind them goes on after the longer side. A token with id 0 (`!`) is not counted and sits at 1 on all
    axes (§1.4).
    """
    counted = ids > 0
    is_picture = ids == image_pad
    text = (counted & ~is_picture).long()
    behind = (is_picture.long().cumsum(0) > 0) & ~is_picture
    time = text.cumsum(0) - text + behind * max(grid.rows, grid.columns)
    index = torch.arange(int(is_picture.sum()), device=ids.device)
    positions = time.repeat(3, 1)
    positions[1, is_picture] += index // grid.columns
    positions[2, is_picture] += index % grid.columns
    return positions.masked_fill(~counted, 1)


def latent_coordinates(index: Tensor, cells: int, side: int, factor: int) -> Tensor:
    """Where merged patches lie on the target's token grid along one axis (§1.9), float64.

    index: patch numbers, of `cells` in all; side: the level-resized picture's side in pixels.
    """
    seen = index.double() * factor + (factor - 1) / 2  # the patch's centre in the picture the tower saw
    pixel = seen * (side - 1) / (cells * factor - 1)
    return (pixel - TOKEN_ORIGIN) / TOKEN_PIXELS


def signed_ids(positions: Tensor, is_picture: Tensor, grid: Grid) -> Tensor:
    """RoPE ids (T, 3) float32 of v1.2's text rows (§1.9).

    positions: (3, T) M-RoPE positions of the kept rows; is_picture: (T,) bool. Time is negative, up to -1;
    picture tokens lie on the target's token grid, other text at row and column 0.
    """
    ids = torch.zeros(positions.shape[1], 3, dtype=torch.float64, device=positions.device)
    ids[:, 0] = positions[0] - (positions[0].max() + 1)
    row, column = (positions[1:] - positions[0])[:, is_picture]
    ids[is_picture, 1] = latent_coordinates(row, grid.rows, grid.height, grid.factor)
    ids[is_picture, 2] = latent_coordinates(column, grid.columns, grid.width, grid.factor)
    return ids.float()
