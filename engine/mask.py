"""A user's mask: which part of a picture an edit may change."""

import numpy as np
from PIL import Image, ImageFilter

from step1x.engine.errors import InputError
from step1x.engine.picture import Picture, Source, open_picture

HALF = 128  # of 255: from here on a pixel is marked
FULL = 0.95  # weight of the edit that a mask must reach somewhere to have a seam
SEAM = 0.01  # of the longer side: over this width, within the mask, the edit fades in


def open_mask(source: Source, picture: Picture) -> np.ndarray:
    """Marked pixels (height, width) bool: where a mask is opaque if it has transparency, else where it is bright.

    Raises InputError for what is no picture, has another size than the one to edit, or marks nothing.
    """
    found = open_picture(source)
    if found.rgb.size != picture.rgb.size:
        width, height = found.rgb.size
        own = "{} x {}".format(*picture.rgb.size)
        raise InputError(f"{found.name}: the mask is {width} x {height}, the picture {own}; make them one size")
    marked = np.asarray(found.rgb.convert("L") if found.alpha is None else found.alpha) >= HALF
    if not marked.any():
        raise InputError(f"{found.name}: the mask marks nothing; paint white what the edit may change")
    return marked


def pasted(edited: Image.Image, source: Image.Image, marked: np.ndarray) -> Image.Image:
    """The edit within the mask, fading in from its border, and the source's own pixels outside."""
    radius = max(SEAM * max(source.size), 0.5)
    mask = Image.fromarray(marked.astype(np.uint8) * 255)
    blurred = np.asarray(mask.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)
    weight = np.clip(blurred / 127.5 - 1, 0, 1) * marked  # a blurred border is at half its height
    if weight.max() < FULL:  # thinner than two seams: it has none
        weight = marked.astype(np.float32)
    return Image.composite(edited, source, Image.fromarray((weight * 255 + 0.5).astype(np.uint8)))
