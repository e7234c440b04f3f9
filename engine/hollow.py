"""Models without their weights: what sizes they have, and modules of these sizes that hold nothing.

For what is planned (planner.py), counted or timed (bench/) without a checkpoint.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from step1x.engine.dit import DiT, DiTConfig, Text
from step1x.engine.qwen import hollow_model
from step1x.engine.text import Conditioning
from step1x.engine.vae import VAE, VAEConfig
from step1x.engine.variants import Variant

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """All that is to be known of a model to plan it."""

    name: str
    variant: Variant
    dit: DiTConfig
    vae: VAEConfig
    qwen: str  # JSON of the keywords of transformers' Qwen2_5_VLConfig


def hollow_dit(config: DiTConfig, fp32_norms: bool = True) -> DiT:
    """A transformer with its connector on the meta device."""
    with torch.device("meta"):
        return DiT(config, fp32_norms)


def hollow_vae(config: VAEConfig) -> VAE:
    """An autoencoder on the meta device."""
    with torch.device("meta"):
        return VAE(config)


def hollow_qwen(values: dict[str, Any]) -> "Qwen2_5_VLModel":
    """Vision tower and language model, without the head, on the meta device. values: of their Qwen2_5_VLConfig."""
    from transformers import Qwen2_5_VLConfig

    return hollow_model(Qwen2_5_VLConfig(**values))


def instruction(valid: int, row: Variant, dit: DiT) -> Conditioning:
    """An encoded instruction of so many valid rows as `Conditioner.encode` returns it, all zeros."""
    rows, width = row.text_tokens if row.pad_text else valid, dit.config.connector.in_channels
    tokens = torch.zeros(1, rows, width, dtype=dit.dtype, device=dit.device)
    mask = (torch.arange(rows, device=dit.device) < valid).long()[None]
    mapped = row.quote_rule == "pairs"
    text = Text(tokens, mask, embeds=tokens.clone() if mapped else None, quoted=mask.clone() if mapped else None)
    return Conditioning(text, torch.zeros(1, rows, 3), valid)


def see(tower: nn.Module, rows: int, columns: int, blocks: int | None = None) -> Tensor:
    """What a vision tower, hollow or not, makes of rows x columns merged cells: (cells, width of the language model).

    Its windows are given as numbers, so that no value has to be known. blocks: only so many, from the first.
    """
    config: Any = tower.config
    merge, cells = config.spatial_merge_size**2, config.window_size // config.patch_size // config.spatial_merge_size
    patches = rows * columns * merge
    windows = [
        min(cells, rows - row) * min(cells, columns - column) * merge
        for row in range(0, rows, cells)
        for column in range(0, columns, cells)
    ]
    pixels, head = 3 * config.temporal_patch_size * config.patch_size**2, config.hidden_size // config.num_heads
    network: Any = tower
    place = network.patch_embed.proj.weight.device
    hidden = network.patch_embed(torch.empty(patches, pixels, device=place))
    positions = (torch.empty(patches, head, device=place), torch.empty(patches, head, device=place))
    for index, block in enumerate(network.blocks[:blocks]):
        spans = [patches] if index in config.fullatt_block_indexes else windows
        ends = torch.tensor([0, *spans], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        hidden = block(hidden, cu_seqlens=ends, position_embeddings=positions)
    return network.merger(hidden)
