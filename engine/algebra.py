"""Exact rewrites of the sampling loop: the same function in real arithmetic with less work.

- Padded text rows are identical all the way (model.md §3.9): n of them as keys are one of them with log n added to its
  logit. `collapse` cuts them down.
- What depends on the step but not on the latents (connector, every modulation vector) is computed for all steps at
  once: `fold`. The modulation's 3.2 B parameters are not touched within the loop, so they may stay in host memory.
- The velocity of the reference tokens is never used: the last block and the final layer leave them out
  (`DiT.velocity(kept=...)`).
- Template and picture are read once by the text model (prefix.py).
- The blocks run through fused operations (fused.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.engine.connector import PreparedText
from step1x.engine.dit import DiT, Request, Step
from step1x.engine.text import Conditioning, padded


@dataclass(frozen=True, kw_only=True, slots=True)
class Algebra:
    """Which rewrites are used."""

    collapse: bool = True
    fold: bool = True
    prune: bool = True
    share: bool = True
    fuse: bool = True


ON = Algebra()
OFF = Algebra(collapse=False, fold=False, prune=False, share=False, fuse=False)
CHUNK = 8  # steps that are folded at once: the connector's rows of all 28 would take gigabytes


def collapse(conditionings: Sequence[Conditioning], multiple: int = 1) -> list[Conditioning]:
    """The same conditionings with their padding cut to a common length, and the bias that makes up for it.

    The length is two rows more than the longest has, rounded up to a `multiple`. Conditionings of unknown validity,
    and those that would not get shorter, come back as they are.
    """
    rows = conditionings[0].text.tokens.shape[1]
    valid = [one.valid for one in conditionings]
    if any(count is None for count in valid):
        return list(conditionings)
    kept = math.ceil((max(count for count in valid if count is not None) + 2) / multiple) * multiple
    if kept >= rows:
        return list(conditionings)
    first = min(count for count in valid if count is not None)
    return [_cut(one, kept, kept - first) for one in conditionings]


def masked(conditionings: Sequence[Conditioning], multiple: int = 1) -> list[Conditioning]:
    """The same conditionings at one length, that of the longest rounded up to a `multiple`.

    What is added is padding that no row attends to: its logits carry a bias of -inf.
    """
    longest = max(one.text.tokens.shape[1] for one in conditionings)
    rows = math.ceil(longest / multiple) * multiple
    lengths = {one.text.tokens.shape[1] for one in conditionings}
    return list(conditionings) if lengths == {rows} else [_lengthened(one, rows) for one in conditionings]


def _lengthened(one: Conditioning, rows: int) -> Conditioning:
    tokens, bias = one.text.tokens, one.text.bias
    if bias is None:
        bias = torch.zeros(tokens.shape[:2], dtype=torch.promote_types(tokens.dtype, torch.float32))
        bias = bias.to(tokens.device)
    longer = padded(one, rows)
    bias = F.pad(bias, (0, rows - tokens.shape[1]), value=-math.inf)
    return replace(longer, text=replace(longer.text, bias=bias, biased=None))


def _cut(one: Conditioning, kept: int, biased: int) -> Conditioning:
    text, valid = one.text, one.valid
    assert valid is not None
    rows = text.tokens.shape[1]
    bias = torch.zeros(1, kept, dtype=torch.float64)
    bias[:, valid:] = torch.tensor(spread(rows - valid, kept - valid), dtype=torch.float64)
    text = replace(
        text,
        tokens=text.tokens[:, :kept],
        mask=text.mask[:, :kept],
        embeds=None if text.embeds is None else text.embeds[:, :kept],
        quoted=None if text.quoted is None else text.quoted[:, :kept],
        bias=bias.to(torch.promote_types(text.tokens.dtype, torch.float32)).to(text.tokens.device),
        biased=biased,
    )
    return Conditioning(text=text, ids=one.ids[:, :kept], valid=valid)


def spread(copies: int, rows: int) -> list[float]:
    """Logit biases by which `rows` keys, at least two, stand for `copies` of them: their exponentials add up to that.

    A bias is rounded to the model's dtype, and a bfloat16 would be wrong by up to 2 %. So all but the last are
    bfloat16 numbers, and the last makes up for what they lack: little, so that its rounding does not count.
    """
    exact = torch.tensor(math.log((copies - 1) / (rows - 1)), dtype=torch.float64)
    rounded = exact.to(torch.bfloat16).double()
    if rounded > exact:
        rounded = torch.nextafter(exact.to(torch.bfloat16), torch.tensor(-math.inf, dtype=torch.bfloat16)).double()
    each = float(rounded)
    return [each] * (rows - 1) + [math.log(copies - (rows - 1) * math.exp(each))]


def fold(dit: DiT, requests: Sequence[Request], times: Sequence[Tensor]) -> list[list[Step]]:
    """For each request, what each step needs besides the latents; `times` in [0, 1], (1,) each, of any dtypes.

    Each modulation is one product for all requests and steps: its weights are read, or copied from the host, once.
    """
    vectors: list[Tensor] = []
    contexts: list[list[Tensor]] = []
    for request in requests:
        contexts.append([])
        for _, same in groupby(times, key=lambda time: time.dtype):
            for some in torch.cat(list(same)).split(CHUNK):
                repeated, at = _repeated(request, len(some)), some.repeat_interleave(request.rows)
                vectors += dit.vector(repeated, at).split(request.rows)
                contexts[-1] += dit.context(repeated, at).split(request.rows)
    parts = iter(dit.modulate(torch.cat(vectors)).split([len(vector) for vector in vectors]))
    return [
        [Step(rows, next(parts), request.bias, request.biased) for rows in of_request]
        for request, of_request in zip(requests, contexts, strict=True)
    ]


def _repeated(request: Request, times: int) -> Request:
    def longer(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows.repeat(times, *[1] * (rows.ndim - 1))

    text = request.text
    prepared = PreparedText(**{name: longer(getattr(text, name)) for name in text.__dataclass_fields__})  # type: ignore[arg-type]
    return Request(prepared, longer(request.mapped), None)
