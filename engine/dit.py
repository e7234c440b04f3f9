"""The diffusion transformer of Step1X-Edit, in plain PyTorch (model.md §3).

The forward is split by what it depends on:

    prepare(text)            the request: pooled vector and the connector's constant rows
    rope(ids)                the sizes: cosines and sines of all positions
    condition(text, t)       the step: context rows and every modulation vector
    denoise(tokens, ...)     the latents: the 19 + 38 blocks

`forward` is the four in a row. Parameter names are the official checkpoint's.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x.engine.connector import Connector, ConnectorConfig, PreparedText, sinusoid, wide
from step1x.quant.linear import product_of_rows

Rope = tuple[Tensor, Tensor]  # cosines and sines, (batch or 1, 1, tokens, head_dim / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig:
    """Sizes of the transformer; read from the checkpoint, so there are no defaults."""

    in_channels: int
    out_channels: int
    hidden_size: int
    heads: int
    depth: int
    depth_single: int
    mlp_hidden: int
    context_channels: int  # width of the connector's rows
    pooled_channels: int
    timestep_channels: int
    rope_axes: tuple[int, ...]  # rotary channels of each position axis, together head_dim
    rope_theta: float
    connector: ConnectorConfig
    text_token_mapping: bool  # v1.2

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(f"width {self.hidden_size} is no multiple of {self.heads} heads")
        if sum(self.rope_axes) != self.head_dim or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"rope axes {self.rope_axes} must be even and add up to head_dim {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


def rope_tables(ids: Tensor, axes: tuple[int, ...], theta: float, dtype: torch.dtype = torch.float32) -> Rope:
    """Cosines and sines of the rotary position embedding (model.md §3.6).

    ids: (batch, tokens, axes), any real positions. Returns two tensors (batch, 1, tokens, sum(axes) / 2).
    """
    angles = []
    for axis, width in enumerate(axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(ids[..., axis, None].double() * theta**-exponents)
    angle = torch.cat(angles, dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs of x (batch, heads, tokens, head_dim); computed in float32 or wider."""
    cos, sin = rope
    even, odd = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2).to(x.dtype)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: `time_in` and `vector_in`."""

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_channels, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def project(vec: Tensor, linear: nn.Linear) -> Tensor:
    """(batch, 1, out) of SiLU(vec). The weights may lie in host memory: they are copied for the call."""
    if linear.weight.device == vec.device:
        return linear(F.silu(vec))[:, None]
    held = [*linear.named_parameters(), *linear.named_buffers()]
    copied = {name: part.to(vec.device, non_blocking=True) for name, part in held}
    return torch.func.functional_call(linear, copied, F.silu(vec))[:, None]


class Modulation(nn.Module):
    """vec -> `chunks` vectors (batch, 1, chunks * width) that shift, scale and gate a block."""

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, vec: Tensor) -> Tensor:
        return project(vec, self.lin)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, fp32: bool) -> Tensor:
    """(1 + scale) * LayerNorm(x) + shift, no affine, eps 1e-6; in x's dtype or, with `fp32`, rounded once."""
    if not fp32:
        return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift
    normed = F.layer_norm(wide(x), x.shape[-1:], eps=1e-6)
    return ((1 + scale) * normed + shift).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = wide(x)
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)
        return (normed * self.scale.to(x32.dtype)).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """qkv: (batch, tokens, 3 * width) -> normed q, normed k, v, each (batch, heads, tokens, head_dim)."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


def attention(q: Tensor, k: Tensor, v: Tensor, rope: Rope, bias: Tensor | None = None) -> Tensor:
    """Non-causal attention with rotary positions; returns (batch, tokens, width).

    bias (batch, 1, 1, tokens) is added to the logits of each token as a key.
    """
    return attend(apply_rope(q, rope), apply_rope(k, rope), v, bias)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of (batch, heads, tokens, head_dim) as (batch, queries, width)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm = QKNorm(hidden_size // heads)
        self.proj = nn.Linear(hidden_size, hidden_size)


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


class DoubleBlock(nn.Module):
    """Text and image streams with weights of their own and one joint attention (§3.3)."""

    def __init__(self, config: DiTConfig, fp32_norms: bool) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.heads
        self.heads = heads
        self.fp32_norms = fp32_norms
        self.img_mod = Modulation(width, 6)
        self.img_attn = SelfAttention(width, heads)
        self.img_mlp = mlp(width, config.mlp_hidden)
        self.txt_mod = Modulation(width, 6)
        self.txt_attn = SelfAttention(width, heads)
        self.txt_mlp = mlp(width, config.mlp_hidden)

    def condition(self, vec: Tensor) -> tuple[Tensor, Tensor]:
        return self.img_mod(vec), self.txt_mod(vec)

    def _qkv(self, x: Tensor, attn: SelfAttention, mod: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        return attn.norm(attn.qkv(modulate(x, mod[0], mod[1], self.fp32_norms)), self.heads)

    def _finish(
        self, x: Tensor, attended: Tensor, stream: tuple[nn.Module, nn.Module], mod: tuple[Tensor, ...]
    ) -> Tensor:
        proj, mlp_of_stream = stream
        x = x + mod[2] * proj(attended)
        y = mlp_of_stream(modulate(x, mod[3], mod[4], self.fp32_norms))
        # The official code fuses only this second residual, with one rounding (§3.14).
        return torch.addcmul(x, mod[5], y) if self.fp32_norms else x + mod[5] * y

    def forward(
        self, img: Tensor, txt: Tensor, mods: tuple[Tensor, Tensor], rope: Rope, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = mods[0].chunk(6, dim=-1), mods[1].chunk(6, dim=-1)
        img_qkv = self._qkv(img, self.img_attn, img_mod)
        txt_qkv = self._qkv(txt, self.txt_attn, txt_mod)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        attended = attention(q, k, v, rope, bias)
        txt_out, img_out = attended.split((txt.shape[1], img.shape[1]), dim=1)
        img = self._finish(img, img_out, (self.img_attn.proj, self.img_mlp), img_mod)
        txt = self._finish(txt, txt_out, (self.txt_attn.proj, self.txt_mlp), txt_mod)
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP in parallel on text and image rows together (§3.4)."""

    def __init__(self, config: DiTConfig, fp32_norms: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.split = (3 * width, config.mlp_hidden)
        self.fp32_norms = fp32_norms
        self.linear1 = nn.Linear(width, sum(self.split))
        self.linear2 = nn.Linear(width + config.mlp_hidden, width)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, mod: Tensor, rope: Rope, bias: Tensor | None = None) -> Tensor:
        shift, scale, gate = mod.chunk(3, dim=-1)
        qkv, hidden = self.linear1(modulate(x, shift, scale, self.fp32_norms)).split(self.split, dim=-1)
        q, k, v = self.norm(qkv, self.heads)
        attended = attention(q, k, v, rope, bias)
        return x + gate * self.linear2(torch.cat((attended, F.gelu(hidden, approximate="tanh")), dim=-1))

    def last(self, x: Tensor, mod: Tensor, rope: Rope, kept: slice, bias: Tensor | None = None) -> Tensor:
        """`forward`, of the rows `kept` only: all rows are keys and values, but only those are queries."""
        shift, scale, gate = mod.chunk(3, dim=-1)
        normed = modulate(x, shift, scale, self.fp32_norms)
        width = x.shape[-1]
        k, v = product_of_rows(self.linear1, normed, slice(width, 3 * width)).chunk(2, dim=-1)
        q = product_of_rows(self.linear1, normed[:, kept], slice(width))
        hidden = product_of_rows(self.linear1, normed[:, kept], slice(3 * width, None))
        q, k, v = (rows.unflatten(-1, (self.heads, -1)).transpose(1, 2) for rows in (q, k, v))
        q, k = self.norm.query_norm(q), self.norm.key_norm(k)
        cos, sin = (table[..., kept, :] for table in rope)
        attended = attend(apply_rope(q, (cos, sin)), apply_rope(k, rope), v, bias)
        return x[:, kept] + gate * self.linear2(torch.cat((attended, F.gelu(hidden, approximate="tanh")), dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig, fp32_norms: bool) -> None:
        super().__init__()
        self.fp32_norms = fp32_norms
        self.linear = nn.Linear(config.hidden_size, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def condition(self, vec: Tensor) -> Tensor:
        return project(vec, cast("nn.Linear", self.adaLN_modulation[1]))

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        shift, scale = mod.chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale, self.fp32_norms))


