"""Which rows a region step evaluates: the edited tokens, and as many others as fill a bucket (step-skipping.md §1.10).

Row counts of region steps are multiples of a bucket, so that few graphs serve all requests. What fills a bucket up is
computed for nothing but a larger region: the tokens next in line to be edited. One number of each picture is read back
from the device, once a request.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.engine.errors import InputError

BUCKET = 256  # §1.10: 16 sizes at 1024 x 1024; at most one bucket of rows is computed beside the edited ones
MOST = 0.6  # share of edited tokens above which a region saves too little, and all target tokens are evaluated


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of region steps, the same number for every picture of a batch.

    active: (batch, R) target tokens that are evaluated, ascending; kept: (batch, N - R), the others, ascending; both
    int64. edited: of each picture, how many of the active ones are edited. fell_back: R is N, because of too many.
    """

    active: Tensor
    kept: Tensor
    edited: tuple[int, ...]
    fell_back: bool


def choose(edited: Tensor, order: Tensor, bucket: int = BUCKET, most: float = MOST) -> Selection:
    """The rows to evaluate: all edited tokens, then those lowest in `order`, up to a multiple of `bucket`.

    edited: (batch, N) bool, of `plan.edited_tokens` or `token_mask`; order: (batch, N), such as `plan.similarity` or
    `distance`. Ties go by position. There is at least one bucket, even for an empty mask. All N are taken if a picture
    has more than the share `most` of them edited, or they fit in the buckets anyway. Raises InputError for a bucket
    below 1.
    """
    if bucket < 1:
        raise InputError(f"a bucket has at least one token, got {bucket}")
    tokens = edited.shape[1]
    counts: list[int] = edited.sum(dim=1).tolist()  # the one wait for the device
    rows = max(1, -(-max(counts) // bucket)) * bucket
    fell_back = max(counts) > most * tokens
    rows = tokens if fell_back else min(rows, tokens)
    ranked = order.masked_fill(edited, -torch.inf).argsort(dim=1, stable=True)
    active, kept = (part.sort(dim=1).values for part in ranked.split((rows, tokens - rows), dim=1))
    return Selection(active, kept, tuple(counts), fell_back)


def token_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A user's mask as edited tokens: those with any marked cell in them.

    mask: (batch, rows, columns) bool of any size, over the whole picture; grid: rows and columns of tokens. Returns
    (batch, tokens) bool. Raises InputError if a mask marks nothing.
    """
    if not mask.flatten(1).any(dim=1).all():
        raise InputError("the mask marks nothing: mark what the edit may change")
    return F.adaptive_max_pool2d(mask.float()[:, None], grid)[:, 0].flatten(1) > 0


def distance(edited: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far each token is from the nearest edited one, in steps to any of 8 neighbours: (batch, tokens) float32.

    edited: (batch, tokens) bool on `grid`. 0 on edited tokens; max(grid) where there is none.
    """
    reached = edited.unflatten(1, grid)[:, None].float()
    far = 1 - reached
    for _ in range(max(grid) - 1):
        reached = F.max_pool2d(reached, 3, stride=1, padding=1)
        far = far + (1 - reached)
    return far[:, 0].flatten(1)
