import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from step1x.engine import config_file, sizes
from step1x.engine.checkpoint import Checkpoint
from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiTConfig
from step1x.engine.errors import InputError
from step1x.engine.vae import VAEConfig

GOLDEN = Path(__file__).parent.parent / "golden"
DIT = DiTConfig(
    in_channels=64,
    out_channels=64,
    hidden_size=32,
    heads=2,
    depth=2,
    depth_single=3,
    mlp_hidden=128,
    context_channels=20,
    pooled_channels=768,
    timestep_channels=256,
    rope_axes=(4, 6, 6),
    rope_theta=10000.0,
    connector=ConnectorConfig(
        in_channels=12, hidden_size=20, heads=2, depth=2, mlp_hidden=80,
        timestep_channels=256, pooled_channels=768, has_scale_factor=True,
    ),
    text_token_mapping=False,
)  # fmt: skip
VAE = VAEConfig(
    in_channels=3,
    channels=(4, 8, 12, 12),
    res_blocks=2,
    z_channels=16,
    groups=2,
    scale_factor=0.3611,
    shift_factor=0.1159,
)


def checkpoint(*names: str) -> Checkpoint:
    return Checkpoint([GOLDEN / f"{name}.safetensors" for name in names])


def without_scale(config: DiTConfig, **changes: Any) -> DiTConfig:
    return replace(config, connector=replace(config.connector, has_scale_factor=False), **changes)


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        (("dit_official",), "dit_official", DIT),
        (("dit_official",), "dit_diffusers_v1p1", DIT),
        (("dit_diffusers_v1p1",), "dit_diffusers_v1p1", without_scale(DIT)),
        (("dit_diffusers_v1p1",), "dit_official", without_scale(DIT)),
        (
            ("dit_diffusers_v1p1", "dit_diffusers_v1p2_extra"),
            "dit_diffusers_v1p2",
            without_scale(DIT, text_token_mapping=True),
        ),
    ],
)
def test_sizes_of_a_transformer(names: tuple[str, ...], config: str, expected: DiTConfig) -> None:
    assert sizes.dit_config(checkpoint(*names), [GOLDEN / f"{config}.json"]) == expected


@pytest.mark.parametrize("name", ["vae_official", "vae_diffusers"])
@pytest.mark.parametrize("config", ["vae_official", "vae_diffusers"])
def test_sizes_of_an_autoencoder(name: str, config: str) -> None:
    assert sizes.vae_config(checkpoint(name), [GOLDEN / f"{config}.json"]) == VAE


def test_what_a_config_is_needed_for() -> None:
    with pytest.raises(InputError, match="heads of a connector of width 20 cannot be guessed"):
        sizes.dit_config(checkpoint("dit_official"), [])
    with pytest.raises(InputError, match="no multiples of 32 groups; state norm_num_groups"):
        sizes.vae_config(checkpoint("vae_official"), [])


def test_rope_axes_without_a_config_are_the_released_ones_in_proportion() -> None:
    assert sizes.rope_axes(128) == (16, 56, 56)
    assert sizes.rope_axes(32) == (4, 14, 14)
    assert sizes.rope_axes(16) == (4, 6, 6)


@given(st.integers(1, 512))
def test_rope_axes_always_fill_the_head(half: int) -> None:
    axes = sizes.rope_axes(2 * half)
    assert sum(axes) == 2 * half
    assert all(axis % 2 == 0 and axis >= 0 for axis in axes)


