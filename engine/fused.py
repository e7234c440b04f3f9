"""The blocks of dit.py through the operations of kernels/: the same function in a sixth of the launches.

A residual connection, the next block's normalisation and its modulation are one operation; so are both norms, both
rotations and the layout of queries and keys; GELU writes where the next product reads. What an fp8 layer takes leaves
the operation before it as e4m3 values with their scales. On a CPU the operations run their references.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x.engine.dit import DiT, DoubleBlock, Modulations, QKNorm, Rope, SingleBlock, Step
from step1x.engine.kept import Active, Place, Rows8
from step1x.kernels.adaln import adaln_fp8_op, adaln_op
from step1x.kernels.attention import attention_op
from step1x.kernels.attention_backends import Attention
from step1x.kernels.gated_residual import gated_residual_adaln_fp8_op, gated_residual_adaln_op, gated_residual_op
from step1x.kernels.gelu_quant import gelu_join_op, gelu_quant_op
from step1x.kernels.launch import Op
from step1x.kernels.qk_norm_rope import qk_norm_rope_op, qk_norm_rope_scatter_op, qk_norm_rope_single_op
from step1x.quant.linear import QuantizedLinear, Rows, product_of_rows

Choose = Callable[[Op], Callable[..., Any]]  # what runs an operation: its kernel or its reference
Attend = Callable[[tuple[int, int] | None], Attention]  # of the keys that may carry a bias; None: any may
Pair = tuple[Tensor, Rows]  # rows (batch, tokens, width), and their modulated norm as the layer behind takes it


class Keys(NamedTuple):
    """What the rows of a block attend to."""

    attend: Attention
    bias: Tensor | None  # (batch, T + N)
    place: Place | None = None  # where keys and values are kept, if they are; else those of the given rows are all


class Feed(NamedTuple):
    """The operations before a product, whose results are what the layer takes."""

    adaln: Callable[..., Rows]
    residual_adaln: Callable[..., Pair]
    gelu_join: Callable[..., Rows]


Ahead = tuple[Tensor, Feed]  # of the next block: its modulation, and what feeds its first layer


def takes_fp8(layer: nn.Module) -> bool:
    return isinstance(layer, QuantizedLinear) and layer.scheme == "fp8"


def fp8_feed(choose: Choose) -> Feed:
    """The operations that quantise what they write."""
    residual_adaln = choose(gated_residual_adaln_fp8_op)

    def paired(*given: Any) -> Pair:
        rows, values, scales = residual_adaln(*given)
        return rows, (values, scales)

    return Feed(choose(adaln_fp8_op), paired, choose(gelu_quant_op))


class Fused:
    """Stands in for `DiT.velocity`. The `_block` methods are functions of tensors, so that they can be compiled."""

    def __init__(self, dit: DiT, choose: Choose = lambda op: op.call, attend: Attend | None = None) -> None:
        """attend: makes the attention for the keys that may carry a bias (default: `choose` of our operation)."""
        self.dit = dit
        attention = choose(attention_op)
        self._make = attend or (lambda biased: attention)
        self._attentions: dict[tuple[int, int] | None, Attention] = {}
        self.fp32 = dit.final_layer.fp32_norms
        self.heads = dit.config.heads
        self.residual = choose(gated_residual_op)
        self.plain = Feed(choose(adaln_op), choose(gated_residual_adaln_op), choose(gelu_join_op))
        self.fp8 = fp8_feed(choose) if any(map(takes_fp8, dit.modules())) else self.plain
        self.qk_norm_rope = choose(qk_norm_rope_op)
        self.qk_norm_rope_single = choose(qk_norm_rope_single_op)
        self.qk_norm_rope_scatter = choose(qk_norm_rope_scatter_op)
        self.double = list(cast("Iterable[DoubleBlock]", dit.double_blocks))
        self.single = list(cast("Iterable[SingleBlock]", dit.single_blocks))
        place = dit.device  # where the blocks themselves are need not be (residency.py)
        self.double_norms = [
            (norms(block.img_attn.norm).to(place), norms(block.txt_attn.norm).to(place)) for block in self.double
        ]
        self.single_norms = [norms(block.norm).to(place) for block in self.single]

    def feed(self, layer: nn.Module) -> Feed:
        """What makes the rows that a layer takes."""
        return self.fp8 if takes_fp8(layer) else self.plain

    def velocity(
        self, tokens: Tensor, step: Step, rope: Rope, kept: int | None = None, active: Active | None = None
    ) -> Tensor:
        """As `DiT.velocity`: (batch, kept or N, out_channels) at image tokens (batch, N, in_channels).

        active: tokens and rope are of these rows, which attend to what is kept of all, and replace their own there.
        """
        return self.final_block(self.blocks(tokens, step, rope, kept, active), step.mods.final)

    def blocks(
        self, tokens: Tensor, step: Step, rope: Rope, kept: int | None = None, active: Active | None = None
    ) -> Tensor:
        """As `velocity`, but the rows (batch, kept or N, width) behind all blocks, of which `final_block` makes it."""
        texts, mods, bias = step.text.shape[1], step.mods, None
        if step.bias is not None:
            others = tokens.shape[1] if active is None else active.kept.rows - texts
            bias = F.pad(step.bias.to(torch.promote_types(self.dit.dtype, torch.float32)), (0, others))
        keys = Keys(self._attention(None if step.biased is None else (texts - step.biased, texts)), bias)
        image = slice(texts, None if kept is None else texts + kept)
        # What goes from one function to the next has no name here: it would stay for as long as that runs.
        return self._single(self._double(tokens, step.text, mods, rope, keys, active), mods, rope, keys, image, active)

    def _heads(
        self, image: Tensor, text: Tensor | None, scales: tuple[Tensor, Tensor | None], rope: Rope, keys: Keys
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q of the rows whose products are given, k and v that they attend to."""
        place = keys.place
        if place is not None and isinstance(place.keys, Tensor):
            q = self.qk_norm_rope_scatter(image, text, *scales, *rope, self.heads, *place[:3])
            return q, place.keys, cast("Tensor", place.values)
        if text is None:  # v stays where the product left it
            both = image.shape[-1] // 3 * 2
            q, k = self.qk_norm_rope_single(image[..., :both], scales[0], *rope, self.heads)
            v = image[..., both:].unflatten(-1, (self.heads, -1)).transpose(1, 2)
        else:
            q, k, v = self.qk_norm_rope(image, text, *scales, *rope, self.heads)
        if place is None:
            return q, k, v
        stores = cast("Rows8", place.keys), cast("Rows8", place.values)
        for store, new in zip(stores, (k, v), strict=True):
            store.write(place.joint, new)
        return q, stores[0].read(q.dtype), stores[1].read(q.dtype)

    def _attention(self, biased: tuple[int, int] | None) -> Attention:
        """The same object for the same keys, so that compiled blocks know it again."""
        if biased not in self._attentions:
            self._attentions[biased] = self._make(biased)
        return self._attentions[biased]

    def _double(
        self, tokens: Tensor, txt: Tensor, mods: Modulations, rope: Rope, keys: Keys, active: Active | None
    ) -> Tensor:
        """Text and image rows (batch, T + N, width) behind all double blocks, of image tokens (batch, N, channels)."""
        img = self.dit.img_in(tokens.to(self.dit.dtype))
        if not self.double:
            return torch.cat((txt, img), dim=1)
        firsts = [
            ((image, self.feed(block.img_attn.qkv)), (text, self.feed(block.txt_attn.qkv)))
            for block, (image, text) in zip(self.double, mods.double, strict=True)
        ]
        image, text = self.enter(img, *firsts[0][0]), self.enter(txt, *firsts[0][1])
        del img
        for index, (block, scales) in enumerate(zip(self.double, self.double_norms, strict=True)):
            ahead = firsts[index + 1] if index + 1 < len(self.double) else (None, None)
            if active is not None:
                keys = keys._replace(place=active.place(index, joined=False))
            with self.dit.present(block):
                image, text = self.double_block(block, scales, image, text, mods.double[index], ahead, rope, keys)
        return torch.cat((text[0], image[0]), dim=1)

    def _single(
        self, rows: Tensor, mods: Modulations, rope: Rope, keys: Keys, image: slice, active: Active | None
    ) -> Tensor:
        """Rows `image` behind all single blocks; the last one computes no others."""
        if not self.single:
            return rows[:, image]
        firsts = [(mod, self.feed(block.linear1)) for block, mod in zip(self.single, mods.single, strict=True)]
        pair = self.enter(rows, *firsts[0])
        del rows
        for index, (block, scales) in enumerate(zip(self.single[:-1], self.single_norms, strict=False)):
            if active is not None:
                keys = keys._replace(place=active.place(len(self.double) + index, joined=True))
            with self.dit.present(block):
                pair = self.single_block(block, scales, pair, mods.single[index], firsts[index + 1], rope, keys)
        if active is not None:
            keys = keys._replace(place=active.place(-1, joined=True))
        with self.dit.present(self.single[-1]):
            return self.last_block(self.single[-1], self.single_norms[-1], pair, mods.single[-1], rope, keys, image)

    def enter(self, rows: Tensor, mod: Tensor, feed: Feed) -> Pair:
        """Rows with the first norm of a block, whose modulation begins with shift and scale."""
        width = rows.shape[-1]
        return rows, feed.adaln(rows, mod[..., :width], mod[..., width : 2 * width], self.fp32)

    def double_block(
        self,
        block: DoubleBlock,
        scales: tuple[Tensor, Tensor],
        image: Pair,
        text: Pair,
        mods: tuple[Tensor, Tensor],
        ahead: tuple[Ahead, Ahead] | tuple[None, None],
        rope: Rope,
        keys: Keys,
    ) -> tuple[Pair, Pair]:
        """One double block, and the norm before the next one. Where none follows, the rows stand in its place."""
        q, k, v = self._heads(block.img_attn.qkv(image[1]), block.txt_attn.qkv(text[1]), scales, rope, keys)
        attended = keys.attend(q, k, v, keys.bias)
        txt, img = attended.split((text[0].shape[1], image[0].shape[1]), dim=1)
        image = self._finish(image[0], block.img_attn.proj(img), block.img_mlp, mods[0], ahead[0])
        text = self._finish(text[0], block.txt_attn.proj(txt), block.txt_mlp, mods[1], ahead[1])
        return image, text

    def _finish(self, rows: Tensor, change: Tensor, mlp: Any, mod: Tensor, ahead: Ahead | None) -> Pair:
        """Both residual connections of a stream, the MLP between them."""
        _, _, gate, shift, scale, second = mod.chunk(6, dim=-1)
        rows, normed = self.feed(mlp[0]).residual_adaln(rows, gate, change, False, shift, scale, self.fp32)
        change = mlp[2](self.feed(mlp[2]).gelu_join(None, mlp[0](normed)))
        return self._leave(rows, second, change, self.fp32, ahead)

    def _leave(self, rows: Tensor, gate: Tensor, change: Tensor, once: bool, ahead: Ahead | None) -> Pair:
        """rows + gate * change, and its norm under the modulation of the block ahead, if there is one."""
        if ahead is None:
            rows = self.residual(rows, gate, change, once)
            return rows, rows
        mod, feed = ahead
        width = rows.shape[-1]
        shift, scale = mod[..., :width], mod[..., width : 2 * width]
        return feed.residual_adaln(rows, gate, change, once, shift, scale, self.fp32)

    def single_block(
        self,
        block: SingleBlock,
        scales: Tensor,
        pair: Pair,
        mod: Tensor,
        ahead: Ahead,
        rope: Rope,
        keys: Keys,
    ) -> Pair:
        """One single block, and the norm before the next one."""
        wide = block.linear1(pair[1])
        qkv, hidden = wide.split(block.split, dim=-1)
        q, k, v = self._heads(qkv, None, (scales, None), rope, keys)
        attended = keys.attend(q, k, v, keys.bias)
        del q, k, v  # what follows is where a step needs most memory
        joined = self.feed(block.linear2).gelu_join(attended, hidden)
        del wide, qkv, hidden, attended
        return self._leave(pair[0], mod.chunk(3, dim=-1)[2], block.linear2(joined), False, ahead)

    def last_block(
        self,
        block: SingleBlock,
        scales: Tensor,
        pair: Pair,
        mod: Tensor,
        rope: Rope,
        keys: Keys,
        image: slice,
    ) -> Tensor:
        """The last single block, for the rows `image`: all rows are keys and values, but only those are queries."""
        rows, normed = pair
        outer = block.split[0]  # rows of the weights that make q, k and v
        qkv = product_of_rows(block.linear1, normed, slice(outer))
        # The scales are copied: a view of them may begin anywhere, products on CUDA want aligned operands.
        kept = normed[:, image] if isinstance(normed, Tensor) else (normed[0][:, image], normed[1][:, image].clone())
        hidden = product_of_rows(block.linear1, kept, slice(outer, None))
        q, k, v = self._heads(qkv, None, (scales, None), rope, keys)
        joined = self.feed(block.linear2).gelu_join(keys.attend(q[:, :, image], k, v, keys.bias), hidden)
        change = block.linear2(joined)
        return self._leave(rows[:, image], mod.chunk(3, dim=-1)[2], change, False, None)[0]

    def final_block(self, rows: Tensor, mod: Tensor) -> Tensor:
        """Velocity at the rows behind all blocks."""
        return self.dit.final_layer.linear(self.enter(rows, mod, self.plain)[1])


def norms(norm: QKNorm) -> Tensor:
    """(2, head_dim): scales of queries and of keys."""
    return torch.stack((norm.query_norm.scale, norm.key_norm.scale))