@dataclass(frozen=True, slots=True)
class Text:
    """Conditioning tokens of a batch, as the text model left them.

    tokens (batch, T, Q); mask (batch, T), non-zero where valid; for v1.2 also the input embeddings (batch, T, Q)
    and the mask (batch, T) of quoted characters. bias (batch, T): added to the attention logits of each row as a key
    (algebra.py); None: nothing is. biased: how many of the last rows may have one other than zero; None: some of them
    are masked out by -inf.
    """

    tokens: Tensor
    mask: Tensor
    embeds: Tensor | None = None
    quoted: Tensor | None = None
    bias: Tensor | None = None
    biased: int | None = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What is constant over the steps: the connector's prepared rows and the token mapping's share."""

    text: PreparedText
    mapped: Tensor | None  # (batch, T, context width), v1.2
    bias: Tensor | None = None  # (batch, T): `Text.bias`
    biased: int | None = 0  # `Text.biased`

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.text.pooled.shape[0]


@dataclass(frozen=True, slots=True)
class Modulations:
    """Every vector that shifts, scales and gates."""

    double: list[tuple[Tensor, Tensor]]  # (image, text) of each block, (batch, 1, 6 * width)
    single: list[Tensor]  # (batch, 1, 3 * width)
    final: Tensor  # (batch, 1, 2 * width)

    def split(self, sizes: list[int]) -> "list[Modulations]":
        """Those of stretches of the batch; views."""
        double = [list(zip(image.split(sizes), text.split(sizes), strict=True)) for image, text in self.double]
        single = [vectors.split(sizes) for vectors in self.single]
        return [
            Modulations([pairs[index] for pairs in double], [vectors[index] for vectors in single], final)
            for index, final in enumerate(self.final.split(sizes))
        ]


def is_modulation(key: str) -> bool:
    """Whether a parameter of the transformer is used for nothing but modulations: 3.23 of the released 12.4 billion."""
    return not key.startswith("connector.") and any(
        part in key for part in ("img_mod.", "txt_mod.", ".modulation.", ".adaLN_modulation.")
    )


def is_of_block(key: str) -> bool:
    """Whether a parameter of the transformer is used where its blocks run."""
    return key.startswith(("double_blocks.", "single_blocks.")) and not is_modulation(key)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step needs besides the latents."""

    text: Tensor  # (batch, T, width): context rows
    mods: Modulations
    bias: Tensor | None = None  # (batch, T): `Text.bias`
    biased: int | None = 0  # `Text.biased`


