"""Beginnings of token strings: when one is gone on from, where the pieces end; sharing them changes nothing."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from step1x.engine.prefix import Reading, stops
from step1x.engine.text import Conditioner
from step1x.engine.variants import DIFFUSERS_V11, DIFFUSERS_V12, Variant
from step1x.training.tokenizer import count_template_tokens, small_text_model, train_tokenizer

PICTURE = 9
TOKENIZER = train_tokenizer(["make it snow", "remove the red circle", DIFFUSERS_V11.prefix] * 4, 400)
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


def conditioner(row: Variant) -> Conditioner:
    torch.manual_seed(0)
    sizes = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 48}
    vision = {"vision_hidden": 16, "vision_depth": 2, "vision_heads": 2, "vision_intermediate": 24}
    model = small_text_model(TOKENIZER, **sizes, **vision).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    row = replace(
        row,
        template_tokens=count_template_tokens(TOKENIZER, row.prefix),
        text_tokens=80,
        min_pixels=4 * 28**2,
        max_pixels=24 * 28**2,
    )
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 1, "longest_edge": 1})
    return Conditioner(model.double(), TOKENIZER, pictures, row)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 160, 3), dtype=np.uint8))


@pytest.mark.parametrize("row", [DIFFUSERS_V11, DIFFUSERS_V12], ids=lambda row: row.version)
def test_sharing_changes_nothing_in_float64(row: Variant) -> None:
    encoder = conditioner(row)
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
def test_results_do_not_depend_on_what_was_read_before(row: Variant) -> None:
    encoder = conditioner(row)
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


def test_template_and_picture_are_read_once() -> None:
    encoder = conditioner(DIFFUSERS_V11)
    whole, seen = tokens_read(encoder, picture(0), PROMPTS[:1])
    assert seen == 1
    behind, seen = tokens_read(encoder, picture(0), PROMPTS[:1])
    assert (behind < 30, seen) == (True, 0)  # instruction and end of the chat
    other, seen = tokens_read(encoder, picture(1), PROMPTS[:1])
    assert (whole - other, seen) == (encoder._variant.template_tokens, 1)
    both, _ = tokens_read(conditioner(DIFFUSERS_V11), picture(0), ["make it snow", "make it snow"])
    assert both == whole + behind


def test_a_model_that_was_moved_reads_again() -> None:
    encoder = conditioner(DIFFUSERS_V11)
    encoder.encode(picture(0), PROMPTS)
    encoder.model.float()
    rows = encoder.encode(picture(0), PROMPTS)[0].text.tokens
    assert rows.dtype == torch.float32
