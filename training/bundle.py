"""A trained model -> a model folder in the diffusers layout, ready for the ordinary loader."""

import copy
from pathlib import Path
from typing import Any

import torch

from step1x.engine.dit import DiT
from step1x.engine.save import appearing, save
from step1x.engine.vae import VAE
from step1x.engine.variants import Variant, variant
from step1x.training.conditioning import TextSide
from step1x.training.tokenizer import save_text_model


def overrides(row: Variant) -> dict[str, Any]:
    """The fields in which `row` differs from the preset it is named after."""
    preset = variant(row.name)
    fields = Variant.__dataclass_fields__
    return {name: getattr(row, name) for name in fields if getattr(row, name) != getattr(preset, name)}


def write_bundle(folder: Path, dit: DiT, vae: VAE, text: TextSide) -> None:
    """Write everything in bf16 into the new folder `folder`, whole or not at all. Raises InputError."""
    row = text.variant
    with appearing(folder) as partial:
        save(dit, vae, partial, preset=row.name, overrides=overrides(row))
        save_text_model(
            copy.deepcopy(text.model).to(torch.bfloat16),
            text.tokenizer,
            partial / "text_encoder",
            partial / "processor",
            min_pixels=row.min_pixels,
            max_pixels=row.max_pixels,
        )
