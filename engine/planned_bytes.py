"""Bytes that a model takes by what it is, and that its stages need on top: the figures of planner.py.

Both come from hollow modules. Weights are summed as quant/ would store them; the stages run on the meta device, layer
by layer as they do with weights, while every storage that they make is counted (counting.py). All are functions of
sizes alone, and kept in the process.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from step1x.engine.algebra import ON
from step1x.engine.counting import FlashAttention, HostMemory, Memory
from step1x.engine.denoise import Branch, Runner, branches, folded, velocities
from step1x.engine.dit import DiT, DiTConfig, Rope, Step, is_modulation
from step1x.engine.executor import GRAPHS, TEXT_BUCKET, leaves
from step1x.engine.fused import Fused
from step1x.engine.hollow import ModelSizes, hollow_dit, hollow_qwen, hollow_vae, instruction, see
from step1x.engine.image import Canvas, image_ids
from step1x.engine.qwen import going_on
from step1x.engine.text import Conditioning
from step1x.engine.vae import VAEConfig
from step1x.engine.vision_size import pre_size, processor_size
from step1x.profiles import Profile, Scheme
from step1x.quant.linear import swap

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLModel

Stored = Mapping[str, int]  # tensor -> bytes
Seen = Callable[[int], None]

# Blocks of a kind need the same memory one after the other: two double blocks, of which the first still has what came
# in, and three single ones, with one in the middle, have the peak of any number.
DEPTH, DEPTH_SINGLE = 2, 3
SMALLEST = Canvas(16, 16)
STRIPPED = (128, 192)  # heights from which the memory of a picture in strips is drawn out: it grows linearly


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What an edit computes, as far as memory depends on it."""

    canvas: Canvas
    batch: int
    steps: int
    guided: bool
    rows: int  # valid text rows of the longest instruction


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerBytes:
    """What the transformer's stages need beside its weights, and beside layers that are brought for the moment."""

    request: int  # conditionings, connector's rows and rotary tables: as long as the request
    tables: int  # what is folded, of all steps and branches: until the last step
    prepare: int  # at most while it is folded, besides the request; tables included
    step: int  # at most within the loop, besides request and tables
    graphs: int  # what captured steps read and write, of as many as are kept; 0: nothing is captured


@dataclass(frozen=True, kw_only=True, slots=True)
class TextBytes:
    peak: int  # at most while picture and instruction are read
    kept: int  # keys, values and hidden states, until another picture is shown


def stored(module: nn.Module) -> dict[str, int]:
    """Bytes of each tensor of a module's state."""
    return {name: tensor.nbytes for name, tensor in module.state_dict().items()}


@cache
def transformer_weights(config: DiTConfig, dtype: torch.dtype, core: Scheme, folded: Scheme) -> dict[str, Stored]:
    """By component: transformer (all that a step reads, of scheme `core`), connector, modulations (`folded`)."""
    dit = hollow_dit(config).to(dtype)
    swap(dit, "dit", core)
    swap(dit, "folded", folded)
    parts: dict[str, dict[str, int]] = {"transformer": {}, "connector": {}, "modulations": {}}
    for name, size in stored(dit).items():
        inside = "modulations" if is_modulation(name) else "transformer"
        parts["connector" if name.startswith("connector.") else inside][name] = size
    return dict(parts)


@cache
def text_weights(qwen: str, dtype: torch.dtype, text: Scheme, vision: Scheme) -> dict[str, Stored]:
    """By component: language model, embeddings, vision tower."""
    parts: dict[str, dict[str, int]] = {"language model": {}, "embeddings": {}, "vision tower": {}}
    for name, size in stored(_qwen(qwen, dtype, text, vision)).items():
        inside = "embeddings" if "embed_tokens" in name else "language model"
        parts["vision tower" if name.startswith("visual.") else inside][name] = size
    return dict(parts)


@cache
def _qwen(qwen: str, dtype: torch.dtype, text: Scheme, vision: Scheme) -> "Qwen2_5_VLModel":
    model = hollow_qwen(json.loads(qwen)).to(dtype)
    swap(model, "text", text)
    swap(model, "vision", vision)
    return model


@cache
def vae_weights(config: VAEConfig, dtype: torch.dtype) -> Stored:
    return stored(hollow_vae(config).to(dtype))


@contextmanager
def _counted(cpu: bool = False) -> Iterator[Memory]:
    """cpu: what a process without a GPU takes for the same."""
    with torch.no_grad(), FlashAttention(), HostMemory() if cpu else Memory() as memory:
        yield memory


