import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2VLImageProcessorPil

from step1x.engine.errors import InputError
from step1x.engine.text import Conditioner, Conditioning, black_picture, load_conditioner
from step1x.engine.variants import DIFFUSERS_V11, DIFFUSERS_V12, PREFIX_V1, PREFIX_V12, Variant
from step1x.engine.vision_size import pre_size
from step1x.training.tokenizer import (
    count_template_tokens,
    save_text_model,
    small_text_model,
    train_tokenizer,
)

PATCH = 28
TOKENIZER = train_tokenizer((PREFIX_V1, PREFIX_V12, "make it “blue”", "把图片变成黑白") * 3, 560)
PROMPTS = ("make the sky blue", "", "把图片变成“黑白”", 'write "hi!" now!')


def fitted(variant: Variant) -> Variant:
    changes = {
        "template_tokens": count_template_tokens(TOKENIZER, variant.prefix),
        "text_tokens": 70,
        "min_pixels": 4 * PATCH**2,
        "max_pixels": 24 * PATCH**2,
    }
    return variant.override(changes)


V11, V12 = fitted(DIFFUSERS_V11), fitted(DIFFUSERS_V12)
BOTH = pytest.mark.parametrize("variant", [V11, V12], ids=["v1.1", "v1.2"])


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLModel:
    torch.manual_seed(0)
    sizes = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 48}
    vision = {"vision_hidden": 16, "vision_depth": 2, "vision_heads": 2, "vision_intermediate": 24}
    model = small_text_model(TOKENIZER, **sizes, **vision)
    for parameter in model.parameters():  # away from the near-zero initial values
        parameter.data.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conditioner(model: Qwen2_5_VLModel, variant: Variant) -> Conditioner:
    return Conditioner(
        model, TOKENIZER, Qwen2VLImageProcessorPil(size={"shortest_edge": 1, "longest_edge": 1}), variant
    )


def reference(model: Qwen2_5_VLModel, variant: Variant, image: Image.Image, prompt: str) -> torch.Tensor:
    """hidden_states[-1] of the whole causal model of transformers, template cut off: (T, width)."""
    full = Qwen2_5_VLForConditionalGeneration(model.config).eval()
    full.model.load_state_dict(model.state_dict())
    picture = image
    if variant.pre_resize:
        picture = image.resize(pre_size(*image.size, PATCH), Image.Resampling.BICUBIC)
    limits = {"shortest_edge": variant.min_pixels, "longest_edge": variant.max_pixels}
    seen = Qwen2VLImageProcessorPil(size=limits)(images=[picture], return_tensors="pt")
    count = int(seen["image_grid_thw"].prod()) // 4
    ids = torch.tensor([conditioner(model, variant).tokenise(prompt, count)])
    types = (ids == full.config.image_token_id).int()
    mask = (ids > 0).long()
    positions, _ = full.model.get_rope_index(ids, types, seen["image_grid_thw"], attention_mask=mask)
    positions[:, ids == 0] = 1
    with torch.no_grad():
        output = full(
            input_ids=ids,
            attention_mask=mask if variant.quote_rule == "toggle" else None,
            position_ids=positions,
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
            output_hidden_states=True,
        )
    return output.hidden_states[-1][0, variant.template_tokens :]


@BOTH
@pytest.mark.parametrize("prompt", PROMPTS)
def test_equals_the_whole_model_of_transformers(
    model: Qwen2_5_VLModel, image: Image.Image, variant: Variant, prompt: str
) -> None:
    expected = reference(model, variant, image, prompt)[: variant.text_tokens]
    [encoded] = conditioner(model, variant).encode(image, [prompt])
    rows = encoded.text.tokens[0, : len(expected)]
    assert (rows - expected).abs().max() / expected.abs().max() <= 1e-5
    assert encoded.text.mask.sum() == len(expected)


def test_v11_pads_with_masked_zeros(model: Qwen2_5_VLModel, image: Image.Image) -> None:
    [encoded] = conditioner(model, V11).encode(image, [""])
    count = int(encoded.text.mask.sum())
    assert encoded.text.tokens.shape == (1, 70, 32)
    assert encoded.text.mask.tolist() == [[1] * count + [0] * (70 - count)]
    assert count < 70
    assert not encoded.text.tokens[0, count:].any()
    assert not encoded.text.tokens.requires_grad  # though this model's parameters do
    assert encoded.text.embeds is None
    assert encoded.text.quoted is None
    assert torch.equal(encoded.ids, torch.zeros(1, 70, 3))


