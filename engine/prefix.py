"""Beginnings of token strings that the language model has read, kept so that they are read once.

Attention is causal: hidden states, keys and values of a token depend on those before it alone. Every request begins
with the template; both guidance branches and every later instruction about a picture go on with that picture. A string
is always read in these pieces, whether the first ones are known or not, so that results do not depend on what was
read before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Layer = tuple[Tensor, Tensor]  # keys and values of one layer, (1, heads, tokens, head_dim)


@dataclass(frozen=True, slots=True)
class Reading:
    """The first tokens of a string as the language model left them."""

    ids: Sequence[int]
    picture: bytes  # digest of the picture among them, b"" if there is none
    hidden: Tensor  # (tokens, width), after the final norm
    layers: Sequence[Layer]

    def begins(self, ids: Sequence[int], picture: bytes, like: Tensor) -> bool:
        """Whether a string with these first tokens goes on from here, on the device and in the dtype of `like`."""
        same = (self.ids, self.picture) == (ids, picture)
        return same and (self.hidden.device, self.hidden.dtype) == (like.device, like.dtype)


def stops(ids: Sequence[int], template: int, picture_token: int, picture_first: bool) -> list[int]:
    """Where the pieces of a string end: the template, the picture if it is before the instruction, the string."""
    ends = {min(template, len(ids)), len(ids)}
    if picture_first and picture_token in ids:
        ends.add(len(ids) - list(reversed(ids)).index(picture_token))
    return sorted(ends - {0})
