"""Keys and values of all rows of all blocks, kept from step to step, so that a step may compute some rows alone.

What is kept is what attention takes: keys after their norm and their rotation (step-skipping.md §6.4 A3). Rows that a
step computes replace their own, in place; all others are seen as they were when they were last computed.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from step1x.engine.dit import DiT, DiTConfig, Rope
from step1x.kernels.adaln import quantise_rows


class Place(NamedTuple):
    """Where the keys and values of one block's rows go.

    rows: (batch or 1, n) int64, of the image where the block's text rows are apart. joint: of text and image together.
    """

    rows: Tensor
    keys: "Tensor | Rows8"
    values: "Tensor | Rows8"
    joint: Tensor


class Rows8(NamedTuple):
    """Rows in 8 bits: e4m3 (batch, heads, rows, head_dim), and the scale of each, float32."""

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], device: torch.device) -> Self:
        scales = torch.empty(*shape[:3], 1, device=device)
        return cls(torch.empty(shape, dtype=torch.float8_e4m3fn, device=device), scales)

    def write(self, rows: Tensor, new: Tensor) -> None:
        """Puts rows (batch, heads, n, head_dim) to `rows` (batch or 1, n)."""
        for whole, part in zip(self, quantise_rows(new), strict=True):
            # Scattering does not know e4m3, but bytes.
            target, source = (
                one.view(torch.uint8) if one.dtype == torch.float8_e4m3fn else one for one in (whole, part)
            )
            target.scatter_(2, rows[:, None, :, None].expand(source.shape), source)

    def read(self, dtype: torch.dtype) -> Tensor:
        return (self.values.float() * self.scales).to(dtype)


class Kept:
    """Keys and values of one request, for all of its branches that run together."""

    def __init__(self, dit: DiT, batch: int, rows: int, *, eight_bit: bool = False) -> None:
        """rows: of text and image together. eight_bit: half the memory, and some exactness."""
        config, device = dit.config, dit.device
        shape = (batch, config.heads, rows, config.head_dim)

        def made() -> "Tensor | Rows8":
            return Rows8.empty(shape, device) if eight_bit else torch.empty(shape, dtype=dit.dtype, device=device)

        self.blocks = [(made(), made()) for _ in range(config.depth + config.depth_single)]
        self.rows = rows

    @classmethod
    def of(cls, blocks: "Sequence[tuple[Tensor | Rows8, Tensor | Rows8]]", rows: int) -> Self:
        """Keys and values that are there, of each block."""
        made = cls.__new__(cls)
        made.blocks, made.rows = list(blocks), rows
        return made

    def first(self, batch: int) -> "Kept":
        """Those of the first rows of the batch, in the same memory."""

        def part(whole: "Tensor | Rows8") -> "Tensor | Rows8":
            return Rows8(*(one[:batch] for one in whole)) if isinstance(whole, Rows8) else whole[:batch]

        view = copy(self)
        view.blocks = [(part(keys), part(values)) for keys, values in self.blocks]
        return view

    @property
    def nbytes(self) -> int:
        parts = [part for pair in self.blocks for part in pair]
        return sum(sum(one.nbytes for one in part) if isinstance(part, Rows8) else part.nbytes for part in parts)


def kept_bytes(config: DiTConfig, rows: int, itemsize: int) -> int:
    """Bytes of the keys and values of so many rows, of all branches together; itemsize 1: in 8 bits, with scales."""
    scale = 4 if itemsize == 1 else 0
    return 2 * (config.depth + config.depth_single) * rows * config.heads * (config.head_dim * itemsize + scale)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Active:
    """The image rows that a step computes, and what is kept of all. One is equal to itself alone."""

    kept: Kept
    image: Tensor  # (batch or 1, n) int64: of the image's rows
    joint: Tensor  # text rows, then those: of all rows

    @classmethod
    def of(cls, kept: Kept, image: Tensor, text_rows: int) -> Self:
        first = torch.arange(text_rows, device=image.device).expand(image.shape[0], -1)
        return cls(kept, image, torch.cat((first, text_rows + image), dim=1))

    @classmethod
    def all(cls, kept: Kept, text_rows: int) -> Self:
        """Every row."""
        place = kept.blocks[0][0]
        device = place.scales.device if isinstance(place, Rows8) else place.device
        return cls.of(kept, torch.arange(kept.rows - text_rows, device=device)[None], text_rows)

    def place(self, block: int, *, joined: bool) -> Place:
        """For a block by its position; joined: its rows are text and image rows together."""
        return Place(self.joint if joined else self.image, *self.kept.blocks[block], self.joint)

    def rope(self, rope: Rope) -> Rope:
        """Of the rows that are computed, from the tables of all (batch or 1, 1, rows, half)."""
        cos, sin = rope
        batch = max(len(cos), len(self.joint))
        index = self.joint.expand(batch, -1)[:, None, :, None].expand(-1, -1, -1, cos.shape[-1])
        return tuple(table.expand(batch, -1, -1, -1).gather(2, index) for table in (cos, sin))  # type: ignore[return-value]

    def gathered(self, tokens: Tensor) -> Tensor:
        """Of image tokens (batch, N, channels), those that are computed."""
        return tokens.gather(1, self.image.expand(len(tokens), -1)[:, :, None].expand(-1, -1, tokens.shape[2]))
