"""Flow matching for the edit transformer (model.md §9): the loss, and the sampling of times."""

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.engine.dit import DiT, Text
from step1x.engine.image import image_ids, pack

CHANGED = 0.05  # mean square of what an edit changes in a token of latents, which have a deviation of about 1


def times(count: int, shift: float, spread: float, generator: torch.Generator) -> Tensor:
    """Noise levels (count,) in (0, 1): logit-normal of deviation `spread`, shifted by `shift` towards noise (§9).

    One level falls into each of `count` equally likely strata, so that batches are alike in difficulty.
    """
    uniform = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    s = torch.sigmoid(spread * torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
    return shift * s / (1 + (shift - 1) * s)


def flow_loss(
    dit: DiT,
    text: Text,
    latents: tuple[Tensor, Tensor],
    reference_ids: tuple[int, int, int],
    sigma: Tensor,
    noise: Tensor,
    weights: Tensor | None = None,
    own: int = 0,
) -> Tensor:
    """Squared error of the velocity, per sample (batch,), float32.

    latents: (source, target), each (batch, 16, h, w), scaled; sigma: (batch,) noise levels in [0, 1], above 0 in the
    first `own` samples; noise: like the target. x = (1 - sigma) target + sigma noise, and the velocity is
    noise - target (§9).

    weights: of the packed error, broadcast to (batch, N, 64); any positive ones leave the best velocity what it is.
    own: in so many samples, the first ones, x is where one step of the model from the noise comes to at sigma, and
    the velocity is the one that leads from there to the target, (x - target) / sigma.
    """
    source, target = (pack(part) for part in latents)
    noise_tokens = pack(noise)
    grid = (latents[1].shape[2] // 2, latents[1].shape[3] // 2)
    level = sigma[:, None, None]
    noisy, wanted = (1 - level) * target + level * noise_tokens, noise_tokens - target
    ids = image_ids(grid, reference_ids).to(target.device)
    rope = dit.rope(torch.zeros(1, text.tokens.shape[1], 3, device=target.device), ids)

    def velocity(tokens: Tensor, levels: Tensor) -> Tensor:
        count = len(tokens)
        words = Text(text.tokens[:count], text.mask[:count])
        return dit(torch.cat((tokens, source[:count]), dim=1), words, levels, rope)[:, : target.shape[1]]

    if own:
        with torch.no_grad():
            step = velocity(noise_tokens[:own], torch.ones_like(sigma[:own]))
        arrived = noise_tokens[:own] + (level[:own] - 1) * step.to(noise_tokens.dtype)
        noisy = torch.cat((arrived, noisy[own:]))
        wanted = torch.cat(((arrived - target[:own]) / level[:own], wanted[own:]))
    error = (velocity(noisy, sigma).float() - wanted.float()).square()
    return (error if weights is None else error * weights).mean((1, 2))


def altered(source: Tensor, target: Tensor) -> Tensor:
    """1 at tokens (batch, N, 1) that a local edit changes, and at their neighbours; 0 for an edit of more than half.

    source and target: latents (batch, 16, h, w).
    """
    changed = (F.avg_pool2d((target - source).square().mean(1, keepdim=True), 2) > CHANGED).float()
    local = (changed.mean((2, 3), keepdim=True) < 0.5).float()
    return (F.max_pool2d(changed, 3, 1, 1) * local).flatten(2).mT
