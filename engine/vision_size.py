"""Picture sizes for Qwen2.5-VL: multiples of the vision factor, area within limits (model.md §1.5).

Sizes are (width, height) in pixels. The factor is patch size times merge size, 28 in the released model.
"""

import math

from step1x.engine.errors import InputError

MAX_RATIO = 200  # the processor refuses longer strips
PRE_MIN_TOKENS = 4  # limits of the resize before the processor's, in merged patches
PRE_MAX_TOKENS = 16384


def pre_size(width: int, height: int, factor: int) -> tuple[int, int]:
    """The size that v1.0 and v1.1 give a picture before the processor sees it."""
    columns = max(factor, round(width / factor) * factor)
    rows = max(factor, round(height / factor) * factor)
    return _limited((width, height), (columns, rows), factor, PRE_MIN_TOKENS * factor**2, PRE_MAX_TOKENS * factor**2)


def processor_size(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size the image processor gives a picture.

    Raises InputError for one side over 200 times the other.
    """
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_RATIO:
        raise InputError(
            f"the picture is too long and thin for the text model: {width}x{height}, "
            f"one side may be at most {MAX_RATIO} times the other"
        )
    # Python's round: halves go to the even multiple, as in the reference.
    rounded = (round(width / factor) * factor, round(height / factor) * factor)
    return _limited((width, height), rounded, factor, min_pixels, max_pixels)


def _limited(
    size: tuple[int, int], rounded: tuple[int, int], factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """`rounded` where its area is allowed, else `size` scaled to the limit and rounded to its inner side."""
    area = rounded[0] * rounded[1]
    if area > max_pixels:
        scale = math.sqrt(size[0] * size[1] / max_pixels)
        width, height = (max(factor, math.floor(side / scale / factor) * factor) for side in size)
        return width, height
    if area < min_pixels:
        scale = math.sqrt(min_pixels / (size[0] * size[1]))
        width, height = (math.ceil(side * scale / factor) * factor for side in size)
        return width, height
    return rounded
