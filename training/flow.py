"""Flow matching for the edit transformer (model.md §9): the loss, and the sampling of times."""

import torch
from torch import Tensor

from step1x.engine.dit import DiT, Text
from step1x.engine.image import image_ids, pack


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
) -> Tensor:
    """Squared error of the velocity, per sample (batch,), float32.

    weights: (16,) of the latent channels, mean 1; any positive ones leave the best velocity what it is.

    latents: (source, target), each (batch, 16, h, w), scaled; sigma: (batch,) noise levels in [0, 1]; noise: like
    the target. x = (1 - sigma) target + sigma noise, and the velocity is noise - target (§9).
    """
    source, target = (pack(part) for part in latents)
    noise_tokens = pack(noise)
    grid = (latents[1].shape[2] // 2, latents[1].shape[3] // 2)
    level = sigma[:, None, None]
    noisy = (1 - level) * target + level * noise_tokens
    ids = image_ids(grid, reference_ids).to(target.device)
    rope = dit.rope(torch.zeros(1, text.tokens.shape[1], 3, device=target.device), ids)
    velocity = dit(torch.cat((noisy, source), dim=1), text, sigma, rope)[:, : target.shape[1]]
    error = (velocity.float() - (noise_tokens - target).float()).square()
    if weights is not None:
        error = error * weights.repeat_interleave(error.shape[2] // len(weights))
    return error.mean((1, 2))
