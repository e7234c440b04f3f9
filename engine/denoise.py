"""The sampling loop (model.md §5.4): Euler steps along the guided velocity, in the dtype flow of each variant.

Everything constant over the steps is made before the loop (`Branch`); a step computes its conditioning
(`DiT.condition`) and the velocity (`DiT.denoise`). All state is local to the call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step1x.engine.dit import DiT, Request, Rope, Text
from step1x.engine.schedule import guided
from step1x.engine.text import Conditioning
from step1x.engine.timing import OnStep
from step1x.engine.variants import Variant


@dataclass(frozen=True, slots=True)
class Branch:
    """One forward of a step: the prepared text rows of all its batch rows, and their rotary tables."""

    request: Request
    rope: Rope


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
    text = Text(
        tokens=torch.cat([text.tokens for text in texts]),
        mask=torch.cat([text.mask for text in texts]),
        embeds=torch.cat(embeds) if embeds else None,
        quoted=torch.cat(quoted) if quoted else None,
    )
    return text, torch.cat([one.ids for one in conditionings])


def branches(dit: DiT, groups: Sequence[Sequence[Conditioning]], image_ids: Tensor, batched: bool) -> list[Branch]:
    """The forwards of a step: one for all groups (conditional, then unconditional) if `batched`, else one each.

    image_ids: (1, tokens, 3).
    """
    if batched:
        groups = [[one for group in groups for one in group]]
    made = []
    for group in groups:
        text, text_ids = joined(group)
        ids = image_ids.to(dit.device).expand(len(group), -1, -1)
        made.append(Branch(dit.prepare(text), dit.rope(text_ids.to(dit.device), ids)))
    return made


def velocities(dit: DiT, forwards: Sequence[Branch], tokens: Tensor, timestep: Tensor, target: int) -> Tensor:
    """Velocity (rows, target, channels) of all branches below each other, conditional rows first.

    tokens: (batch, N, channels), the same for every branch.
    """
    made = []
    for branch in forwards:
        rows = branch.request.text.pooled.shape[0]
        step = dit.condition(branch.request, timestep.expand(rows))
        repeated = tokens.repeat(rows // tokens.shape[0], 1, 1)
        made.append(dit.denoise(repeated, step, branch.rope)[:, :target])
    return torch.cat(made)


def denoise(
    dit: DiT,
    forwards: Sequence[Branch],
    state: tuple[Tensor, Tensor | None],
    schedule: Tensor,
    guidance: Guidance | None,
    variant: Variant,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latent tokens (batch, Nt, 64) at the end of `schedule`.

    state: noisy target tokens (batch, Nt, 64) and reference tokens of the same shape, None for text to image;
    schedule: (steps + 1,) from noise to 0; guidance None: the branches hold conditional rows only.
    """
    latents, reference = state
    model_dtype, target = dit.dtype, latents.shape[1]
    latents = latents.to(model_dtype)
    for index in range(len(schedule) - 1):
        now, following = float(schedule[index]), float(schedule[index + 1])
        tokens = latents if reference is None else torch.cat((latents, reference.to(latents.dtype)), dim=1)
        prediction = velocities(dit, forwards, tokens, _time(now, latents, variant), target)
        if guidance is not None:
            cond, uncond = prediction.chunk(2)
            rescaled = now > guidance.rescale_above
            prediction = guided(cond, uncond, guidance.scale, rescaled, variant.dtype_flow == "autocast-fp32")
        latents = _euler(latents, prediction, (now, following), variant)
        if on_step is not None:
            on_step(index + 1, len(schedule) - 1)
    return latents


def _time(now: float, latents: Tensor, variant: Variant) -> Tensor:
    """t in [0, 1] as (1,), rounded the way the variant rounds it (§5.4)."""
    if variant.dtype_flow == "pure":
        return torch.tensor([now * 1000], device=latents.device).to(latents.dtype) / 1000
    return torch.tensor([now], device=latents.device).to(latents.dtype)


def _euler(latents: Tensor, prediction: Tensor, times: tuple[float, float], variant: Variant) -> Tensor:
    """One Euler step from t to the next; `latents` keep, gain or return to a dtype as the variant's do (§5.4)."""
    length = times[1] - times[0]  # of Python floats, as in the official loop: only the model sees t rounded
    if variant.dtype_flow == "autocast-state":
        return latents + length * prediction
    wide = torch.promote_types(latents.dtype, torch.float32)
    stepped = latents.to(wide) + length * prediction.to(wide)
    # diffusers' scheduler steps in float32 and returns the prediction's dtype; the official v1.1 loop stays wide.
    return stepped.to(prediction.dtype) if variant.dtype_flow == "pure" else stepped
