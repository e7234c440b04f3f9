"""The FLUX.1 autoencoder (model.md §4). Parameter names are the official checkpoint's.

Beside `forward`, modules have `strips`: the same function, strip by strip (strips.py). It may write into its input.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x.engine import strips
from step1x.engine.connector import wide


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """Sizes of the autoencoder; read from the checkpoint or its config, so there are no defaults."""

    in_channels: int
    channels: tuple[int, ...]  # width of each level; each level but the last halves the picture
    res_blocks: int  # in the encoder; the decoder has one more
    z_channels: int
    groups: int
    scale_factor: float
    shift_factor: float

    def __post_init__(self) -> None:
        if any(width % self.groups for width in self.channels):
            raise ValueError(f"widths {self.channels} are no multiples of {self.groups} groups")

    @property
    def factor(self) -> int:
        """Pixels per latent cell on a side."""
        return 2 ** (len(self.channels) - 1)


def norm(groups: int, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_width: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(groups, in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.norm2 = norm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_width == width else nn.Conv2d(in_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h

    def strips(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        h = strips.gathered(strips.convolved(self.conv1, strips.activated(self.norm1, x), height), height)
        change = strips.convolved(self.conv2, strips.activated(self.norm2, h), height)
        summed = ((rows, self.nin_shortcut(x[:, :, rows]) + strip) for rows, strip in change)
        width = self.conv2.out_channels
        return strips.gathered(summed, height, x[:, :width] if width <= x.shape[1] else None)


class AttnBlock(nn.Module):
    """Single-head attention over all cells; q, k, v and proj_out are 1x1 convolutions."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(groups, width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # Channels side by side: else attention takes its slow way and writes out all logits, 1 GB at 1024 x 1024.
        q, k, v = (conv(h).flatten(2).transpose(1, 2).contiguous()[:, None] for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros right and bottom only

    def strips(self, x: Tensor) -> Tensor:
        height = x.shape[2] // 2
        parts = ((slice(top, end), self.forward_rows(x, top, end)) for top, end in strips.spans(height))
        return strips.gathered(parts, height)

    def forward_rows(self, x: Tensor, top: int, end: int) -> Tensor:
        """Rows of the result."""
        part = x[:, :, 2 * top : 2 * end + 1]
        return self.conv(F.pad(part, (0, 1, 0, 2 * (end - top) + 1 - part.shape[2])))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def strips(self, x: Tensor) -> Tensor:
        height = 2 * x.shape[2]
        return strips.gathered(strips.convolved(self.conv, strips.doubled(x), height), height)


class Level(nn.Module):
    """The residual blocks of one resolution, and the change to the next."""

    def __init__(self, in_width: int, width: int, blocks: int, groups: int) -> None:
        super().__init__()
        widths = [in_width] + [width] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x

    def strips(self, x: Tensor) -> Tensor:
        for block in self.block:
            assert isinstance(block, ResnetBlock)
            x = block.strips(x)
        return x


class DownLevel(Level):
    def __init__(self, in_width: int, width: int, blocks: int, groups: int) -> None:
        super().__init__(in_width, width, blocks, groups)
        self.downsample = Downsample(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))

    def strips(self, x: Tensor) -> Tensor:
        return self.downsample.strips(super().strips(x))


class UpLevel(Level):
    def __init__(self, in_width: int, width: int, blocks: int, groups: int) -> None:
        super().__init__(in_width, width, blocks, groups)
        self.upsample = Upsample(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))

    def strips(self, x: Tensor) -> Tensor:
        return self.upsample.strips(super().strips(x))


class Mid(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = AttnBlock(width, groups)
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        kinds = [DownLevel] * (len(widths) - 1) + [Level]
        ins = (widths[0], *widths[:-1])
        self.down = nn.ModuleList(
            kind(a, b, config.res_blocks, groups) for kind, a, b in zip(kinds, ins, widths, strict=True)
        )
        self.mid = Mid(widths[-1], groups)
        self.norm_out = norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))

    def strips(self, x: Tensor) -> Tensor:
        x = strips.gathered(strips.convolved(self.conv_in, strips.rows_of(x), x.shape[2]), x.shape[2])
        for level in self.down:
            assert isinstance(level, Level)
            x = level.strips(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # small: an eighth of the picture's sides


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], groups)
        # Level i runs at 1 / 2^i of the picture; the last one runs first.
        kinds = [Level] + [UpLevel] * (len(widths) - 1)
        ins = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(
            kind(a, b, config.res_blocks + 1, groups) for kind, a, b in zip(kinds, ins, widths, strict=True)
        )
        self.norm_out = norm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            z = level(z)
        return self.conv_out(F.silu(self.norm_out(z)))

    def strips(self, z: Tensor) -> Tensor:
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            assert isinstance(level, Level)
            z = level.strips(z)
        return strips.gathered(
            strips.convolved(self.conv_out, strips.activated(self.norm_out, z), z.shape[2]), z.shape[2]
        )


class VAE(nn.Module):
    """strip_pixels: larger pictures than this run in strips; None: none do. Strips need no gradients."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.strip_pixels: int | None = None
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    def encode(self, image: Tensor, noise: Tensor | None = None, clamp_logvar: bool = False) -> Tensor:
        """Latents (batch, z_channels, h/factor, w/factor) of an image (batch, 3, h, w) in [-1, 1].

        A sample of the posterior, mean + exp(logvar / 2) * noise, or its mean when `noise` is None; then
        shifted and scaled. `clamp_logvar` limits the log variance to [-30, 20] as diffusers does.
        """
        run = self.encoder.strips if self.in_strips(image.shape[2] * image.shape[3]) else self.encoder
        mean, logvar = run(image.to(self.dtype)).chunk(2, dim=1)
        if noise is not None:
            logvar = logvar.clamp(-30.0, 20.0) if clamp_logvar else logvar
            mean = mean + torch.exp(0.5 * wide(logvar)) * noise
        return (self.config.scale_factor * (mean - self.config.shift_factor)).to(image.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Image (batch, 3, h, w), nominally in [-1, 1], of shifted and scaled latents."""
        z = latents / self.config.scale_factor + self.config.shift_factor
        run = self.decoder.strips if self.in_strips(z.shape[2] * z.shape[3] * self.config.factor**2) else self.decoder
        return run(z.to(self.dtype))

    def in_strips(self, pixels: int) -> bool:
        """Whether a picture of so many pixels goes through in strips."""
        return self.strip_pixels is not None and pixels > self.strip_pixels