def transformer_bytes(model: ModelSizes, profile: Profile, work: Work) -> TransformerBytes:
    """Of the stages prepare and denoise, as `Engine` runs them.

    With kernels "auto" they are planned as plain torch, which takes most: one that fails its check is switched off.
    """
    row, dtype = model.variant, getattr(torch, profile.dtype)
    batched = row.batched_guidance if profile.branches is None else profile.branches == "batched"
    runs = Runs(batched=batched, kernels=profile.kernels == "on", multiple=TEXT_BUCKET if profile.compiled else 1)
    request, step, inputs = _step(model, dtype, profile.weights.dit, replace(work, steps=1), runs)
    graphs = GRAPHS * inputs if captures(profile) else 0
    # Neither the size of the picture nor the scheme of the blocks has a part in what is folded.
    tables, prepare = _fold(model, dtype, replace(work, canvas=SMALLEST), runs)
    return TransformerBytes(request=request, tables=tables, prepare=prepare, step=step, graphs=graphs)


def captures(profile: Profile) -> bool:
    """Whether steps become CUDA graphs (executor.py): not on a CPU, nor with blocks that come and go."""
    on_gpu = profile.device not in ("cpu", "mps")
    return profile.compiled and profile.backend == "torch" and on_gpu and profile.residency.dit == "resident"


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """How the forwards of a step run."""

    batched: bool
    kernels: bool  # our own
    multiple: int  # of text rows


def _shallow(model: ModelSizes, dtype: torch.dtype) -> DiT:
    depths = min(model.dit.depth, DEPTH), min(model.dit.depth_single, DEPTH_SINGLE)
    config = replace(model.dit, depth=depths[0], depth_single=depths[1])
    return hollow_dit(config, model.variant.dtype_flow != "pure").to(dtype)


def _groups(model: ModelSizes, dit: DiT, work: Work) -> list[list[Conditioning]]:
    """Encoded instructions, and after them the negative prompts."""
    return [[instruction(work.rows, model.variant, dit)] * work.batch for _ in range(2 if work.guided else 1)]


def _forwards(
    model: ModelSizes,
    dit: DiT,
    groups: list[list[Conditioning]],
    canvas: Canvas,
    runs: Runs,
    seen: Seen = lambda _: None,
) -> list[Branch]:
    """seen: is told how many bytes each forward reads beside weights."""
    fused = Fused(dit, lambda op: op.call if runs.kernels else op.reference)

    def velocity(tokens: Tensor, step: Step, rope: Rope, kept: int | None = None) -> Tensor:
        seen(sum(one.nbytes for one in leaves(tokens, step, rope)))
        return fused.velocity(tokens, step, rope, kept)

    runner = Runner(velocity, multiple=runs.multiple)
    return branches(dit, groups, image_ids(canvas.grid, model.variant.reference_ids), runs.batched, ON, runner)


@cache
def _step(model: ModelSizes, dtype: torch.dtype, scheme: Scheme, work: Work, runs: Runs) -> tuple[int, int, int]:
    """The request, what a step of the sampling loop takes besides it and the tables, and what a graph of it holds."""
    dit, tokens = _shallow(model, dtype), work.canvas.tokens
    swap(dit, "dit", scheme)
    time = torch.ones(1, device=dit.device)
    inputs: list[int] = []
    with _counted() as memory:
        groups = _groups(model, dit, work)
        forwards = _forwards(model, dit, groups, work.canvas, runs, inputs.append)
        request = memory.now
        forwards = folded(dit, forwards, [time])
        before = memory.peak = memory.now
        both = _empty(work.batch, 2 * tokens, model.dit.in_channels, dtype=dtype)
        velocities(dit, forwards, both, (0, 1), time, tokens)
        step = memory.peak - before
    rows = max(branch.request.rows for branch in forwards)
    missing = _missing(model, dit) * rows * dtype.itemsize
    return request, step, max(inputs) + missing + both.nbytes // 2  # a graph writes the new rows' velocity, too


@cache
def _fold(model: ModelSizes, dtype: torch.dtype, work: Work, runs: Runs) -> tuple[int, int]:
    """The tables of all steps, and what folding takes at most with them."""
    dit = _shallow(model, dtype)
    with _counted() as memory:
        groups = _groups(model, dit, work)
        forwards = _forwards(model, dit, groups, work.canvas, runs)
        request = memory.peak = memory.now
        forwards = folded(dit, forwards, [torch.ones(1, device=dit.device)] * work.steps)
        tables, peak = memory.now - request, memory.peak - request
    rows = work.steps * sum(branch.request.rows for branch in forwards)
    tables += _missing(model, dit) * rows * dtype.itemsize
    return tables, max(peak, tables)


