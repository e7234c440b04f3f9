"""What is exported: the step as a function of tensors alone, the region step with its caches, and both VAE halves.

The step comes after folding (engine/algebra.py): modulations and the connector are inputs, not weights, so one export
serves all steps. There is one definition of the model: `StepCore` and `RowsCore` hand their tensors to `Fused`.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from step1x.engine.dit import DiT, Modulations, Rope, Step
from step1x.engine.fused import Choose, Fused
from step1x.engine.kept import Active, Kept
from step1x.engine.vae import VAE
from step1x.kernels.launch import Op

Entry = Literal["step", "rows", "encoder", "decoder"]
ENTRIES: tuple[Entry, ...] = get_args(Entry)
LARGEST_BATCH = 2  # rows of a batch that are run at once: both branches of guidance


class Inputs(NamedTuple):
    """One forward of B batch rows, in the order of the exported graphs.

    D double and S single blocks of width W; T text rows, N target and R reference tokens of C channels. Tensors are of
    the model's dtype where none is named. The tables' names are not those of ONNX operators, which importers mix up.
    """

    target: Tensor  # (B, N, C)
    reference: Tensor  # (B, R, C)
    text: Tensor  # (B, T, W): rows of the first block
    image_mods: Tensor  # (B, D, 6 W)
    text_mods: Tensor  # (B, D, 6 W)
    single_mods: Tensor  # (B, S, 3 W)
    final_mods: Tensor  # (B, 2 W)
    cosine: Tensor  # (B, 1, T + N + R, head_dim / 2), float32
    sine: Tensor  # like cosine
    bias: Tensor  # (B, T), float32: added to the logits of text rows as keys


class RowsInputs(NamedTuple):
    """A step of A image rows, which attend to the caches of L = D + S blocks; otherwise as `Inputs`."""

    tokens: Tensor  # (B, A, C)
    rows: Tensor  # (B, A), int64: where the tokens are among the N + R image rows, all different
    text: Tensor
    image_mods: Tensor
    text_mods: Tensor
    single_mods: Tensor
    final_mods: Tensor
    cosine: Tensor  # (B, 1, T + A, head_dim / 2), float32: of the text rows and those rows
    sine: Tensor
    bias: Tensor
    keys: Tensor  # (B, L, heads, T + N + R, head_dim)
    values: Tensor  # like keys


class RowsOutputs(NamedTuple):
    """What a step of some rows gives: the velocity at them, and the caches with what they changed."""

    velocity: Tensor  # (B, A, C)
    new_keys: Tensor
    new_values: Tensor


class Packed(NamedTuple):
    """A `Step` and its rotary tables as tensors of one batch: the inputs that both steps share."""

    text: Tensor
    image_mods: Tensor
    text_mods: Tensor
    single_mods: Tensor
    final_mods: Tensor
    cosine: Tensor
    sine: Tensor
    bias: Tensor

    @classmethod
    def of(cls, step: Step, rope: Rope) -> Self:
        """Tables of one batch row serve all, and no bias is zeros."""
        text, mods, (cosine, sine) = step.text, step.mods, rope
        batch, rows, width = text.shape
        bias = text.new_zeros(batch, rows) if step.bias is None else step.bias
        return cls(
            text,
            stacked([image for image, _ in mods.double], batch, 6 * width, text),
            stacked([words for _, words in mods.double], batch, 6 * width, text),
            stacked(mods.single, batch, 3 * width, text),
            mods.final.flatten(1).expand(batch, -1),
            cosine.expand(batch, -1, -1, -1),
            sine.expand(batch, -1, -1, -1),
            bias.float(),
        )

    def step(self) -> Step:
        pairs = zip(self.image_mods.split(1, dim=1), self.text_mods.split(1, dim=1), strict=True)
        mods = Modulations(
            list(pairs) if self.image_mods.shape[1] else [],
            list(self.single_mods.split(1, dim=1)) if self.single_mods.shape[1] else [],
            self.final_mods[:, None],
        )
        return Step(self.text, mods, self.bias, None)

    def rope(self) -> Rope:
        return self.cosine, self.sine


def stacked(vectors: list[Tensor], batch: int, width: int, like: Tensor) -> Tensor:
    """(batch, blocks, width) of a vector (batch or 1, 1, width) for each block."""
    if not vectors:
        return like.new_empty(batch, 0, width)
    return torch.cat(vectors, dim=1).expand(batch, -1, -1)


def inputs_of(tokens: Tensor, step: Step, rope: Rope, kept: int | None) -> Inputs:
    """What a `Velocity` is given. tokens (B, N + R, C), target then reference; kept: N, None: all are target."""
    tokens = tokens.to(step.text.dtype)
    target = tokens.shape[1] if kept is None else kept
    return Inputs(tokens[:, :target], tokens[:, target:], *Packed.of(step, rope))


def rows_inputs_of(tokens: Tensor, rows: Tensor, caches: tuple[Tensor, Tensor], step: Step, rope: Rope) -> RowsInputs:
    """What a step of some rows is given. tokens (B, A, C), rows (B or 1, A), rope of text rows and those rows."""
    return RowsInputs(tokens.to(step.text.dtype), rows.expand(len(tokens), -1), *Packed.of(step, rope), *caches)


def step_example(dit: DiT, batch: int = 2, text: int = 7, target: int = 6, reference: int = 5) -> Inputs:
    """Zeros to trace a step with: sizes differ from each other and from 1, which a tracer takes for a constant."""
    config, like = dit.config, dit.img_in.weight
    width, rows = config.hidden_size, text + target + reference
    table = torch.zeros(batch, 1, rows, config.head_dim // 2, device=like.device)
    return Inputs(
        like.new_zeros(batch, target, config.in_channels),
        like.new_zeros(batch, reference, config.in_channels),
        like.new_zeros(batch, text, width),
        like.new_zeros(batch, config.depth, 6 * width),
        like.new_zeros(batch, config.depth, 6 * width),
        like.new_zeros(batch, config.depth_single, 3 * width),
        like.new_zeros(batch, 2 * width),
        table,
        table.clone(),
        torch.zeros(batch, text, device=like.device),
    )


def rows_example(dit: DiT, batch: int = 2, text: int = 7, active: int = 6, every: int = 30) -> RowsInputs:
    """Zeros, as `step_example`. every: rows that are kept, of text and image together."""
    config, (tokens, _, *packed) = dit.config, step_example(dit, batch, text, active, 0)
    rows = torch.arange(active, device=tokens.device).repeat(batch, 1)
    keys = tokens.new_zeros(batch, config.depth + config.depth_single, config.heads, every, config.head_dim)
    return RowsInputs._make((tokens, rows, *packed, keys, keys.clone()))


def reference(op: Op) -> Callable[..., Any]:
    """An operation in plain torch, which every exporter reads."""
    return op.reference


def registered(op: Op) -> Callable[..., Any]:
    """An operation as a node of the graph: our kernel runs it on a GPU."""
    return op.call


class Core(nn.Module):
    """The transformer as an exporter sees it. choose: what stands for each operation of kernels/."""

    def __init__(self, dit: DiT, choose: Choose = reference) -> None:
        super().__init__()
        self.dit = dit
        self.choose = choose

    def fused(self) -> Fused:
        """Made in the forward: what it derives from weights is then part of the graph, and no second copy of them."""
        return Fused(self.dit, self.choose)


class StepCore(Core):
    """`Fused.velocity` of the target, a function of the tensors of `Inputs` -> velocity (B, N, C)."""

    def forward(self, target: Tensor, reference: Tensor, *packed: Tensor) -> Tensor:
        given = Packed(*packed)
        tokens = torch.cat((target, reference), dim=1)
        return self.fused().velocity(tokens, given.step(), given.rope(), target.shape[1])


class RowsCore(Core):
    """`Fused.velocity` of some image rows, a pure function of the tensors of `RowsInputs` -> those of `RowsOutputs`."""

    def forward(self, tokens: Tensor, rows: Tensor, *packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *shared, keys, values = packed
        given = Packed(*shared)
        blocks = [(k.clone(), v.clone()) for k, v in zip(keys.unbind(1), values.unbind(1), strict=True)]
        kept = Kept.of(blocks, keys.shape[3])
        active = Active.of(kept, rows, given.text.shape[1])
        velocity = self.fused().velocity(tokens, given.step(), given.rope(), None, active)
        new_keys, new_values = (torch.stack(stores, dim=1) for stores in zip(*kept.blocks, strict=True))
        return velocity, new_keys, new_values


class Encoder(nn.Module):
    """pixels (B, 3, H, W) in [-1, 1], H and W multiples of 16 -> moments (B, 2 z, H / 8, W / 8) of the posterior."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.encoder = vae.encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)


class Decoder(nn.Module):
    """latents (B, z, h, w), neither shifted nor scaled -> pixels (B, 3, 8 h, 8 w), nominally in [-1, 1]."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


@contextmanager
def quiet() -> Iterator[None]:
    """Within it libraries say nothing: what they warn of here is of no use to who exports."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
