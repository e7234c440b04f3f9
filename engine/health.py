"""Whether a result of coarse arithmetic is one: 8-bit numbers can overflow where wider ones do not."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLAT = 2 / 255  # range of a picture in [-1, 1] below which it is of one colour


def first_lost(trail: Sequence[Tensor]) -> int | None:
    """The first of some tensors that holds a NaN or an infinity; None: none does. Reads back once."""
    whole = torch.stack([one.isfinite().all() for one in trail]).tolist()
    return whole.index(False) if False in whole else None


def is_flat(pictures: Tensor) -> bool:
    """Whether one of several pictures (batch, 3, height, width) is of one colour."""
    low, high = pictures.flatten(2).aminmax(dim=2)
    return bool(((high - low).amax(1) < FLAT).any())
