"""One account of a model's sizes, for building and for planning."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from step1x.engine import released, store
from step1x.engine.build import find_source
from step1x.engine.engine_config import EngineConfig, model_sizes
from step1x.engine.errors import InputError
from step1x.engine.folder import BUNDLED, locate
from step1x.engine.qwen import load_tokenizer
from step1x.engine.tokens import Tokens


def test_a_released_version_needs_no_weights() -> None:
    for version in released.VERSIONS:
        source = find_source(version, random=True)
        row, qwen = source.config.variant(), source.config.qwen(Path("config.json"))
        assert source.name == f"random-{version}"
        assert row.version == version
        assert source.config.dit == released.dit_config(version)
        assert qwen.text_config.hidden_size == 3584
        Tokens(load_tokenizer(source.processor), row)  # fits
    with pytest.raises(InputError, match=r"v1\.1: name the folder .* or give --random-weights"):
        find_source("v1.1")


def test_a_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    for config in (find_source("v1.2", random=True).config, find_source(None).config):
        (tmp_path / "config.json").write_bytes(store.canonical(config.as_json()))
        found = EngineConfig.read(tmp_path / "config.json")
        assert (found.dit, found.vae, found.variant()) == (config.dit, config.vae, config.variant())


@pytest.mark.parametrize("version", released.VERSIONS)
def test_sizes_by_heart_are_those_that_are_built(version: str) -> None:
    config = find_source(version, random=True).config
    made, known = config.sizes(version), model_sizes(version)
    assert (made.dit, made.vae, made.variant.version) == (known.dit, known.vae, version)
    found, wanted = json.loads(made.qwen), json.loads(known.qwen)
    for part, values in wanted.items():
        for key in values.keys() - {"rope_parameters"}:
            assert found[part][key] == values[key], key


def test_a_text_model_with_a_flat_config_has_the_same_sizes(tmp_path: Path) -> None:
    """As the released Qwen2.5-VL has it: sizes of the language model at the top, not under text_config."""
    model = tmp_path / BUNDLED.name
    shutil.copytree(BUNDLED, model)
    path = model / "text_encoder" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values.pop("text_config") | values))
    found, nested = (json.loads(find_source(one).config.sizes("").qwen) for one in (model, None))
    assert {name: found["text_config"][name] for name in released.QWEN["text_config"]} == {
        name: nested["text_config"][name] for name in released.QWEN["text_config"]
    }
    assert found["vision_config"] == nested["vision_config"]


def test_the_first_blocks_of_a_config() -> None:
    config = EngineConfig.of(locate(None))
    assert config.limited(None) == config.limited(1000) == config
    assert (config.limited(1).dit.depth, config.limited(1).dit.depth_single) == (1, 1)


def test_sizes_of_a_folder_without_a_text_model(official: Any) -> None:
    with pytest.raises(InputError, match="no text model here"):
        model_sizes(official())
