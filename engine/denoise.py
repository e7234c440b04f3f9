"""The sampling loop (model.md §5.4): Euler steps along the guided velocity, in the dtype flow of each variant.

Everything constant over the steps is made before the loop (`Branch`), and what depends on the step but not on the
latents too, unless it is left to each step (algebra.py). All state is local to the call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from step1x.engine.algebra import ON, Algebra, collapse, fold, masked
from step1x.engine.dit import DiT, Request, Rope, Step, Text
from step1x.engine.kept import Active
from step1x.engine.schedule import guided
from step1x.engine.text import Conditioning
from step1x.engine.timing import OnStep
from step1x.engine.variants import DtypeFlow, Variant

Velocity = Callable[[Tensor, Step, Rope, int | None], Tensor]  # as `DiT.velocity`
RowsVelocity = Callable[[Tensor, Step, Rope, int | None, Active], Tensor]  # as `Fused.velocity`


class Halves(NamedTuple):
    """A velocity in two: the rows (batch, N, width) behind the blocks, and the velocity at them.

    blocks, rows: as `Runner.velocity` and `Runner.rows`, but for what comes out. final: of rows and `mods.final`.
    """

    blocks: Velocity
    rows: RowsVelocity | None
    final: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, dit: DiT) -> Self:
        """In plain torch."""

        def blocks(tokens: Tensor, step: Step, rope: Rope, kept: int | None) -> Tensor:
            return dit.transform(dit.img_in(tokens.to(dit.dtype)), step, rope, kept)

        return cls(blocks, None, dit.final_layer)


@dataclass(frozen=True, slots=True)
class Runner:
    """What runs a step: the velocity, and guidance with the Euler step (kernels/cfg_step.py; None: in plain torch).

    multiple: text rows come in multiples of this. coarse: runs the steps that begin within `stretch`, shares of all
    steps. rows: runs steps that keep keys and values, or compute some rows alone. halves: the velocity in two; None:
    what runs it gives nothing out in between, as an exported engine.
    """

    velocity: Velocity
    cfg_step: Callable[..., Tensor] | None = None
    multiple: int = 1
    coarse: Velocity | None = None
    stretch: tuple[float, float] = (0.0, 1.0)
    rows: RowsVelocity | None = None
    halves: Halves | None = None

    def at(self, share: float) -> Velocity:
        """What runs the step that begins when `share` of the steps are done."""
        first, last = self.stretch
        return self.coarse if self.coarse is not None and first <= share < last else self.velocity


@dataclass(frozen=True, slots=True)
class Branch:
    """One forward of a step: the prepared text rows of all its batch rows, their rotary tables, and what runs it.

    steps: what `DiT.condition` would give at each step, if they were folded.
    """

    request: Request
    rope: Rope
    runner: Runner
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance: its strength, and from which t in [0, 1] on differences are norm-rescaled."""

    scale: float
    rescale_above: float


def joined(conditionings: Sequence[Conditioning]) -> tuple[Text, Tensor]:
    """Encoded instructions as one batch: text rows and RoPE ids. Their lengths must be equal."""
    texts = [one.text for one in conditionings]
    embeds = [text.embeds for text in texts if text.embeds is not None]
    quoted = [text.quoted for text in texts if text.quoted is not None]
    bias = [text.bias for text in texts if text.bias is not None]
    text = Text(
        tokens=torch.cat([text.tokens for text in texts]),
        mask=torch.cat([text.mask for text in texts]),
        embeds=torch.cat(embeds) if embeds else None,
        quoted=torch.cat(quoted) if quoted else None,
        bias=torch.cat(bias) if bias else None,
        biased=None if any(text.biased is None for text in texts) else max(text.biased or 0 for text in texts),
    )
    return text, torch.cat([one.ids for one in conditionings])


def branches(
    dit: DiT,
    groups: Sequence[Sequence[Conditioning]],
    image_ids: Tensor,
    batched: bool,
    algebra: Algebra = ON,
    runner: Runner | None = None,
) -> list[Branch]:
    """The forwards of a step: one for all groups (conditional, then unconditional) if `batched`, else one each.

    image_ids: (1, tokens, 3). runner: by default `dit.velocity` and plain torch.
    """
    runner = runner or Runner(dit.velocity, halves=Halves.of(dit))
    if batched:
        groups = [[one for group in groups for one in group]]
    made = []
    for group in groups:
        fitting = collapse(group, runner.multiple) if algebra.collapse else group
        text, text_ids = joined(masked(fitting, runner.multiple))
        ids = image_ids.to(dit.device).expand(len(group), -1, -1)
        rope = dit.rope(text_ids.to(dit.device), ids)
        made.append(Branch(dit.prepare(text), rope, runner))
    return made


def folded(dit: DiT, forwards: Sequence[Branch], times: Sequence[Tensor]) -> list[Branch]:
    """The branches with all that depends on the step computed for `times`, (1,) each."""
    steps = fold(dit, [branch.request for branch in forwards], times)
    return [replace(branch, steps=tuple(own)) for branch, own in zip(forwards, steps, strict=True)]


