"""LoRA files of the official trainer (kohya), merged into a transformer once (model.md §8.1)."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from step1x.engine.checkpoint import Checkpoint
from step1x.engine.dit import DiT
from step1x.engine.errors import InputError

PREFIX = "lora_unet_"
TEXT_PREFIX = "lora_te"  # the official loader never applies these either
# The trainer targets the blocks, the loader also honours the embedders; neither connector nor final layer.
TARGETS = ("double_blocks.", "single_blocks.", "img_in", "time_in.", "vector_in.", "txt_in")
KEY = re.compile(rf"(?P<module>{PREFIX}\w+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What a merge did."""

    modules: int  # linear layers that were changed
    ignored: int  # tensors for the text model, which the official loader ignores too


def merge(dit: DiT, path: Path, multiplier: float = 1.0) -> Merged:
    """Adds multiplier * (alpha / rank) * up @ down to each linear layer that the file names.

    Computed in float32 (or the weight's wider dtype), cast back to the weight's dtype. It cannot be undone.
    Raises InputError naming file and key, before anything is changed: a key that is no LoRA tensor of this
    model, a missing down, up or alpha, or a shape that does not fit.
    """
    checkpoint = Checkpoint([path])
    wanted = [key for key in checkpoint if not key.startswith(TEXT_PREFIX)]
    layers = _layers(dit)
    names = sorted({_module_name(key, layers, path) for key in wanted})
    if not names:
        raise InputError(f"{path}: no LoRA for the transformer in this file (keys begin with {PREFIX})")
    for name in names:
        _check(checkpoint, name, layers[name], path)
    for name in names:
        down, up, alpha = (checkpoint.tensor(f"{name}.{part}") for part in PARTS)
        _add(layers[name], down, up, multiplier * alpha.float().item() / down.shape[0])
    return Merged(modules=len(names), ignored=len(checkpoint) - len(wanted))


def _layers(dit: DiT) -> dict[str, nn.Linear]:
    """LoRA name -> linear layer, for those that a file may change."""
    return {
        PREFIX + name.replace(".", "_"): module
        for name, module in dit.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(TARGETS)
    }


def _module_name(key: str, layers: dict[str, nn.Linear], path: Path) -> str:
    match = KEY.fullmatch(key)
    if match is None:
        hint = "; a PEFT file (lora_A, lora_B) is not read" if ".lora_A." in key or ".lora_B." in key else ""
        raise InputError(f"{path}: {key} is no kohya LoRA tensor{hint}")
    if match["module"] not in layers:
        raise InputError(f"{path}: {key} is for a layer that this model does not have")
    return match["module"]


def _check(checkpoint: Checkpoint, name: str, layer: nn.Linear, path: Path) -> None:
    for part in PARTS:
        if f"{name}.{part}" not in checkpoint:
            raise InputError(f"{path}: missing {name}.{part}")
    down, up, alpha = (checkpoint[f"{name}.{part}"].shape for part in PARTS)
    rank = down[0] if len(down) == 2 else 0
    if down != (rank, layer.in_features) or up != (layer.out_features, rank) or not rank:
        raise InputError(
            f"{path}: {name}: down {list(down)} and up {list(up)} do not fit a layer "
            f"{[layer.out_features, layer.in_features]}"
        )
    if checkpoint[f"{name}.alpha"].numel != 1:
        raise InputError(f"{path}: {name}.alpha is {list(alpha)}, must be one number")


@torch.no_grad()
def _add(layer: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
    weight = layer.weight
    target = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()  # fp8 has no arithmetic
    down, up = (part.to(weight.device, target.dtype) for part in (down, up))
    weight.copy_(target + scale * (up @ down))
