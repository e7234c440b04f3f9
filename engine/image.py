"""Pixels, sizes, patch packing and position ids (model.md §3.7, §3.8, §5.1)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.engine.errors import InputError
from step1x.engine.variants import Resize

if TYPE_CHECKING:
    from PIL.Image import Image

PATCH = 2  # latent cells on a side of one token
TOKEN_PIXELS = 16  # pixels on a side of one token: PATCH times the autoencoder's factor of 8


def fit(width: int, height: int, level: int) -> tuple[int, int]:
    """(width, height) with the picture's aspect and about level^2 pixels, both floored to multiples of 16 (§5.1).

    Raises InputError where a side would be empty.
    """
    if level < TOKEN_PIXELS:
        raise InputError(f"size {level} is below {TOKEN_PIXELS} pixels")
    ratio = width / height
    if width > height:
        new_width = math.ceil(math.sqrt(level * level * ratio))
        new_height = math.ceil(new_width / ratio)
    else:
        new_height = math.ceil(math.sqrt(level * level / ratio))
        new_width = math.ceil(new_height * ratio)
    new_width, new_height = (side // TOKEN_PIXELS * TOKEN_PIXELS for side in (new_width, new_height))
    if not new_width or not new_height:
        raise InputError(
            f"a picture of {width}x{height} is too narrow to edit at size {level}: "
            f"a side would have under {TOKEN_PIXELS} pixels; crop it or raise the size"
        )
    return new_width, new_height


@dataclass(frozen=True, slots=True)
class Canvas:
    """The size an edit is computed at, in pixels; both sides are multiples of 16."""

    width: int
    height: int

    def __post_init__(self) -> None:
        if min(self.width, self.height) < TOKEN_PIXELS or self.width % TOKEN_PIXELS or self.height % TOKEN_PIXELS:
            raise InputError(f"{self.width}x{self.height}: both sides must be multiples of {TOKEN_PIXELS}")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens as (rows, columns)."""
        return self.height // TOKEN_PIXELS, self.width // TOKEN_PIXELS

    @property
    def tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent cells as (rows, columns)."""
        rows, columns = self.grid
        return rows * PATCH, columns * PATCH


def to_tensor(image: "Image") -> Tensor:
    """RGB picture -> (1, 3, height, width) float32 in [0, 1]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255


def to_image(pixels: Tensor, truncate: bool) -> "Image":
    """(3, height, width) nominally in [-1, 1] -> RGB picture.

    Truncated to bytes as the official code does, or rounded as diffusers does (§5.1).
    """
    from PIL import Image

    unit = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
    levels = (unit * 255).to(torch.uint8) if truncate else (unit * 255).round().to(torch.uint8)
    array = levels.permute(1, 2, 0).contiguous().cpu()
    return Image.frombytes("RGB", (array.shape[1], array.shape[0]), array.numpy().tobytes())


def resized(image: "Image", canvas: Canvas, resize: Resize) -> "Image":
    """The picture at the canvas' size as the text model sees it; `resize` as in `Variant` (§5.1, §1.9)."""
    from PIL.Image import Resampling

    method = Resampling.BICUBIC if resize == "bicubic" else Resampling.LANCZOS
    return image if image.size == (canvas.width, canvas.height) else image.resize((canvas.width, canvas.height), method)


def pixels(image: "Image", canvas: Canvas, resize: Resize) -> Tensor:
    """The picture as the autoencoder sees it: (1, 3, height, width) float32 in [-1, 1]."""
    if resize != "bilinear-antialias":
        return to_tensor(resized(image, canvas, resize)) * 2 - 1
    size = (canvas.height, canvas.width)
    return F.interpolate(to_tensor(image), size, mode="bilinear", antialias=True) * 2 - 1


def pack(latents: Tensor) -> Tensor:
    """(batch, 16, 2 rows, 2 columns) -> tokens (batch, rows * columns, 64), features (channel, y, x) (§3.8)."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `pack` for a (rows, columns) grid."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH)


def grid_ids(grid: tuple[int, int], offset: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Position ids (1, rows * columns, 3) float32: (0, row, column) + offset, row-major (§3.7)."""
    rows, columns = grid
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows, dtype=torch.float32)[:, None]
    ids[..., 2] = torch.arange(columns, dtype=torch.float32)[None]
    return (ids + torch.tensor(offset, dtype=torch.float32)).view(1, -1, 3)


def image_ids(grid: tuple[int, int], reference: tuple[int, int, int] | None) -> Tensor:
    """Ids of the target tokens and, unless `reference` is None, of as many reference tokens behind them."""
    target = grid_ids(grid)
    return target if reference is None else torch.cat((target, grid_ids(grid, reference)), dim=1)
