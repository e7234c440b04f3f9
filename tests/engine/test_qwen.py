import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLModel

from step1x.engine.errors import InputError
from step1x.engine.qwen import (
    load_image_processor,
    load_model,
    load_tokenizer,
    model_key,
    read_config,
)
from step1x.training.tokenizer import SPECIAL_TOKENS, save_text_model, small_text_model, train_tokenizer

TOKENIZER = train_tokenizer(["make it blue", "把图片变成黑白"] * 3, 320)


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLModel:
    torch.manual_seed(0)
    text = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 48}
    vision = {"vision_hidden": 16, "vision_depth": 2, "vision_heads": 2, "vision_intermediate": 24}
    return small_text_model(TOKENIZER, **text, **vision).eval()


@pytest.fixture
def folder(model: Qwen2_5_VLModel, tmp_path: Path) -> Path:
    save_text_model(model, TOKENIZER, tmp_path, tmp_path, min_pixels=3136, max_pixels=50176)
    return tmp_path


def assert_equal(model: Qwen2_5_VLModel, expected: Qwen2_5_VLModel) -> None:
    state = expected.state_dict()
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for (name, value), (_, wanted) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(value, wanted), name
        assert value.dtype == torch.float32


def legacy_config(folder: Path) -> dict[str, Any]:
    """The config as transformers 4.49 wrote it: the text model's fields flat, M-RoPE under rope_scaling."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "max_position_embeddings",
    )  # fmt: skip
    vision_kept = (
        "depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size",
        "spatial_merge_size", "temporal_patch_size", "window_size", "fullatt_block_indexes",
    )  # fmt: skip
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "sliding_window": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": text["rope_parameters"]["mrope_section"]},
        "vision_config": {**{key: config["vision_config"][key] for key in vision_kept}, "in_chans": 3},
        **{key: text[key] for key in kept},
        **{key: config[key] for key in tokens},
    }


def test_loads_what_transformers_5_writes(model: Qwen2_5_VLModel, folder: Path) -> None:
    loaded = load_model(folder, "cpu", torch.float32)
    assert_equal(loaded, model)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config._attn_implementation == "sdpa"
    assert not any("lm_head" in name for name, _ in loaded.named_modules())


OLD_KEYS: dict[str, Callable[[str], str]] = {
    "4.49": lambda key: key.removeprefix("model.").replace("language_model.", "model."),
    "bare": lambda key: key.removeprefix("model."),
}


@pytest.mark.parametrize("spelling", list(OLD_KEYS))
def test_loads_an_old_sharded_snapshot(model: Qwen2_5_VLModel, folder: Path, spelling: str) -> None:
    tensors = {OLD_KEYS[spelling](key): value for key, value in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = torch.zeros(3, 3)  # never looked at
    tensors["visual.rotary_pos_emb.inv_freq"] = torch.zeros(2)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(legacy_config(folder)))
    assert torch.get_default_dtype() == torch.float32
    assert_equal(load_model(folder, "cpu", torch.float32), model)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lm_head.weight", None),
        ("model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("model.language_model.norm.weight", "language_model.norm.weight"),
        ("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight"),
        ("model.rotary_emb.inv_freq", None),
        ("other", "other"),
    ],
)
def test_model_key(key: str, expected: str | None) -> None:
    assert model_key(key) == expected


def test_casts_while_loading(folder: Path) -> None:
    loaded = load_model(folder, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32}


def test_missing_and_unexpected_keys_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"missing language_model\.norm\.weight"):
        load_model(folder, "cpu", None)
    tensors["model.language_model.norm.weight"] = torch.ones(32)
    tensors["model.extra"] = torch.ones(1)
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"unexpected model\.extra"):
        load_model(folder, "cpu", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"model_type": "llama"}', "model_type is 'llama'"),
    ],
)
def test_bad_configs_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        load_model(folder, "cpu", None)


def test_tokenizer_from_its_parts_is_the_same(folder: Path) -> None:
    """vocab.json, merges.txt, added_tokens_decoder: what released snapshots have beside tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    first = len(TOKENIZER) - len(SPECIAL_TOKENS)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(first + index): {"content": token, **flags} for index, token in enumerate(SPECIAL_TOKENS)}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = "<|im_start|>make “it” blue, 把图片<|vision_start|><|image_pad|><|vision_end|>"
    expected = TOKENIZER(text).input_ids
    assert load_tokenizer(folder)(text).input_ids == expected
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder)(text).input_ids == expected


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: not found"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer files cannot be read"):
        load_tokenizer(tmp_path)


def test_image_processor_takes_values_from_its_file(folder: Path, model: Qwen2_5_VLModel) -> None:
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "image_mean": [0.5, 0.5, 0.5]}))
    processor = load_image_processor(folder, model.config)
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]
    assert type(processor).size == {
        "shortest_edge": 56 * 56,
        "longest_edge": 28 * 28 * 1280,
    }  # shared: not written to
    joint = folder / "processor_config.json"  # the spelling of transformers 5
    joint.write_text(json.dumps({"image_processor": {**values, "image_mean": [0.25, 0.5, 0.75]}}))
    assert list(load_image_processor(folder, model.config).image_mean) == [0.5, 0.5, 0.5]
    path.unlink()
    assert list(load_image_processor(folder, model.config).image_mean) == [0.25, 0.5, 0.75]
    joint.unlink()
    path.write_text(json.dumps({**values, "patch_size": 16}))
    with pytest.raises(InputError, match="patch_size is 16, the text model has 14"):
        load_image_processor(folder, model.config)
    path.unlink()
    with pytest.raises(InputError, match=r"preprocessor_config\.json: cannot be read: No such file"):
        load_image_processor(folder, model.config)
