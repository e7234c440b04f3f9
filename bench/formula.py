"""FLOPs in closed form (2 per multiply-add), to hold the counters against and to know floors without running.

The transformer's is model.md §3.13; the others follow from the layers in the same way. Norms, activations and
softmax are left out, as the counters leave them out.
"""

from typing import Any

from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiTConfig
from step1x.engine.vae import VAEConfig


def dit(config: DiTConfig, image_tokens: int, text_tokens: int, batch: int = 1) -> int:
    """One forward, connector and modulation included. image_tokens: target and reference together."""
    width, rows = config.hidden_size, image_tokens + text_tokens
    block = 2 * rows * width * (4 * width + 2 * config.mlp_hidden) + 4 * width * rows * rows
    ends = 2 * image_tokens * width * (config.in_channels + config.out_channels)
    ends += 2 * text_tokens * width * config.context_channels
    modulation = 2 * width * width * (12 * config.depth + 3 * config.depth_single + 2)
    embedders = 2 * width * (config.timestep_channels + config.pooled_channels + 2 * width)
    each = (config.depth + config.depth_single) * block + ends + modulation + embedders
    return batch * (each + connector(config.connector, text_tokens))


def connector(config: ConnectorConfig, text_tokens: int) -> int:
    width = config.hidden_size
    block = 2 * text_tokens * width * (4 * width + 2 * config.mlp_hidden) + 4 * width * text_tokens**2
    block += 2 * width * 2 * width
    embedders = 2 * width * (config.in_channels + config.timestep_channels + 2 * width)
    pooled = 2 * config.in_channels * config.pooled_channels
    return config.depth * block + 2 * text_tokens * config.in_channels * width + embedders + pooled


def _residual(inner: int, outer: int, cells: int) -> int:
    """A residual block: two 3x3 convolutions, and a 1x1 one where the width changes."""
    return 2 * cells * outer * (9 * inner + 9 * outer + (inner if inner != outer else 0))


def _middle(width: int, cells: int) -> int:
    return 2 * _residual(width, width, cells) + 8 * cells * width * width + 4 * width * cells * cells


def vae_encode(config: VAEConfig, width: int, height: int, batch: int = 1) -> int:
    channels, cells = config.channels, width * height
    total = 2 * 9 * cells * config.in_channels * channels[0]
    before = channels[0]
    for level, outer in enumerate(channels):
        total += _residual(before, outer, cells) + (config.res_blocks - 1) * _residual(outer, outer, cells)
        before = outer
        if level < len(channels) - 1:
            cells //= 4
            total += 2 * 9 * cells * outer * outer
    total += _middle(before, cells) + 2 * 9 * cells * before * 2 * config.z_channels
    return batch * total


def vae_decode(config: VAEConfig, width: int, height: int, batch: int = 1) -> int:
    channels, cells = config.channels, width * height // config.factor**2
    before = channels[-1]
    total = 2 * 9 * cells * config.z_channels * before + _middle(before, cells)
    for level, outer in reversed(list(enumerate(channels))):
        total += _residual(before, outer, cells) + config.res_blocks * _residual(outer, outer, cells)
        before = outer
        if level:
            cells *= 4
            total += 2 * 9 * cells * outer * outer
    return batch * (total + 2 * 9 * cells * before * config.in_channels)


def language_model(config: Any, tokens: int) -> int:
    """Qwen2.5-VL's language model without its head. config: the text_config of transformers."""
    width, heads = config.hidden_size, config.num_attention_heads
    kv = width * config.num_key_value_heads // heads
    layer = 2 * tokens * width * (2 * width + 2 * kv + 3 * config.intermediate_size) + 4 * width * tokens**2
    return config.num_hidden_layers * layer


def vision_tower(config: Any, rows: int, columns: int) -> int:
    """Qwen2.5-VL's vision tower on rows x columns merged cells. config: the vision_config of transformers."""
    width, merge = config.hidden_size, config.spatial_merge_size**2
    patches = rows * columns * merge
    linear = 2 * patches * width * (4 * width + 3 * config.intermediate_size)
    window = config.window_size // config.patch_size // config.spatial_merge_size
    whole = len(config.fullatt_block_indexes)
    windows = [
        (min(window, rows - row) * min(window, columns - column) * merge) ** 2
        for row in range(0, rows, window)
        for column in range(0, columns, window)
    ]
    attention = 4 * width * (whole * patches**2 + (config.depth - whole) * sum(windows))
    pixels = 3 * config.temporal_patch_size * config.patch_size**2
    merger = 2 * rows * columns * merge * width * (merge * width + config.out_hidden_size)
    return config.depth * linear + attention + 2 * patches * pixels * width + merger
