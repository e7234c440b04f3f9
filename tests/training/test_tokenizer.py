import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from step1x.engine.folder import BUNDLED
from step1x.engine.qwen import load_tokenizer
from step1x.engine.tokens import HEADER, PICTURE, TAIL
from step1x.engine.variants import PREFIX_V1, PREFIX_V12
from step1x.training.tokenizer import (
    SPECIAL_TOKENS,
    count_template_tokens,
    save_text_model,
    small_text_model,
    train_tokenizer,
)

TEXTS = ["make it black and white", "把图片变成黑白", "it's a “test”"] * 3
TOKENIZER = train_tokenizer(TEXTS, 330)
SIZES = {
    "hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 48,
    "vision_hidden": 16, "vision_depth": 3, "vision_heads": 2, "vision_intermediate": 24,
}  # fmt: skip


def test_ids_are_laid_out_as_in_qwen() -> None:
    assert TOKENIZER("!").input_ids == [0]
    first = len(TOKENIZER) - len(SPECIAL_TOKENS)
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [*range(first, len(TOKENIZER))]
    assert set(TOKENIZER.all_special_tokens) == set(SPECIAL_TOKENS)
    assert len(TOKENIZER) <= 330


def test_merges_are_learnt() -> None:
    assert len(TOKENIZER("make it black and white").input_ids) < 12
    small = train_tokenizer(TEXTS, 270)
    assert len(small) == 270
    assert len(small("make").input_ids) == 4


@settings(deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_every_text_survives(text: str) -> None:
    import unicodedata

    assert TOKENIZER.decode(TOKENIZER(text).input_ids, clean_up_tokenization_spaces=False) == (
        unicodedata.normalize("NFC", text)
    )


def test_splits_as_qwen2_does() -> None:
    """Digits one by one, contractions apart, a space with the word behind it."""
    split = TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 42 cats")
    assert [piece.replace("Ġ", " ") for piece, _ in split] == ["it", "'s", " ", "4", "2", " cats"]


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 270"):
        train_tokenizer(TEXTS, 269)


def test_saved_tokenizer_loads_with_auto_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    text = "<|im_start|>make “it” black, 把图片<|vision_start|><|image_pad|><|vision_end|>!"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert len(loaded) == len(TOKENIZER)


@pytest.mark.parametrize("prefix", [PREFIX_V1, PREFIX_V12])
@pytest.mark.parametrize("texts", [TEXTS, [":Picture 1"] * 9, [PREFIX_V1, PREFIX_V12] * 3])
def test_template_tokens_end_before_the_last_colon(prefix: str, texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts, 400)
    count = count_template_tokens(tokenizer, prefix)
    ids = tokenizer(f"{HEADER}{prefix}{PICTURE}").input_ids
    assert tokenizer.decode(ids[:count]) == (HEADER + prefix)[:-1]
    assert tokenizer.decode(ids[count]).startswith(":")


def test_template_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="end in a colon"):
        count_template_tokens(TOKENIZER, "no colon")


def test_small_model_has_the_shape_of_the_real_one() -> None:
    model = small_text_model(TOKENIZER, **SIZES)
    config = model.config
    assert config.text_config.vocab_size == len(TOKENIZER)
    assert config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert config.vision_config.fullatt_block_indexes == [2]
    assert config.image_token_id == TOKENIZER.convert_tokens_to_ids("<|image_pad|>")
    assert config._attn_implementation == "sdpa"
    assert model.dtype == torch.float32
    assert model.visual.patch_embed.proj.weight.shape == (16, 3, 2, 14, 14)
    assert model.language_model.layers[0].self_attn.k_proj.weight.shape == (16, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 30}, "hidden 30 must be a multiple of 4"),
        ({"vision_hidden": 20}, "vision_hidden 20 must be a multiple of 8"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
    ],
)
def test_widths_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_text_model(TOKENIZER, **{**SIZES, **change})


def test_saved_model_loads_with_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_text_model(TOKENIZER, **SIZES).to(torch.bfloat16)
    save_text_model(model, TOKENIZER, tmp_path / "text_encoder", tmp_path / "processor", min_pixels=9, max_pixels=99)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with safe_open(tmp_path / "text_encoder" / "model.safetensors", "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"model"}  # noqa: SIM118  not a dict
        assert {key.split(".")[1] for key in file.keys()} == {"visual", "language_model"}  # noqa: SIM118
    preprocessor = json.loads((tmp_path / "processor" / "preprocessor_config.json").read_text())
    assert (preprocessor["min_pixels"], preprocessor["max_pixels"]) == (9, 99)
    loaded, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        str(tmp_path / "text_encoder"), output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


@pytest.mark.parametrize("bundled", [True, False])
def test_the_folder_reads_the_same_in_both_spellings(tmp_path: Path, bundled: bool) -> None:
    """Of transformers 4 (`additional_special_tokens`, `rope_theta`, `rope_scaling`) and 5; also what is committed."""
    root = BUNDLED
    if not bundled:
        root = tmp_path
        model = small_text_model(TOKENIZER, **SIZES)
        save_text_model(model, TOKENIZER, root / "text_encoder", root / "processor", min_pixels=9, max_pixels=99)
    written = json.loads((root / "processor" / "tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == list(SPECIAL_TOKENS[1:])
    assert "extra_special_tokens" not in written
    text = json.loads((root / "text_encoder" / "config.json").read_text())["text_config"]
    assert {**text["rope_scaling"], "rope_theta": text["rope_theta"]} == text["rope_parameters"]

    config = AutoConfig.from_pretrained(str(root / "text_encoder"), local_files_only=True)
    found = config.text_config.rope_parameters
    assert (found["rope_theta"], found["mrope_section"]) == (1e6, text["rope_scaling"]["mrope_section"])
    assert config.text_config.hidden_size == text["hidden_size"]
    tokenizer = AutoTokenizer.from_pretrained(str(root / "processor"), local_files_only=True)
    assert len(tokenizer) == config.text_config.vocab_size
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert tokenizer("<|image_pad|>").input_ids == [config.image_token_id]
    asked = [{"role": "user", "content": [{"type": "text", "text": "Picture 1: "}, {"type": "image"}]}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == HEADER + PICTURE + TAIL

    written["extra_special_tokens"] = written.pop("additional_special_tokens")  # as it was written before
    old = tmp_path / "old"
    shutil.copytree(root / "processor", old)
    (old / "tokenizer_config.json").write_text(json.dumps(written))
    sentence = "<|im_start|>make “it” black, 把图片<|vision_start|><|image_pad|><|vision_end|>!"
    assert load_tokenizer(old)(sentence).input_ids == load_tokenizer(root / "processor")(sentence).input_ids
