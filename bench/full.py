"""The released model at its full size without its weights: hollow modules, and what fills them.

Filled with fake tensors they are counted (counters.py), with random ones on a GPU they are timed (battery_*.py).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from step1x.engine import Engine, released
from step1x.engine.algebra import Algebra
from step1x.engine.denoise import Runner, branches, folded, velocities
from step1x.engine.dit import DiT, DiTConfig, Text
from step1x.engine.folder import locate
from step1x.engine.fused import Fused
from step1x.engine.image import Canvas, image_ids
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
VALID_ROWS = (349, 331)  # conditional and unconditional text: 324 of the picture, an instruction, the chat's end
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


def instruction(valid: int, dit: DiT) -> Conditioning:
    """An encoded instruction of so many valid rows, padded as the released presets pad it."""
    rows, device = VARIANT.text_tokens, dit.device
    tokens = torch.zeros(1, rows, dit.config.connector.in_channels, dtype=dit.dtype, device=device)
    mask = (torch.arange(rows, device=device) < valid).long()[None]
    return Conditioning(Text(tokens, mask), torch.zeros(1, rows, 3), valid)


def step(dit: DiT, canvas: Canvas, algebra: Algebra, runner: Runner | None = None) -> Callable[[], Tensor]:
    """A step of both guidance branches in one batch, as a call; all that is made before the loop is made here.

    runner: for `algebra.fuse`, by default the fused operations as they are.
    """
    groups = [[instruction(valid, dit)] for valid in VALID_ROWS]
    runner = (runner or Runner(Fused(dit).velocity)) if algebra.fuse else None
    ids = image_ids(canvas.grid, VARIANT.reference_ids)
    forwards, time = branches(dit, groups, ids, True, algebra, runner), torch.ones(1, device=dit.device)
    if algebra.fold:
        forwards = folded(dit, forwards, [time])
    place = {"dtype": dit.dtype, "device": dit.device}
    img = torch.zeros(1, 2 * canvas.tokens, dit.config.hidden_size, **place)  # type: ignore[call-overload]
    latents = torch.zeros(1, canvas.tokens, dit.config.in_channels, **place)  # type: ignore[call-overload]

    def run() -> Tensor:
        img[:, : canvas.tokens] = dit.img_in(latents)
        return velocities(dit, forwards, img, (0, 1), time, canvas.tokens if algebra.prune else None)

    return run