def velocities(
    dit: DiT,
    forwards: Sequence[Branch],
    tokens: Tensor,
    step: tuple[int, int],
    timestep: Tensor,
    kept: int | None = None,
) -> Tensor:
    """Velocity (rows, kept or N, channels) of all branches below each other, conditional rows first.

    tokens: (batch, N, in_channels), the same for every branch; step: its index, from 0, and how many there are.
    """
    index, steps = step
    made = []
    for branch in forwards:
        rows = branch.request.rows
        repeated = tokens.expand(rows, -1, -1) if len(tokens) == 1 else tokens.repeat(rows // len(tokens), 1, 1)
        given = branch.steps[index] if branch.steps else dit.condition(branch.request, timestep.expand(rows))
        made.append(branch.runner.at(index / steps)(repeated, given, branch.rope, kept))
    return torch.cat(made) if len(made) > 1 else made[0]


@dataclass(frozen=True, slots=True)
class Loop:
    """What the steps of a request are made of, besides its latents.

    schedule: (steps + 1,) noise levels to 0; guidance None: the branches hold conditional rows only.
    """

    forwards: Sequence[Branch]
    schedule: Tensor
    guidance: Guidance | None
    variant: Variant
    algebra: Algebra = ON

    def exactly(self, dit: DiT, first: int) -> Self:
        """The steps from `first` on, counted from 0, without coarse arithmetic."""
        runners = [replace(branch.runner, velocity=dit.velocity, coarse=None) for branch in self.forwards]
        forwards = [replace(branch, runner=own) for branch, own in zip(self.forwards, runners, strict=True)]
        return replace(self, forwards=forwards, schedule=self.schedule[first:])


def denoise(
    dit: DiT,
    loop: Loop,
    state: tuple[Tensor, Tensor | None],
    on_step: OnStep | None = None,
    trail: list[Tensor] | None = None,
) -> Tensor:
    """Latent tokens (batch, Nt, 64) at the end of the schedule; those after each step are added to `trail`.

    state: noisy target tokens (batch, Nt, 64) and reference tokens of the same shape, None for text to image.
    """
    forwards, schedule, variant, algebra = loop.forwards, loop.schedule, loop.variant, loop.algebra
    latents, reference = state
    target = latents.shape[1]
    latents = latents.to(dit.dtype)
    times = times_of(schedule, latents, variant)
    if algebra.fold:
        forwards = folded(dit, forwards, times)
    for index in range(len(schedule) - 1):
        now, following = float(schedule[index]), float(schedule[index + 1])
        tokens = latents.to(dit.dtype)
        if reference is not None:
            tokens = torch.cat((tokens, reference.to(dit.dtype)), dim=1)
        kept = target if algebra.prune else None
        prediction = velocities(dit, forwards, tokens, (index, len(schedule) - 1), times[index], kept)[:, :target]
        latents = advance(loop, latents, prediction, now, following - now)
        if trail is not None:
            trail.append(latents)
        if on_step is not None:
            on_step(index + 1, len(schedule) - 1)
    return latents


def advance(loop: Loop, latents: Tensor, prediction: Tensor, now: float, length: float) -> Tensor:
    """The latents a step of `length` on from level `now`: guided, if unconditional rows follow the conditional ones."""
    guidance, flow = loop.guidance, loop.variant.dtype_flow
    if guidance is None or len(prediction) == len(latents):
        return euler(latents, prediction, length, flow)
    cfg_step = loop.forwards[0].runner.cfg_step or _cfg_step
    return cfg_step(latents, prediction, guidance.scale, length, now > guidance.rescale_above, flow)


def times_of(schedule: Tensor, latents: Tensor, variant: Variant) -> list[Tensor]:
    """`_time` of every step: the state of autocast-fp32 is wide from the second step on."""
    wide = variant.dtype_flow == "autocast-fp32"
    later = latents.to(torch.promote_types(latents.dtype, torch.float32)) if wide else latents
    return [_time(float(now), later if index else latents, variant) for index, now in enumerate(schedule[:-1])]


def _time(now: float, latents: Tensor, variant: Variant) -> Tensor:
    """t in [0, 1] as (1,), rounded the way the variant rounds it (§5.4)."""
    if variant.dtype_flow == "pure":
        return torch.tensor([now * 1000], device=latents.device).to(latents.dtype) / 1000
    return torch.tensor([now], device=latents.device).to(latents.dtype)


def _cfg_step(
    latents: Tensor, prediction: Tensor, scale: float, length: float, rescaled: bool, flow: DtypeFlow
) -> Tensor:
    """Guidance and the Euler step in plain torch, as kernels/cfg_step.py does them in one pass."""
    cond, uncond = prediction.chunk(2)
    return euler(latents, guided(cond, uncond, scale, rescaled, flow == "autocast-fp32"), length, flow)


def euler(latents: Tensor, prediction: Tensor, length: float, flow: DtypeFlow) -> Tensor:
    """One Euler step; `latents` keep, gain or return to a dtype as the variant's do (§5.4).

    length: of Python floats, as in the official loop: only the model sees t rounded.
    """
    if flow == "autocast-state":
        return latents + length * prediction
    wide = torch.promote_types(latents.dtype, torch.float32)
    stepped = latents.to(wide) + length * prediction.to(wide)
    # diffusers' scheduler steps in float32 and returns the prediction's dtype; the official v1.1 loop stays wide.
    return stepped.to(prediction.dtype) if flow == "pure" else stepped
