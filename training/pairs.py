"""Encoded training pairs, kept in pools so that each picture is encoded once and drawn a few times."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from step1x.engine.text import Conditioner
from step1x.engine.text_ids import Grid
from step1x.engine.vae import VAE
from step1x.training.edits import FAMILIES, Picture, Random, sample
from step1x.training.pictures import Photographs, picture


@dataclass(frozen=True, slots=True)
class Pairs:
    """A batch: source and target latents (batch, 16, h, w), the text model's patches, and the instructions."""

    source: Tensor
    target: Tensor
    patches: Tensor
    grid: Grid
    instructions: list[str]


def as_tensor(pictures: list[Picture]) -> Tensor:
    """(batch, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() * 2 - 1


class Pool:
    """Encoded pairs of one canvas size. `draw` replaces some of them by new ones, then samples a batch."""

    def __init__(
        self,
        photographs: Photographs,
        vae: VAE,
        conditioner: Conditioner,
        canvas: tuple[int, int],
        *,
        size: int,
        scenes: float,
        weights: Mapping[str, float],
    ) -> None:
        self.photographs, self.vae, self.conditioner = photographs, vae, conditioner
        self.width, self.height = canvas
        self.size, self.scenes = size, scenes
        chances = np.array([weights.get(family, 1.0) for family in FAMILIES])
        self.chances = chances / chances.sum()
        self.entries: list[tuple[Tensor, Tensor, Tensor, str]] = []
        self.grid: Grid | None = None

    @torch.no_grad()
    def _fill(self, random: Random, count: int) -> None:
        made = []
        for family in random.choice(len(FAMILIES), count, p=self.chances):
            base = picture(self.photographs, random, self.height, self.width, self.scenes)
            made.append(sample(FAMILIES[family], base, random))
        pixels = as_tensor([one.source for one in made] + [one.target for one in made])
        device = self.vae.encoder.conv_in.weight.device
        latents = self.vae.encode(pixels.to(device))
        for index, one in enumerate(made):
            shown = Image.fromarray((one.source * 255 + 0.5).astype(np.uint8))
            patches, self.grid = self.conditioner.patches(shown)
            entry = (latents[index], latents[index + count], patches, one.instruction)
            if len(self.entries) < self.size:
                self.entries.append(entry)
            else:
                self.entries[int(random.integers(self.size))] = entry

    def draw(self, random: Random, batch: int, refresh: float) -> Pairs:
        """A batch after encoding `refresh` of its size anew; the pool is filled on the first call."""
        while len(self.entries) < self.size:
            self._fill(random, min(64, self.size - len(self.entries)))
        self._fill(random, max(1, round(batch * refresh)))
        chosen = [self.entries[i] for i in random.choice(self.size, batch, replace=False)]
        assert self.grid is not None
        source, target, patches = (torch.stack([entry[i] for entry in chosen]) for i in range(3))
        return Pairs(source, target, patches, self.grid, [entry[3] for entry in chosen])