def test_v12_keeps_embeddings_quotes_and_signed_ids(model: Qwen2_5_VLModel, image: Image.Image) -> None:
    encoder = conditioner(model, V12)
    [encoded] = encoder.encode(image, ['write "hi" now'])
    text = encoded.text
    length = text.tokens.shape[1]
    _, grid = encoder.patches(image)
    ids = torch.tensor(encoder.tokenise('write "hi" now', grid.rows * grid.columns)[V12.template_tokens :])
    assert length == len(ids) < 70
    assert text.mask.tolist() == [[1] * length]
    assert text.embeds is not None
    assert text.quoted is not None
    assert text.quoted.sum() == 2
    quoted = ids[text.quoted[0].bool()]
    assert TOKENIZER.decode(quoted) == "hi"
    written = ids != TOKENIZER.convert_tokens_to_ids("<|image_pad|>")
    table = model.language_model.embed_tokens.weight
    assert torch.equal(text.embeds[0, written], table[ids[written]])
    assert not torch.equal(text.embeds[0, ~written], table[ids[~written]])  # those are what the tower saw
    assert encoded.ids.shape == (1, length, 3)
    assert encoded.ids.dtype == torch.float32
    assert encoded.ids[0, -1].tolist() == [-1, 0, 0]
    assert encoded.ids[0, ~written, 1:].abs().sum() > 0


@BOTH
def test_long_instructions_are_cut(model: Qwen2_5_VLModel, image: Image.Image, variant: Variant) -> None:
    long = "make the sky blue and " * 40
    read = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    [encoded] = conditioner(model, variant).encode(image, [long])
    hook.remove()
    assert sum(read) == variant.template_tokens + 70  # nothing behind the cut is computed
    expected = reference(model, variant, image, long)[:70]
    assert encoded.text.tokens.shape == (1, 70, 32)
    assert encoded.text.mask.all()
    assert (encoded.text.tokens[0] - expected).abs().max() / expected.abs().max() <= 1e-5
    assert encoded.ids.shape == (1, 70, 3)


@BOTH
def test_prompts_of_one_call_do_not_meet(model: Qwen2_5_VLModel, image: Image.Image, variant: Variant) -> None:
    encoder = conditioner(model, variant)
    seen = []
    hook = model.visual.register_forward_hook(lambda *_: seen.append(1))
    together = encoder.encode(image, PROMPTS)
    hook.remove()
    assert len(seen) == 1  # the vision tower runs once for all of them
    for prompt, encoded in zip(PROMPTS, together, strict=True):
        assert_same(encoder.encode(image, [prompt])[0], encoded)


def assert_same(left: Conditioning, right: Conditioning) -> None:
    for a, b in (
        (left.text.tokens, right.text.tokens),
        (left.text.mask, right.text.mask),
        (left.ids, right.ids),
    ):
        assert torch.equal(a, b)


def test_two_conditioners_in_two_threads_do_not_meet(model: Qwen2_5_VLModel, image: Image.Image) -> None:
    """One model and one tokenizer under both, different pictures and variants."""
    encoders = [(conditioner(model, V11), image), (conditioner(model, V12), image.rotate(90, expand=True))]
    alone = [encoder.encode(picture, PROMPTS) for encoder, picture in encoders]

    def encode(index: int) -> list[list[Conditioning]]:
        encoder, picture = encoders[index]
        return [encoder.encode(picture, PROMPTS) for _ in range(4)]

    with ThreadPoolExecutor(2) as pool:
        for expected, results in zip(alone, pool.map(encode, (0, 1)), strict=True):
            for result in results:
                for left, right in zip(expected, result, strict=True):
                    assert_same(left, right)


@BOTH
def test_no_picture_means_a_black_one(model: Qwen2_5_VLModel, variant: Variant) -> None:
    encoder = conditioner(model, variant)
    assert black_picture().size == (1024, 1024)
    [expected] = encoder.encode(Image.new("RGB", (1024, 1024)), ["a red house"])
    assert_same(encoder.encode(None, ["a red house"])[0], expected)