def changed(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    change(config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


CONTRADICTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "layers": ("dit_diffusers_v1p1", lambda c: c.update(num_layers=19), "num_layers is 19, but .* has 2"),
    "head width": (
        "dit_diffusers_v1p1",
        lambda c: c.update(attention_head_dim=32),
        "attention_head_dim is 32, but .* has 16",
    ),
    "mapping": (
        "dit_diffusers_v1p1",
        lambda c: c.update(enable_text_token_mapping=True),
        "enable_text_token_mapping is True, but .* has False",
    ),
    "official depth": (
        "dit_official",
        lambda c: c["params"].update(depth=3),
        r"params\.depth is 3, but .* has 2",
    ),
    "official mlp": ("dit_official", lambda c: c["params"].update(mlp_ratio=3.0), "params.mlp_ratio is 96"),
    "connector": (
        "dit_official",
        lambda c: c["connector"].update(in_channels=3584),
        r"connector\.in_channels is 3584, but .* has 12",
    ),
    "axes": ("dit_official", lambda c: c["params"].update(axes_dim=[16, 56, 56]), "rope axes .* head_dim 16"),
    "odd axes": (
        "dit_official",
        lambda c: c["params"].update(axes_dim="4"),
        "must be a list of whole numbers",
    ),
    "heads": (
        "dit_official",
        lambda c: c["connector"].update(heads_num=3),
        "20 is no multiple of its 3 heads",
    ),
    "zero": ("dit_official", lambda c: c["connector"].update(heads_num=0), "a whole number above 0"),
    "text": ("dit_official", lambda c: c["connector"].update(heads_num="2"), "a whole number above 0"),
    "theta": ("dit_official", lambda c: c["params"].update(theta=float("nan")), "a finite number"),
}


@pytest.mark.parametrize("name", list(CONTRADICTIONS))
def test_a_config_that_contradicts_the_shapes(tmp_path: Path, name: str) -> None:
    golden, change, message = CONTRADICTIONS[name]
    path = changed(tmp_path, golden, change)
    with pytest.raises(InputError, match=message) as caught:
        sizes.dit_config(checkpoint(golden), [path])
    assert str(path) in str(caught.value)


def test_a_vae_config_that_contradicts_the_shapes(tmp_path: Path) -> None:
    path = changed(tmp_path, "vae_diffusers", lambda config: config.update(block_out_channels=[4, 8, 12]))
    with pytest.raises(InputError, match=r"block_out_channels is \[4, 8, 12\], but .* has \[4, 8, 12, 12\]"):
        sizes.vae_config(checkpoint("vae_official"), [path])
    path = changed(tmp_path, "vae_official", lambda config: config["args"].update(ch_mult=[1, 2, 4, 4]))
    with pytest.raises(InputError, match=r"args\.ch_mult is \[4, 8, 16, 16\], but"):
        sizes.vae_config(checkpoint("vae_official"), [path])


def test_a_json_that_is_no_config_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"license": "apache-2.0"}')
    files = [tmp_path / "none.json", tmp_path / "other.json", GOLDEN / "dit_official.json"]
    assert sizes.dit_config(checkpoint("dit_official"), files) == DIT
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        sizes.dit_config(checkpoint("dit_official"), files)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("txt_in.weight", None, r"missing txt_in\.weight"),
        ("txt_in.weight", torch.ones(3), r"misshapen txt_in\.weight: \[3\], expected 2 axes"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", torch.ones(5), "no multiple of head width 5"),
        ("img_in.weight", torch.ones(0, 4), "misshapen img_in"),
    ],
)
def test_a_tensor_that_shows_no_size(tmp_path: Path, key: str, value: torch.Tensor | None, message: str) -> None:
    tensors = load_file(GOLDEN / "dit_official.safetensors")
    tensors.pop(key) if value is None else tensors.update({key: value})
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        sizes.dit_config(Checkpoint([tmp_path / "a.safetensors"]), [GOLDEN / "dit_official.json"])


@pytest.mark.parametrize("written", [config_file.dit_as_official, config_file.dit_as_diffusers])
def test_a_written_config_says_the_same(tmp_path: Path, written: Callable[[DiTConfig], dict[str, Any]]) -> None:
    config = replace(DIT, rope_axes=(8, 4, 4), rope_theta=500.0)
    (tmp_path / "config.json").write_text(json.dumps(written(config)))
    assert sizes.dit_config(checkpoint("dit_official"), [tmp_path / "config.json"]) == config


@pytest.mark.parametrize("written", [config_file.vae_as_official, config_file.vae_as_diffusers])
def test_a_written_vae_config_says_the_same(tmp_path: Path, written: Callable[[VAEConfig], dict[str, Any]]) -> None:
    config = replace(VAE, groups=4, scale_factor=1.25, shift_factor=-0.5)
    (tmp_path / "config.json").write_text(json.dumps(written(config)))
    assert sizes.vae_config(checkpoint("vae_diffusers"), [tmp_path / "config.json"]) == config
