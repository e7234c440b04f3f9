"""The released model at its full size without its weights: hollow modules, and what fills them.

Filled with fake tensors they are counted (counters.py), with random ones on a GPU they are timed (battery_*.py).
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from step1x.engine import Engine, hollow, released
from step1x.engine.algebra import Algebra
from step1x.engine.denoise import Runner, branches, folded, velocities
from step1x.engine.dit import DiT, DiTConfig
from step1x.engine.engine_config import model_sizes
from step1x.engine.executor import Execution
from step1x.engine.folder import locate
from step1x.engine.fused import Fused
from step1x.engine.hollow import ModelSizes
from step1x.engine.image import Canvas, image_ids
from step1x.engine.qwen import compute_frequencies, load_image_processor, load_tokenizer, read_config
from step1x.engine.request import Defaults
from step1x.engine.residency import dit_at_host, text_at_host
from step1x.engine.text import Conditioner
from step1x.engine.vae import VAE
from step1x.engine.variants import VARIANTS
from step1x.engine.weights import Components
from step1x.profiles import Profile
from step1x.quant.linear import QuantizedLinear, swap

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLModel

VERSION = "v1.1"
VARIANT = VARIANTS["official-v1.1"]
CANVASES = (Canvas(512, 512), Canvas(768, 768), Canvas(1024, 1024), Canvas(832, 1248))
VALID_ROWS = (349, 331)  # conditional and unconditional text: 324 of the picture, an instruction, the chat's end

SCALE = 0.02  # of quantised weights: that of plain ones
Make = Callable[[torch.Size, torch.dtype], Tensor]


def hollow_dit(config: DiTConfig | None = None) -> DiT:
    """The transformer with its connector on the meta device. config: of another than the released one."""
    return hollow.hollow_dit(config or released.dit_config(VERSION))


def hollow_vae() -> VAE:
    return hollow.hollow_vae(released.VAE)


def hollow_qwen() -> "Qwen2_5_VLModel":
    """Vision tower and language model, without the head."""
    return hollow.hollow_qwen(released.QWEN)


def fill(module: nn.Module, make: Make, dtype: torch.dtype, host: Callable[[str], bool] = lambda key: False) -> None:
    """Puts `make(shape, dtype)` in place of every parameter; those that `host` picks go to host memory.

    Quantised weights get numbers of their own dtypes, and their scales one value.
    """
    for prefix, part in module.named_modules():
        for name, old in part._parameters.items():
            if old is not None:
                value = make(old.shape, dtype)
                part._parameters[name] = nn.Parameter(_at(value, host(f"{prefix}.{name}")), requires_grad=False)
        if isinstance(part, QuantizedLinear):
            for name, old in part._buffers.items():
                if old is not None:
                    part._buffers[name] = _at(_like(old, name, make), host(f"{prefix}.{name}"))


def _at(value: Tensor, host: bool) -> Tensor:
    return value.cpu() if host else value


def _like(old: Tensor, name: str, make: Make) -> Tensor:
    """Numbers as a quantised layer has them: weights over the whole range, so that with their scale they are normal."""
    if name == "bias":
        return make(old.shape, old.dtype)
    if name == "weight":
        wide = make(old.shape, torch.bfloat16) * 50  # of deviation 1
        if old.dtype.is_floating_point:
            return wide.to(old.dtype)
        return wide.mul_(32).to(old.dtype) if old.dtype == torch.int8 else wide.abs_().mul_(64).to(old.dtype)
    return torch.full_like(make(old.shape, torch.bfloat16), SCALE).to(old.dtype)


def weight_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module's parameters in `dtype`."""
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def random(device: torch.device) -> Make:
    """Values of the size that trained weights have, from a seed."""
    generator = torch.Generator(device).manual_seed(0)

    def make(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02, generator=generator)

    return make


def engine(device: torch.device, profile: Profile, sizes: ModelSizes | None = None) -> Engine:
    """A model with random weights on `device`, as a profile has it; the tokenizer is the bundled checkpoint's.

    sizes: of a model, by default the released one. Engines for one profile have the same weights on every run.
    """
    sizes, bundled = sizes or model_sizes(VERSION), locate(None)
    make, (text, processor) = random(device), bundled.needed_text()
    row = sizes.variant.override({"template_tokens": bundled.variant().template_tokens})  # of the tokenizer
    dtype, lies = getattr(torch, profile.dtype), profile.residency
    dit = hollow.hollow_dit(sizes.dit, sizes.variant.dtype_flow != "pure").to(dtype)
    vae = hollow.hollow_vae(sizes.vae)
    qwen = hollow.hollow_qwen(json.loads(sizes.qwen)).to(dtype)
    swap(dit, "dit", profile.weights.dit)
    swap(dit, "folded", profile.weights.folded)
    swap(qwen, "text", profile.weights.text)
    swap(qwen, "vision", profile.weights.vision)
    fill(dit, make, dtype, dit_at_host(lies, sizes.dit.depth, sizes.dit.depth_single))
    fill(qwen, make, dtype, text_at_host(lies))
    fill(vae, make, getattr(torch, profile.vae_dtype), lambda key: lies.vae != "resident")
    compute_frequencies(qwen, device)
    pictures = load_image_processor(processor, read_config(text / "config.json"))
    conditioner = Conditioner(qwen.eval(), load_tokenizer(processor), pictures, row)
    name = f"random-{sizes.name}"
    components = Components(variant=row, dit=dit, vae=vae, conditioner=conditioner, name=name, digest="")
    return Engine(components, Execution.of(profile), residency=lies, defaults=Defaults.of(profile))


def step(dit: DiT, canvas: Canvas, algebra: Algebra, runner: Runner | None = None) -> Callable[[], Tensor]:
    """A step of both guidance branches in one batch, as a call; all that is made before the loop is made here.

    runner: for `algebra.fuse`, by default the fused operations as they are.
    """
    groups = [[hollow.instruction(valid, VARIANT, dit)] for valid in VALID_ROWS]
    runner = (runner or Runner(Fused(dit).velocity)) if algebra.fuse else None
    ids = image_ids(canvas.grid, VARIANT.reference_ids)
    forwards, time = branches(dit, groups, ids, True, algebra, runner), torch.ones(1, device=dit.device)
    if algebra.fold:
        forwards = folded(dit, forwards, [time])
    place = {"dtype": dit.dtype, "device": dit.device}
    tokens = torch.zeros(1, 2 * canvas.tokens, dit.config.in_channels, **place)  # type: ignore[call-overload]

    def run() -> Tensor:
        return velocities(dit, forwards, tokens, (0, 1), time, canvas.tokens if algebra.prune else None)

    return run