def here(part: object) -> AbstractContextManager[None]:
    """What brings the weights of a part of a model where it runs, if they are always there (residency.py)."""
    return nullcontext()


class DiT(nn.Module):
    """Velocity of the flow at noisy tokens. `fp32_norms` follows the official autocast dtype flow (§3.14).

    A block runs within `present(block)`.
    """

    present: Callable[[nn.Module], AbstractContextManager[None]]

    def __init__(self, config: DiTConfig, fp32_norms: bool = True) -> None:
        super().__init__()
        self.config = config
        self.present = here
        width = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, width)
        self.time_in = Embedder(config.timestep_channels, width)
        self.vector_in = Embedder(config.pooled_channels, width)
        self.txt_in = nn.Linear(config.context_channels, width)
        self.connector = Connector(config.connector)
        if config.text_token_mapping:
            self.text_token_mapping = nn.Linear(config.connector.in_channels, config.context_channels)
        self.double_blocks = nn.ModuleList(DoubleBlock(config, fp32_norms) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config, fp32_norms) for _ in range(config.depth_single))
        self.final_layer = FinalLayer(config, fp32_norms)

    @property
    def dtype(self) -> torch.dtype:
        return self.img_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.img_in.weight.device

    def rope(self, text_ids: Tensor, image_ids: Tensor) -> Rope:
        """Rotary tables of text rows, then image tokens. ids: (batch or 1, tokens, 3)."""
        ids = torch.cat((text_ids, image_ids), dim=1)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return rope_tables(ids, self.config.rope_axes, self.config.rope_theta, dtype)

    def prepare(self, text: Text) -> Request:
        """Everything that depends on the text but not on the step."""
        mapped = None
        if self.config.text_token_mapping:
            if text.embeds is None or text.quoted is None:
                raise ValueError("this model maps text embeddings (v1.2): embeds and quoted are needed")
            mapped = self.text_token_mapping(text.embeds.to(self.dtype))
            mapped = mapped * text.quoted[:, :, None].to(mapped.dtype)
        return Request(self.connector.prepare(text.tokens.to(self.dtype), text.mask), mapped, text.bias, text.biased)

    def vector(self, request: Request, timestep: Tensor) -> Tensor:
        """(batch, width), of which all modulations are made. timestep: (batch,) in [0, 1]."""
        vec = self.time_in(sinusoid(timestep * 1000, self.config.timestep_channels).to(self.dtype))
        return vec + self.vector_in(request.text.pooled)

    def modulate(self, vec: Tensor) -> Modulations:
        """Every block's modulations, layer by layer."""
        return Modulations(
            [block.condition(vec) for block in cast("Iterable[DoubleBlock]", self.double_blocks)],
            [block.modulation(vec) for block in cast("Iterable[SingleBlock]", self.single_blocks)],
            self.final_layer.condition(vec),
        )

    def context(self, request: Request, timestep: Tensor) -> Tensor:
        """Text rows (batch, T, width) of the first block. timestep: (batch,) in [0, 1]."""
        context = self.connector(request.text, timestep)
        if request.mapped is not None:
            context = context + request.mapped
        return self.txt_in(context)

    def condition(self, request: Request, timestep: Tensor) -> Step:
        """Everything that depends on the step but not on the latents. timestep: (batch,) in [0, 1]."""
        mods = self.modulate(self.vector(request, timestep))
        return Step(self.context(request, timestep), mods, request.bias, request.biased)

    def transform(self, img: Tensor, step: Step, rope: Rope, kept: int | None = None) -> Tensor:
        """Image rows (batch, N, width) through all blocks; `img` is the output of `img_in`.

        kept: only the first so many rows come out, and the last block computes no others.
        """
        txt, bias = step.text, None
        texts = txt.shape[1]
        if step.bias is not None:
            bias = F.pad(step.bias.to(img.dtype), (0, img.shape[1]))[:, None, None]
        for block, mods in zip(self.double_blocks, step.mods.double, strict=True):
            with self.present(block):
                img, txt = block(img, txt, mods, rope, bias)
        rows = torch.cat((txt, img), dim=1)
        image = slice(texts, None if kept is None else texts + kept)
        singles = list(zip(cast("Iterable[SingleBlock]", self.single_blocks), step.mods.single, strict=True))
        for block, mod in singles if kept is None else singles[:-1]:
            with self.present(block):
                rows = block(rows, mod, rope, bias)
        if kept is None or not singles:
            return rows[:, image]
        block, mod = singles[-1]
        with self.present(block):
            return block.last(rows, mod, rope, image, bias)

    def velocity(self, tokens: Tensor, step: Step, rope: Rope, kept: int | None = None) -> Tensor:
        """Velocity (batch, N, out_channels) at image tokens (batch, N, in_channels), target then reference.

        kept: of the first so many tokens only.
        """
        rows = self.transform(self.img_in(tokens.to(self.dtype)), step, rope, kept)
        return self.final_layer(rows, step.mods.final)

    def forward(self, tokens: Tensor, text: Text, timestep: Tensor, rope: Rope) -> Tensor:
        """One whole evaluation: prepare, condition, denoise."""
        return self.velocity(tokens, self.condition(self.prepare(text), timestep), rope)
