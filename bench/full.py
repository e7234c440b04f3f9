"""The released model at its full size without its weights: hollow modules, and what fills them.

Filled with fake tensors they are counted (counters.py), with random ones on a GPU they are timed (battery_*.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from step1x.engine import Engine, released
from step1x.engine.dit import DiT, DiTConfig, Text
from step1x.engine.folder import locate
from step1x.engine.image import Canvas
from step1x.engine.qwen import compute_frequencies, load_image_processor, load_tokenizer, read_config
from step1x.engine.text import Conditioner, Conditioning
from step1x.engine.vae import VAE
from step1x.engine.variants import VARIANTS
from step1x.engine.weights import Components

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLModel

VERSION = "v1.1"
VARIANT = VARIANTS["official-v1.1"]
CANVASES = (Canvas(512, 512), Canvas(768, 768), Canvas(1024, 1024), Canvas(832, 1248))
VISION_WINDOW = 4  # merged cells on a side of a window of the vision tower: 112 px of 28 (model.md §1)

Make = Callable[[torch.Size, torch.dtype], Tensor]


def hollow_dit(config: DiTConfig | None = None) -> DiT:
    """The transformer with its connector on the meta device. config: of another than the released one."""
    with torch.device("meta"):
        return DiT(config or released.dit_config(VERSION))


def hollow_vae() -> VAE:
    with torch.device("meta"):
        return VAE(released.VAE)


def hollow_qwen() -> "Qwen2_5_VLModel":
    """Vision tower and language model, without the head."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(**released.QWEN)
    with torch.device("meta"):
        return Qwen2_5_VLModel._from_config(config, attn_implementation="sdpa", dtype=torch.get_default_dtype())


def fill(module: nn.Module, make: Make, dtype: torch.dtype) -> None:
    """Puts `make(shape, dtype)` in place of every parameter."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                part._parameters[name] = nn.Parameter(make(old.shape, dtype), requires_grad=False)


def weight_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module's parameters in `dtype`."""
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def random(device: torch.device) -> Make:
    """Values of the size that trained weights have, from a seed."""
    generator = torch.Generator(device).manual_seed(0)

    def make(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02, generator=generator)

    return make


def engine(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Engine:
    """The whole released model with random weights on `device`; the tokenizer is the bundled checkpoint's."""
    make, (text, processor) = random(device), locate(None).needed_text()
    dit, vae, qwen = hollow_dit(), hollow_vae(), hollow_qwen()
    for module in (dit, vae, qwen):
        fill(module, make, dtype)
    compute_frequencies(qwen, device)
    pictures = load_image_processor(processor, read_config(text / "config.json"))
    conditioner = Conditioner(qwen.eval(), load_tokenizer(processor), pictures, VARIANT)
    return Engine(Components(variant=VARIANT, dit=dit, vae=vae, conditioner=conditioner, name="random-v1.1", digest=""))


def instruction(valid: int, dtype: torch.dtype) -> Conditioning:
    """An encoded instruction of so many valid rows, padded as the released presets pad it."""
    rows = VARIANT.text_tokens
    tokens = torch.zeros(1, rows, released.dit_config(VERSION).connector.in_channels, dtype=dtype)
    mask = (torch.arange(rows) < valid).long()[None]
    return Conditioning(Text(tokens, mask), torch.zeros(1, rows, 3), valid)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one step of the transformer takes."""

    text: Text
    text_ids: Tensor  # (1, T, 3)
    tokens: Tensor  # (batch, 2 * target tokens, channels)
    timestep: Tensor  # (batch,)


def inputs(
    canvas: Canvas,
    batch: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    config: DiTConfig | None = None,
) -> Inputs:
    """Random values of the shapes of `batch` rows at a size; text is padded as the released presets pad it.

    config: of another transformer than the released one.
    """
    config, rows = config or released.dit_config(VERSION), VARIANT.text_tokens
    tokens = torch.randn(batch, rows, config.connector.in_channels, dtype=dtype, device=device)
    return Inputs(
        text=Text(tokens, torch.ones(batch, rows, dtype=torch.long, device=device)),
        text_ids=torch.zeros(1, rows, 3, device=device),
        tokens=torch.randn(batch, 2 * canvas.tokens, config.in_channels, dtype=dtype, device=device),
        timestep=torch.full((batch,), 0.5, device=device),
    )
