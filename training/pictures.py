"""Pictures to train on: crops of photographs, and procedural scenes."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from step1x.training.edits import Picture, Random

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}

LEAST = 0.35  # share of a photograph that a crop shows at least


class Photographs:
    """All photographs of a folder, held as RGB; random crops at random scales, some of them mirrored.

    Raises ValueError when the folder holds none.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(f"no photographs (.jpg, .png, .webp) in {folder}")
        self.images = [Image.open(path).convert("RGB") for path in paths]

    def crop(self, random: Random, height: int, width: int, least: float = LEAST) -> Picture:
        """One picture (height, width, 3): at least `least` of the largest crop of a photograph, seldom upscaled."""
        image = self.images[int(random.integers(len(self.images)))]
        largest = min(image.width / width, image.height / height)
        smallest = min(largest, max(1.0, least * largest))
        scale = np.exp(random.uniform(np.log(smallest), np.log(largest)))
        box_width, box_height = width * scale, height * scale
        left = random.uniform(0, max(image.width - box_width, 0))
        top = random.uniform(0, max(image.height - box_height, 0))
        box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))
        small = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
        picture = np.asarray(small, dtype=np.float32) / 255
        return np.ascontiguousarray(picture[:, ::-1]) if random.random() < 0.5 else picture


def _noise(random: Random, height: int, width: int) -> Picture:
    """Smooth coloured noise: random fields of a few scales, added."""
    total = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((2, 1.0), (4, 0.6), (9, 0.35), (24, 0.2)):
        field = random.random((cells + 1, cells + 1, 3), dtype=np.float32)
        image = Image.fromarray((field * 255).astype(np.uint8))
        smooth = image.resize((width, height), Image.Resampling.BICUBIC)
        total += np.float32(weight) * np.asarray(smooth, np.float32) / 255
    total = (total - total.mean()) / (total.std() + 1e-3)
    return np.clip(0.5 + total * random.uniform(0.1, 0.25) + random.uniform(-0.2, 0.2), 0, 1)


def scene(random: Random, height: int, width: int) -> Picture:
    """A procedural picture (height, width, 3): smooth noise with a few rectangles, ellipses and lines."""
    background = _noise(random, height, width)
    image = Image.fromarray((background * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(0, 9))):
        x, y = random.uniform(-0.1, 1, 2) * (width, height)
        w, h = random.uniform(0.05, 0.5, 2) * (width, height)
        colour = tuple(int(c) for c in random.integers(0, 256, 3))
        kind = int(random.integers(3))
        if kind == 0:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
        elif kind == 1:
            draw.ellipse((x, y, x + w, y + h), fill=colour)
        else:
            draw.line((x, y, x + w, y + h), fill=colour, width=int(random.integers(1, 6)))
    return np.asarray(image, dtype=np.float32) / 255


def picture(
    photographs: Photographs, random: Random, height: int, width: int, scenes: float, least: float = LEAST
) -> Picture:
    """A procedural scene with probability `scenes`, else a crop of a photograph."""
    if random.random() < scenes:
        return scene(random, height, width)
    return photographs.crop(random, height, width, least)