def _missing(model: ModelSizes, dit: DiT) -> int:
    """Modulations of the blocks that a shallow transformer lacks, of one row."""
    blocks = 12 * (model.dit.depth - len(dit.double_blocks)) + 3 * (model.dit.depth_single - len(dit.single_blocks))
    return blocks * model.dit.hidden_size


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def text_bytes(model: ModelSizes, profile: Profile, work: Work) -> TextBytes:
    """Of the stage encode_text: pictures one after the other, each with the longest instruction."""
    row, vision = model.variant, json.loads(model.qwen)["vision_config"]
    factor = vision["patch_size"] * vision["spatial_merge_size"]
    size = work.canvas.width, work.canvas.height
    shown = pre_size(*size, factor) if row.pre_resize else size
    width, height = processor_size(*shown, factor, row.min_pixels, row.max_pixels)
    dtype, schemes = getattr(torch, profile.dtype), profile.weights
    seen = _seen(model.qwen, dtype, schemes.vision, (height // factor, width // factor))
    read, kept = _read(model.qwen, dtype, schemes.text, row.template_tokens + work.rows)
    return TextBytes(peak=max(seen, read), kept=kept)


@cache
def _seen(qwen: str, dtype: torch.dtype, scheme: Scheme, grid: tuple[int, int]) -> int:
    """By the vision tower. grid: merged cells of the picture."""
    tower: Any = _qwen(qwen, dtype, "plain", scheme).visual
    with _counted() as memory:
        see(tower, *grid, blocks=tower.config.fullatt_block_indexes[0] + 1)
    return memory.peak


@cache
def _read(qwen: str, dtype: torch.dtype, scheme: Scheme, tokens: int) -> tuple[int, int]:
    """By the language model, and what of it is kept."""
    from transformers import DynamicCache

    model = _qwen(qwen, dtype, scheme, "plain")
    with _counted() as memory:
        embeds = _empty(1, tokens, model.config.text_config.hidden_size, dtype=dtype)
        positions = torch.zeros(3, 1, tokens, dtype=torch.long, device="meta")
        known, read_on = DynamicCache(), model.language_model
        out = read_on(inputs_embeds=embeds, position_ids=positions, use_cache=True, **going_on(read_on, known))
        del embeds, positions
        kept = memory.now  # by `known` and `out`
    del known, out
    return memory.peak, kept


def vae_bytes(model: ModelSizes, profile: Profile, work: Work) -> tuple[int, int]:
    """Of the stages encode_image and decode, whose every tensor is as large as the batch."""
    encode, decode = _vae(
        model.vae, getattr(torch, profile.vae_dtype), profile.strip_pixels, work.canvas, profile.device == "cpu"
    )
    return encode * work.batch, decode * work.batch


@cache
def _vae(config: VAEConfig, dtype: torch.dtype, strip_pixels: int, canvas: Canvas, cpu: bool) -> tuple[int, int]:
    width, height = canvas.width, canvas.height
    if width * height <= strip_pixels:
        return _halves(config, dtype, None, canvas, cpu)
    if height <= STRIPPED[1]:
        return _halves(config, dtype, 0, canvas, cpu)
    low, high = (_halves(config, dtype, 0, Canvas(width, rows), cpu) for rows in STRIPPED)
    more = (height - STRIPPED[0]) / (STRIPPED[1] - STRIPPED[0])
    encode, decode = (round(a + more * (b - a)) for a, b in zip(low, high, strict=True))
    return encode, decode


def _halves(
    config: VAEConfig, dtype: torch.dtype, strip_pixels: int | None, canvas: Canvas, cpu: bool
) -> tuple[int, int]:
    vae = hollow_vae(config).to(dtype)
    vae.strip_pixels = strip_pixels
    latents = 1, config.z_channels, *canvas.latent_size
    with _counted(cpu) as encoding:
        noise = _empty(*latents, dtype=torch.float32)
        vae.encode(_empty(1, config.in_channels, canvas.height, canvas.width, dtype=torch.float32), noise)
    with _counted(cpu) as decoding:
        vae.decode(_empty(*latents, dtype=torch.float32))
    return encoding.peak, decoding.peak
