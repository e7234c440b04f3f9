from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from step1x.engine import layouts
from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiT, DiTConfig
from step1x.engine.errors import InputError
from step1x.engine.layouts import KeyMap, Part, Target
from step1x.engine.vae import VAE, VAEConfig
from step1x.engine.weights import assemble, shapes

GOLDEN = Path(__file__).parent.parent / "golden"
CPU = torch.device("cpu")


def made(targets: list[Target], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {target.key: assemble(target, tensors.__getitem__, CPU, None) for target in targets}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(wanted)
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


def pair(part: str) -> tuple[dict[str, Tensor], dict[str, Tensor], KeyMap, int]:
    """The golden weights of one network in both layouts, as other code converted them."""
    if part == "vae":
        official, diffusers = "vae_official", "vae_diffusers"
        keys, width = layouts.vae_map(4), 0
    else:
        official, diffusers = "dit_official", "dit_diffusers_v1p1"
        keys, width = layouts.dit_map(), 32
    tensors = load_file(GOLDEN / f"{official}.safetensors")
    tensors.pop("connector.scale_factor", None)
    return tensors, load_file(GOLDEN / f"{diffusers}.safetensors"), keys, width


@pytest.mark.golden
@pytest.mark.parametrize("part", ["dit", "vae"])
def test_golden_weights_of_both_layouts_are_made_of_each_other(part: str) -> None:
    official, diffusers, keys, width = pair(part)
    sizes = {key: tuple(value.shape) for key, value in official.items()}
    assert_same(made(layouts.to_diffusers(sizes, keys, width), official), diffusers)
    assert_same(made(layouts.from_diffusers(sizes, keys, width), diffusers), official)


def small_dit(depth: int, single: int, mapping: bool) -> DiT:
    connector = ConnectorConfig(
        in_channels=10, hidden_size=12, heads=2, depth=1, mlp_hidden=20,
        timestep_channels=256, pooled_channels=14, has_scale_factor=not mapping,
    )  # fmt: skip
    config = DiTConfig(
        in_channels=64, out_channels=64, hidden_size=24, heads=3, depth=depth, depth_single=single,
        mlp_hidden=56, context_channels=12, pooled_channels=14, timestep_channels=256,
        rope_axes=(2, 2, 4), rope_theta=1e4, connector=connector, text_token_mapping=mapping,
    )  # fmt: skip
    return DiT(config)


@pytest.mark.parametrize(("depth", "single", "mapping"), [(1, 0, False), (0, 2, True), (3, 12, False)])
def test_any_depth_goes_there_and_back(depth: int, single: int, mapping: bool) -> None:
    state = dict(small_dit(depth, single, mapping).state_dict())
    sizes = {key: tuple(value.shape) for key, value in state.items()}
    there = made(layouts.to_diffusers(sizes, layouts.dit_map(), 24), state)
    assert len(there) == len(state) + 8 * depth + 6 * single  # 2 more per qkv, 3 more per linear1, twice
    assert_same(made(layouts.from_diffusers(sizes, layouts.dit_map(), 24), there), state)


@pytest.mark.parametrize("channels", [(8,), (8, 16), (8, 8, 24, 24, 32)])
def test_any_number_of_levels_goes_there_and_back(channels: tuple[int, ...]) -> None:
    config = VAEConfig(
        in_channels=3, channels=channels, res_blocks=1, z_channels=4, groups=4, scale_factor=1, shift_factor=0
    )
    state = dict(VAE(config).state_dict())
    sizes = {key: tuple(value.shape) for key, value in state.items()}
    there = made(layouts.to_diffusers(sizes, layouts.vae_map(len(channels)), 0), state)
    assert len(there) == len(state)
    assert_same(made(layouts.from_diffusers(sizes, layouts.vae_map(len(channels)), 0), there), state)


def test_the_lowest_level_of_the_decoder_comes_first_in_diffusers() -> None:
    [target] = layouts.to_diffusers({"decoder.up.3.block.0.conv1.weight": (4, 4, 3, 3)}, layouts.vae_map(4), 0)
    assert target.key == "decoder.up_blocks.0.resnets.0.conv1.weight"


def test_linear1_is_cut_by_the_width_and_the_rest() -> None:
    targets = layouts.to_diffusers({"single_blocks.7.linear1.bias": (40,)}, layouts.dit_map(), 8)
    assert [(target.key.split(".", 2)[2], target.parts[0].start, target.shape) for target in targets] == [
        ("attn.to_q.bias", 0, (8,)),
        ("attn.to_k.bias", 8, (8,)),
        ("attn.to_v.bias", 16, (8,)),
        ("proj_mlp.bias", 24, (16,)),
    ]


def test_final_modulation_has_its_halves_swapped() -> None:
    source = {"final_layer.adaLN_modulation.1.bias": torch.tensor([1.0, 2, 3, 4])}
    there = made(layouts.to_diffusers({key: (4,) for key in source}, layouts.dit_map(), 2), source)
    assert there["norm_out.linear.bias"].tolist() == [3, 4, 1, 2]


def test_a_full_size_transformer_has_the_documented_number_of_tensors() -> None:
    connector = ConnectorConfig(
        in_channels=3584, hidden_size=4096, heads=32, depth=2, mlp_hidden=16384,
        timestep_channels=256, pooled_channels=768, has_scale_factor=False,
    )  # fmt: skip
    config = DiTConfig(
        in_channels=64, out_channels=64, hidden_size=3072, heads=24, depth=19, depth_single=38,
        mlp_hidden=12288, context_channels=4096, pooled_channels=768, timestep_channels=256,
        rope_axes=(16, 56, 56), rope_theta=1e4, connector=connector, text_token_mapping=True,
    )  # fmt: skip
    with torch.device("meta"):
        sizes = shapes(DiT(config))
    assert len(sizes) == 816 + 2
    assert len(layouts.to_diffusers(sizes, layouts.dit_map(), 3072)) == 1198  # §3.11


def test_unknown_keys_keep_their_name() -> None:
    assert layouts.dit_map().names("connector.S.input_embedder.weight").keys == ("connector.S.input_embedder.weight",)


def test_other_models_are_refused() -> None:
    with pytest.raises(InputError, match=r"neither img_in\.weight nor x_embedder\.weight"):
        layouts.detect(["unet.conv_in.weight"], "a.safetensors")
    with pytest.raises(InputError, match="no FLUX autoencoder"):
        layouts.detect_vae(["quant_conv.weight"], "a.safetensors")


def test_parts_stack_in_order() -> None:
    target = Target("t", (3, 1), (Part("b", (4,), 2, 2), Part("a", (1,))))
    tensors = {"a": torch.tensor([9.0]), "b": torch.tensor([0.0, 1, 2, 3])}
    assert made([target], tensors)["t"].flatten().tolist() == [2, 3, 9]
