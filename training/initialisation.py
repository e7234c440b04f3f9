"""Weights that a transformer starts from, with the parts in place that it would find last: where to look."""

import math

import torch
from torch import nn

from step1x.engine.dit import DiT, DiTConfig, DoubleBlock, Modulation, QKNorm, SingleBlock

GATE = 0.4  # of a fresh block's branches
SCALE = 1.8  # of fresh QK norms
LOOKING = 2  # heads of a fresh block that look from a target token at the reference token of its place
POINTER = 3.0  # length of their constant in each of its channel pairs, against contents of deviation 0.5
FAR_PAIRS = (5, 4, 3)  # channel pairs of the row and column axes by which blocks measure the way from the origin
ANCHOR = 6.0  # length of the constant queries and keys that measure it, and the share of that pair in their square
ANCHOR_SHARE = 0.3


@torch.no_grad()
def init_dit(dit: DiT, reference_ids: tuple[int, int, int]) -> None:
    """Truncated-normal weights; modulations and the output start at zero.

    Gates start at GATE, not 0, so that all blocks learn from the first step. A few heads get constant queries and keys
    in the fastest channel pairs of each axis, turned against each other by the reference's offset: after rotation
    they agree most where a token's counterpart in the reference stands, so copying need not be found first.
    """
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    for module in dit.modules():
        if isinstance(module, QKNorm):
            nn.init.constant_(module.query_norm.scale, SCALE)
            nn.init.constant_(module.key_norm.scale, SCALE)
        elif isinstance(module, Modulation):
            nn.init.zeros_(module.lin.weight)
            module.lin.bias.unflatten(0, (-1, dit.config.hidden_size))[2::3] = GATE
        elif isinstance(module, DoubleBlock):
            _point_at_reference(module.img_attn.qkv, dit.config, reference_ids)
        elif isinstance(module, SingleBlock):
            _point_at_reference(module.linear1, dit.config, reference_ids)
    for index, block in enumerate(dit.double_blocks):
        assert isinstance(block, DoubleBlock)
        point_at_origin(block, dit.config, FAR_PAIRS[index % len(FAR_PAIRS)])
    for layer in (dit.final_layer.linear, dit.final_layer.adaLN_modulation[1]):
        assert isinstance(layer, nn.Linear)
        nn.init.zeros_(layer.weight)


def _point_at_reference(layer: nn.Linear, config: DiTConfig, reference_ids: tuple[int, int, int]) -> None:
    """Constant queries and keys of the first LOOKING heads of a layer whose first rows are q, k and v."""
    width, head = config.hidden_size, config.head_dim
    query, key = torch.zeros(head // 2, 2), torch.zeros(head // 2, 2)
    start = 0
    for axis, channels in enumerate(config.rope_axes):
        for pair in range(1 if axis == 0 else 2):
            angle = reference_ids[axis] * config.rope_theta ** (-2 * pair / channels)
            query[start + pair] = POINTER * torch.tensor([math.cos(angle), math.sin(angle)])
            key[start + pair, 0] = POINTER
        start += channels // 2
    heads = min(LOOKING, config.heads // 2)
    for offset, constant in ((0, query), (width, key)):
        rows = slice(offset, offset + heads * head)
        layer.weight[rows] *= 0.5
        layer.bias[rows] = constant.flatten().repeat(heads)


@torch.no_grad()
def point_at_origin(block: DoubleBlock, config: DiTConfig, pair: int) -> None:
    """Let the last two heads tell an image token its row and its column; nothing for a block of under four heads.

    All text rows stand at the origin. Constant image queries and constant text keys that share one slow channel pair
    of an axis make the attention to the text fall with the distance from the origin along that axis, against image
    keys that meet the query nowhere. Without this "top left" has no meaning until the network finds such a head.
    """
    width, head = config.hidden_size, config.head_dim
    if config.heads < 4:
        return
    idle = config.rope_axes[0] // 2 - 1  # a pair that hardly turns between target and reference
    for turn, axis in ((1, 1), (2, 2)):
        rows = torch.arange((config.heads - turn) * head, (config.heads - turn + 1) * head)
        query, text, image = (torch.zeros(head // 2, 2) for _ in range(3))
        near = sum(config.rope_axes[:axis]) // 2 + pair
        query[near, 0] = text[near, 0] = ANCHOR * ANCHOR_SHARE**0.5
        query[idle, 0] = text[idle, 1] = ANCHOR * (1 - ANCHOR_SHARE) ** 0.5
        image[idle, 1] = ANCHOR
        for layer, offset, constant in (
            (block.img_attn.qkv, 0, query),
            (block.img_attn.qkv, width, image),
            (block.txt_attn.qkv, width, text),
        ):
            layer.weight[offset + rows] *= 0.3
            layer.bias[offset + rows] = constant.flatten()
        block.txt_attn.qkv.bias[2 * width + rows] = ANCHOR / 2  # what such attention brings is told from image values
