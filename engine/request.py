"""An edit asked for and made: its options, its noise, what is handed through the stages, and the result."""

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import torch
from torch import Tensor

from step1x.engine.algebra import OFF, ON, Algebra
from step1x.engine.errors import InputError
from step1x.engine.image import Canvas, fit, to_image
from step1x.engine.mask import pasted
from step1x.engine.picture import Picture, Source, save_picture
from step1x.engine.pixels import attach_alpha
from step1x.engine.policy import Policy
from step1x.engine.presets import SPEEDS
from step1x.engine.timing import OnStep, Recorder
from step1x.engine.variants import Variant
from step1x.profiles import Branches, Profile, Speed

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Posterior = Literal["sample", "mean"]
MAX_SEED = 2**63 - 1
Chosen = TypeVar("Chosen")


@dataclass(frozen=True, slots=True)
class Edit:
    """A finished edit: the picture (RGB, or RGBA where the source had transparency) and how it came about."""

    image: "Image"
    seed: int
    timings: dict[str, float]  # seconds per stage of timing.STAGES; "save" is there once it was saved
    steps: list[float]  # seconds per denoise step
    metadata: dict[
        str, str | int | float
    ]  # instruction, seed, steps, guidance, size, model, digest, and what went wrong

    def save(self, path: str | Path, *, metadata: bool = True, overwrite: bool = True) -> None:
        """Write PNG, JPEG or WebP, whole or not at all; a PNG carries `metadata`. Raises InputError."""
        start = time.perf_counter()
        save_picture(self.image, path, self.metadata if metadata else {}, overwrite=overwrite)
        self.timings["save"] = time.perf_counter() - start


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to sample; None leaves the choice to the model's variant."""

    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None  # 1 or below: none, and only one forward a step
    size: int | None = None  # level: the edit is computed at about size x size pixels in the source's aspect
    strength: float | None = None  # img2img: start from the noised source instead of pure noise
    posterior: Posterior = "sample"
    branches: Branches | None = None  # None: as the profile says, which may leave it to the variant
    exact_algebra: Algebra | bool = True  # rewrites that change rounding only
    speed: Speed | None = None  # how much is left out (presets.py); None: as the profile says
    mask: Source | None = None  # of the picture's size: only what it marks, bright or opaque, changes
    policy: Policy | None = None  # instead of `speed`: what each step leaves out (policy.py)

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise InputError(f"guidance must be a finite number of at least 0, got {self.guidance}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"strength must be above 0 and at most 1, got {self.strength}")
        if self.posterior not in ("sample", "mean"):
            raise InputError(f"posterior must be 'sample' or 'mean', got {self.posterior!r}")
        if self.branches not in (None, "batched", "sequential"):
            raise InputError(f"branches must be 'batched' or 'sequential', got {self.branches!r}")
        if self.speed not in (None, *SPEEDS):
            raise InputError(f"speed must be one of {', '.join(SPEEDS)}, got {self.speed!r}")
        if self.policy is not None and self.speed is not None:
            raise InputError("speed and policy are two ways to say one thing; give one")
        if not isinstance(self.exact_algebra, Algebra | bool):
            raise InputError(f"exact_algebra must be True, False or an Algebra, got {self.exact_algebra!r}")

    @property
    def algebra(self) -> Algebra:
        if isinstance(self.exact_algebra, bool):
            return ON if self.exact_algebra else OFF
        return self.exact_algebra

    def facts(self, variant: Variant) -> dict[str, str | int | float]:
        """What metadata say of it."""
        found: dict[str, str | int | float] = {
            "negative_prompt": self.negative_prompt,
            "steps": variant.steps if self.steps is None else self.steps,
            "guidance": variant.guidance if self.guidance is None else self.guidance,
            "size": variant.size if self.size is None else self.size,
            "variant": variant.name,
        }
        return found if self.strength is None else {**found, "strength": self.strength}


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a profile says of how an edit is made."""

    speed: Speed = "exact"
    branches: Branches | None = None  # None: as the variant's own program
    eight_bit_keys: bool = False  # and values, that are kept between steps

    @classmethod
    def of(cls, profile: Profile) -> Self:
        return cls(speed=profile.speed, branches=profile.branches, eight_bit_keys=profile.kv_dtype == "float8")


@dataclass(frozen=True, slots=True)
class Noise:
    """Everything random about one edit, drawn on the CPU from its seed, so that devices agree (§5.2).

    The posterior's noise is drawn first, then the latents', as the diffusers pipelines do.
    """

    posterior: Tensor  # (1, 16, rows, columns) float32
    latents: Tensor

    @classmethod
    def draw(cls, seed: int, canvas: Canvas, channels: int) -> Self:
        generator = torch.Generator().manual_seed(seed)
        shape = (1, channels, *canvas.latent_size)
        return cls(*(torch.randn(shape, generator=generator) for _ in range(2)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be made in one batch; `opened` None is text to image."""

    opened: Sequence[Picture] | None
    instructions: list[str]
    seeds: list[int]
    canvas: Canvas
    recorder: Recorder
    on_step: OnStep | None
    marked: "list[np.ndarray] | None" = None  # of each picture, what may change (mask.py)

    def finished(self, index: int, pixels: Tensor, truncate: bool) -> "Image":
        """An edited picture at its source's size, with its transparency, and its pixels outside a mask.

        pixels: (3, height, width), nominally in [-1, 1]. truncate: as `image.to_image`.
        """
        from PIL.Image import Resampling

        assert self.opened is not None
        source, image = self.opened[index], to_image(pixels, truncate)
        if image.size != source.rgb.size:
            image = image.resize(source.rgb.size, Resampling.BICUBIC)
        if self.marked is not None:
            image = pasted(image, source.rgb, self.marked[index])
        return image if source.alpha is None else attach_alpha(image, source.alpha)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Pictures (batch, 3, height, width), nominally in [-1, 1], and what metadata say of how they came about."""

    pixels: Tensor
    notes: dict[str, str | int | float] = field(default_factory=dict)


def canvas_of(opened: Sequence[Picture], level: int) -> Canvas:
    """The canvas of a batch at a size level. Raises InputError if its pictures come out at several sizes."""
    canvases = {Canvas(*fit(*picture.rgb.size, level)) for picture in opened}
    if len(canvases) > 1:
        sizes = ", ".join(sorted(f"{canvas.width}x{canvas.height}" for canvas in canvases))
        raise InputError(f"pictures of one batch must come out at one size, these at {sizes}")
    return canvases.pop()


def chosen(kind: type[Chosen], options: dict[str, object]) -> Chosen:
    """Keyword options as a dataclass. Raises InputError for a name that is none of its fields."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(options) - set(known)):
        raise InputError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**options)


def checked_seed(seed: int | None) -> int:
    """`seed`, or a fresh 32-bit one for None. Raises InputError outside 0..2^63-1."""
    if seed is None:
        return secrets.randbits(32)
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed must be between 0 and {MAX_SEED}, got {seed}")
    return seed
