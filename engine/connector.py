"""Text tokens of Qwen2.5-VL -> context rows and pooled vector of the DiT (model.md §2).

Two calls: `prepare` computes what depends on the request alone, `forward` what depends on the step.
Parameter names are the checkpoint's (`connector.*`), the same in both layouts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that norms and sums are computed in: float32 for half precision, else its own."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def sinusoid(t: Tensor, width: int = 256) -> Tensor:
    """Timestep embedding [cos(t f), sin(t f)] with f_k = 10000^(-k / (width/2)) (model.md §2).

    t: (batch,), in thousandths of the schedule (0..1000). Returns (batch, width), float32 or t's wider dtype.
    """
    t = wide(t)
    half = width // 2
    exponents = torch.arange(half, dtype=t.dtype, device=t.device) / half
    angles = t[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorConfig:
    """Sizes of the connector; read from the checkpoint, so there are no defaults."""

    in_channels: int  # width of the text model
    hidden_size: int
    heads: int
    depth: int
    mlp_hidden: int
    timestep_channels: int
    pooled_channels: int
    has_scale_factor: bool  # v1.0 only

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(f"connector width {self.hidden_size} is no multiple of its {self.heads} heads")


class TimestepEmbedder(nn.Module):
    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.mlp = nn.Sequential(nn.Linear(in_channels, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        weight: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        return self.mlp(sinusoid(t * 1000, self.in_channels).to(weight.dtype))


class ContextEmbedder(nn.Module):
    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, mean: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(mean)))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class RefinerBlock(nn.Module):
    """Self-attention and MLP, both gated by the step: h + g1 * attention(h), h + g2 * mlp(h)."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn_qkv = nn.Linear(width, 3 * width)
        self.self_attn_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, config.mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def attention(self, h: Tensor, visible: Tensor) -> Tensor:
        """The branch before its gate. h: (batch, tokens, width); visible: (batch, 1, tokens, tokens) bool."""
        q, k, v = self.self_attn_qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.self_attn_proj(out.transpose(1, 2).flatten(2))

    def forward(self, h: Tensor, visible: Tensor, c: Tensor, attention: Tensor | None) -> Tensor:
        gate1, gate2 = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        if attention is None:
            attention = self.attention(h, visible)
        h = h + gate1 * attention
        return h + gate2 * self.mlp(self.norm2(h))


class TokenRefiner(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.depth))


class Refiner(nn.Module):
    """The part the checkpoint calls `connector.S`."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.timestep_channels, config.hidden_size)
        self.c_embedder = ContextEmbedder(config.in_channels, config.hidden_size)
        self.individual_token_refiner = TokenRefiner(config)


@dataclass(frozen=True, slots=True)
class PreparedText:
    """What of the connector is constant over the steps of one request."""

    pooled: Tensor  # (batch, pooled width): y of model.md §2
    context: Tensor  # (batch, width): c_embedder(mean)
    rows: Tensor  # (batch, tokens, width): h before block 0
    visible: Tensor  # (batch, 1, tokens, tokens) bool: who attends to whom
    attention: Tensor | None  # (batch, tokens, width): attention branch of block 0 before its gate


def visible_pairs(mask: Tensor) -> Tensor:
    """Attention mask of the refiner: valid rows see valid columns; column 0 is seen by every row (§2).

    mask: (batch, tokens), non-zero where valid. Returns (batch, 1, tokens, tokens) bool.
    """
    valid = mask.bool()
    pairs = valid[:, :, None] & valid[:, None, :]
    pairs[:, :, 0] = True
    return pairs[:, None]


class Connector(nn.Module):
    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        if config.has_scale_factor:
            self.scale_factor = nn.Parameter(torch.full((1,), -0.91))
        self.global_proj_out = nn.Linear(config.in_channels, config.pooled_channels)
        self.S = Refiner(config)

    def prepare(self, tokens: Tensor, mask: Tensor) -> PreparedText:
        """The step-invariant part.

        tokens: (batch, tokens, in_channels); mask: (batch, tokens), non-zero where valid, at least one a row.
        """
        weights = mask[:, :, None].to(wide(tokens).dtype)
        mean = (wide(tokens) * weights).sum(1) / weights.sum(1)
        scaled = mean * (1 + self.scale_factor.to(mean.dtype)) if self.config.has_scale_factor else mean
        dtype = self.global_proj_out.weight.dtype
        rows = self.S.input_embedder(tokens.to(dtype))
        visible = visible_pairs(mask)
        blocks = list(cast("Iterable[RefinerBlock]", self.S.individual_token_refiner.blocks))
        first = blocks[0].attention(rows, visible) if blocks else None
        return PreparedText(
            pooled=self.global_proj_out(scaled.to(dtype)),
            context=self.S.c_embedder(mean.to(dtype)),
            rows=rows,
            visible=visible,
            attention=first,
        )

    def forward(self, text: PreparedText, timestep: Tensor) -> Tensor:
        """Context rows (batch, tokens, width) at `timestep` (batch,) in [0, 1]."""
        c = self.S.t_embedder(timestep) + text.context
        rows, attention = text.rows, text.attention
        for block in self.S.individual_token_refiner.blocks:
            rows, attention = block(rows, text.visible, c, attention), None
        return rows