def test_patches_are_pixels_in_the_order_of_the_model(model: Qwen2_5_VLModel, image: Image.Image) -> None:
    """model.md §1.5, steps 2 and 3, written out."""
    patches, grid = conditioner(model, V11).patches(image)
    assert (grid.rows, grid.columns, grid.width, grid.height) == (3, 6, 160, 96)
    staged = image.resize((168, 84), Image.Resampling.BICUBIC).resize((168, 84), Image.Resampling.BICUBIC)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = (np.asarray(staged) / 255 - mean) / std
    blocks = pixels.reshape(3, 2, 14, 6, 2, 14, 3)  # (row, inner row, y, column, inner column, x, channel)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None].repeat(2, axis=5)
    assert patches.shape == (72, 1176)
    assert np.abs(patches.numpy() - ordered.reshape(72, 1176)).max() < 1e-5


def test_only_some_variants_resize_twice(model: Qwen2_5_VLModel) -> None:
    # 500x500 -> 504x504 -> 112x112 pixels, or straight to 112x112: the same size, other values
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (500, 500, 3), dtype=np.uint8))
    once, _ = conditioner(model, V11.override({"pre_resize": False})).patches(noise)
    twice, _ = conditioner(model, V11).patches(noise)
    assert once.shape == twice.shape
    assert not torch.equal(once, twice)


def test_a_strip_is_refused(model: Qwen2_5_VLModel) -> None:
    with pytest.raises(InputError, match="too long and thin"):
        conditioner(model, V11).encode(Image.new("RGB", (16, 8000)), ["x"])


def test_works_in_half_precision(model: Qwen2_5_VLModel, image: Image.Image, tmp_path: Path) -> None:
    save_text_model(model, TOKENIZER, tmp_path / "te", tmp_path / "pr", min_pixels=1, max_pixels=9)
    encoder = load_conditioner(tmp_path / "te", tmp_path / "pr", V11, "cpu", torch.bfloat16)
    [rough] = encoder.encode(image, ["make it blue"])
    [exact] = conditioner(model, V11).encode(image, ["make it blue"])
    assert rough.text.tokens.dtype == torch.bfloat16
    assert not rough.text.tokens.requires_grad
    assert rough.ids.dtype == torch.float32
    error = (rough.text.tokens.float() - exact.text.tokens).abs().max() / exact.text.tokens.abs().max()
    assert 0 < error < 0.1


def test_loaded_from_files_it_is_the_same(model: Qwen2_5_VLModel, image: Image.Image, tmp_path: Path) -> None:
    save_text_model(model, TOKENIZER, tmp_path / "te", tmp_path / "pr", min_pixels=1, max_pixels=9)
    for variant in (V11, V12):
        loaded = load_conditioner(tmp_path / "te", tmp_path / "pr", variant, "cpu", torch.float32)
        for left, right in zip(
            loaded.encode(image, PROMPTS), conditioner(model, variant).encode(image, PROMPTS), strict=True
        ):
            assert_same(left, right)
    assert "torchvision" not in sys.modules


def test_fix_quotes_is_an_option_of_loading(model: Qwen2_5_VLModel, tmp_path: Path) -> None:
    save_text_model(model, TOKENIZER, tmp_path, tmp_path, min_pixels=1, max_pixels=9)  # one folder: official layout
    strict = load_conditioner(tmp_path, tmp_path, V11, "cpu", None)
    repaired = load_conditioner(tmp_path, tmp_path, V11, "cpu", None, fix_quotes=True)
    assert strict.model.dtype == torch.float32  # as stored
    assert len(repaired.tokenise("the cat's eyes", 1)) < len(strict.tokenise("the cat's eyes", 1))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model: Qwen2_5_VLModel, tmp_path: Path) -> None:
    save_text_model(model, TOKENIZER, tmp_path / "te", tmp_path / "pr", min_pixels=1, max_pixels=9)
    train_tokenizer((PREFIX_V1, PREFIX_V12) * 3, 700).save_pretrained(str(tmp_path / "pr"))
    with pytest.raises(InputError, match=r"the tokenizer has \d+ tokens"):
        load_conditioner(tmp_path / "te", tmp_path / "pr", V11, "cpu", None)
