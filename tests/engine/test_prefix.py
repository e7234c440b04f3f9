"""Beginnings of token strings: when one is gone on from, where the pieces end; sharing them changes nothing."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from step1x.engine.prefix import Reading, stops
from step1x.engine.text import Conditioner
from step1x.engine.variants import DIFFUSERS_V11, DIFFUSERS_V12, Variant

PICTURE = 9
Build = Callable[[Variant], Conditioner]
PROMPTS = ["make it snow", "", "remove the red circle!"]


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 4), st.lists(st.integers(0, 5), max_size=6))
def test_pieces_end_at_template_picture_and_end(before: list[int], count: int, behind: list[int]) -> None:
    ids = [*before, *[PICTURE] * count, *behind]
    for first in (True, False):
        ends = stops(ids, 3, PICTURE, first)
        assert ends == sorted(set(ends))
        assert not ids or ends[-1] == len(ids)
        assert min(3, len(ids)) in ends or not ids
        assert (len(before) + count in ends) or not (first and count)


def test_what_goes_on_from_a_reading() -> None:
    kept = Reading([1, 2], b"a", torch.zeros(2, 4), [])
    like = torch.zeros(1)
    assert kept.begins([1, 2], b"a", like)
    assert not kept.begins([1, 3], b"a", like)
    assert not kept.begins([1, 2], b"b", like)
    assert not kept.begins([1, 2], b"a", like.double())
    assert not kept.begins([1, 2], b"a", like.to("meta"))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 160, 3), dtype=np.uint8))


@pytest.mark.parametrize("row", [DIFFUSERS_V11, DIFFUSERS_V12], ids=lambda row: row.version)
def test_sharing_changes_nothing_in_float64(small_conditioner: Build, row: Variant) -> None:
    encoder = small_conditioner(row)
    worst = 0.0
    for shown in (picture(0), picture(0), picture(1)):
        plain = encoder.encode(shown, PROMPTS, share=False)
        for ours, theirs in zip(encoder.encode(shown, PROMPTS), plain, strict=True):
            worst = max(worst, float((ours.text.tokens - theirs.text.tokens).abs().max()))
            assert torch.equal(ours.ids, theirs.ids)
            assert torch.equal(ours.text.mask, theirs.text.mask)
    print(f"{row.version}: worst difference {worst:.1e}")
    assert worst < 1e-12


@pytest.mark.parametrize("row", [DIFFUSERS_V11, DIFFUSERS_V12], ids=lambda row: row.version)
def test_results_do_not_depend_on_what_was_read_before(small_conditioner: Build, row: Variant) -> None:
    encoder = small_conditioner(row)
    fresh = copy.copy(encoder).encode(picture(0), PROMPTS[:1])[0]
    encoder.encode(picture(1), PROMPTS)
    encoder.encode(picture(0), PROMPTS[1:])
    again = encoder.encode(picture(0), PROMPTS[:1])[0]
    assert torch.equal(fresh.text.tokens, again.text.tokens)


def tokens_read(encoder: Conditioner, shown: Image.Image, prompts: list[str]) -> tuple[int, int]:
    """Tokens that went through the language model, and pictures through the vision tower."""
    counts = [0, 0]

    def language(_: object, __: object, words: dict[str, torch.Tensor]) -> None:
        counts[0] += words["inputs_embeds"].shape[1]

    def vision(*_: object) -> None:
        counts[1] += 1

    hooks = [
        encoder.model.language_model.register_forward_pre_hook(language, with_kwargs=True),
        encoder.model.visual.register_forward_pre_hook(vision),
    ]
    encoder.encode(shown, prompts)
    for hook in hooks:
        hook.remove()
    return counts[0], counts[1]


def test_template_and_picture_are_read_once(small_conditioner: Build) -> None:
    encoder = small_conditioner(DIFFUSERS_V11)
    whole, seen = tokens_read(encoder, picture(0), PROMPTS[:1])
    assert seen == 1
    behind, seen = tokens_read(encoder, picture(0), PROMPTS[:1])
    assert (behind < 30, seen) == (True, 0)  # instruction and end of the chat
    other, seen = tokens_read(encoder, picture(1), PROMPTS[:1])
    assert (whole - other, seen) == (encoder.variant.template_tokens, 1)
    both, _ = tokens_read(small_conditioner(DIFFUSERS_V11), picture(0), ["make it snow", "make it snow"])
    assert both == whole + behind


def test_a_model_that_was_moved_reads_again(small_conditioner: Build) -> None:
    encoder = small_conditioner(DIFFUSERS_V11)
    encoder.encode(picture(0), PROMPTS)
    encoder.model.float()
    rows = encoder.encode(picture(0), PROMPTS)[0].text.tokens
    assert rows.dtype == torch.float32
