import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from step1x.engine import layouts
from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiT, DiTConfig, is_modulation
from step1x.engine.errors import InputError
from step1x.engine.folder import locate
from step1x.engine.save import save
from step1x.engine.vae import VAE, VAEConfig
from step1x.engine.weights import Components, build_dit, build_vae, load, shapes, stream
from step1x.profiles import Residency
from step1x.training.tokenizer import (
    count_template_tokens,
    save_text_model,
    small_text_model,
    train_tokenizer,
)

Make = Callable[..., Path]
DIT_FILE = "step1x-edit-v1p1-official.safetensors"


def transformer(root: Path, dtype: torch.dtype = torch.float32) -> DiT:
    return build_dit(locate(root), fp32_norms=True, device="cpu", dtype=dtype)


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    state = wanted.state_dict()
    assert list(got.state_dict()) == list(state)
    for key, value in got.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_both_layouts_give_one_model(official: Make, diffusers: Make) -> None:
    one, other = official(), diffusers()
    assert_same(transformer(one), transformer(other))
    pair = [build_vae(locate(root), device="cpu", dtype=torch.float32) for root in (one, other)]
    assert_same(pair[0], pair[1])


def test_modulations_can_stay_in_host_memory(official: Make) -> None:
    """The meta device stands for a GPU."""
    away = Residency(folded="host")
    dit = build_dit(locate(official()), fp32_norms=True, device="meta", dtype=torch.float32, residency=away)
    stays = {name for name, parameter in dit.named_parameters() if parameter.device.type == "cpu"}
    assert stays == {name for name, _ in dit.named_parameters() if is_modulation(name)}
    assert {name.split(".")[-2] for name in stays} == {"lin", "1"}


def test_nothing_is_left_on_meta_and_nothing_needs_gradients(official: Make) -> None:
    dit = transformer(official(), torch.bfloat16)
    assert {value.dtype for value in dit.parameters()} == {torch.bfloat16}
    assert not any(value.is_meta or value.requires_grad for value in dit.parameters())


@pytest.mark.parametrize("plain", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_weights_are_values(official: Make, plain: torch.dtype) -> None:
    """§6: everything cast without a scale, but norms, which stay bf16."""
    root = official()
    tensors = load_file(root / DIT_FILE)
    cast = {key: value.to(torch.bfloat16 if "norm" in key else plain) for key, value in tensors.items()}
    save_file(cast, root / DIT_FILE)
    for key, value in transformer(root, torch.bfloat16).state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, cast[key].to(torch.bfloat16)), key


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(2))


def small(path: Path, **changes: torch.Tensor) -> Small:
    tensors = {
        "model.linear.weight": torch.arange(6.0).reshape(3, 2),
        "model.linear.bias": torch.ones(3),
        "model.steps": torch.tensor(7),
        "model.mean": torch.ones(2),
        "lm_head.weight": torch.ones(1),
    }
    save_file({**tensors, **{key.replace("__", "."): value for key, value in changes.items()}}, path)
    with torch.device("meta"):
        return Small()


def rename(key: str) -> str | None:
    return None if key.startswith("lm_head") else key.removeprefix("model.")


def test_stream_fills_parameters_and_buffers(tmp_path: Path) -> None:
    module = small(tmp_path / "a.safetensors")
    stream(module, [tmp_path / "a.safetensors"], rename, "cpu", torch.bfloat16)
    assert module.linear.weight.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert isinstance(module.linear.weight, nn.Parameter)
    assert (module.linear.weight.dtype, module.mean.dtype, module.steps.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.int64,
    )
    assert module.steps.item() == 7
    assert "mean" in dict(module.named_buffers())


def test_stream_keeps_stored_dtypes(tmp_path: Path) -> None:
    module = small(tmp_path / "a.safetensors", model__linear__bias=torch.ones(3, dtype=torch.float16))
    stream(module, [tmp_path / "a.safetensors"], rename, "cpu", None)
    assert (module.linear.weight.dtype, module.linear.bias.dtype) == (torch.float32, torch.float16)


def without(path: Path, *keys: str) -> None:
    save_file({key: value for key, value in load_file(path).items() if key not in keys}, path)


def test_missing_keys_are_named(official: Make, diffusers: Make) -> None:
    root = official()
    without(root / DIT_FILE, "txt_in.bias")
    with pytest.raises(InputError, match=rf"{DIT_FILE}: missing txt_in\.bias$"):
        transformer(root)
    without(
        root / DIT_FILE,
        *(f"single_blocks.{i}.linear1.{leaf}" for i in range(3) for leaf in ("weight", "bias")),
    )
    with pytest.raises(InputError, match=r"missing txt_in\.bias, .*, .* and 4 more \(7 in all\)$"):
        transformer(root)
    root = diffusers()
    part = root / "transformer" / "diffusion_pytorch_model.safetensors"
    without(part, "transformer_blocks.1.attn.to_k.weight")
    with pytest.raises(InputError, match=r"missing transformer_blocks\.1\.attn\.to_k\.weight$"):
        transformer(root)


def test_unexpected_keys_are_named(official: Make) -> None:
    root = official()
    save_file({**load_file(root / DIT_FILE), "img_in.weight_scale": torch.ones(1)}, root / DIT_FILE)
    with pytest.raises(InputError, match=rf"{DIT_FILE}: unexpected img_in\.weight_scale$"):
        transformer(root)


def test_misshapen_keys_are_named(official: Make, diffusers: Make) -> None:
    root = official()
    save_file({**load_file(root / DIT_FILE), "txt_in.bias": torch.ones(5)}, root / DIT_FILE)
    with pytest.raises(InputError, match=rf"{DIT_FILE}: misshapen txt_in\.bias is \[5\], not \[32\]$"):
        transformer(root)
    part = diffusers() / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(part), "decoder.conv_in.bias": torch.ones(())}, part)
    with pytest.raises(InputError, match=r"misshapen decoder\.conv_in\.bias is \[\], not \[12\]$"):
        build_vae(locate(part.parent.parent), device="cpu", dtype=torch.float32)


def test_a_truncated_file_is_named(official: Make) -> None:
    root = official()
    content = (root / DIT_FILE).read_bytes()
    (root / DIT_FILE).write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{DIT_FILE}: truncated: vector_in\.out_layer\.weight ends at"):
        transformer(root)


CORPUS = ["make it blue", "把图片变成黑白"] * 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with all its parts, written as the trainer does."""
    root = tmp_path_factory.mktemp("models") / "whole"
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CORPUS, 320)
    text = small_text_model(
        tokenizer, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48,
        vision_hidden=16, vision_depth=1, vision_heads=2, vision_intermediate=24,
    )  # fmt: skip
    connector = ConnectorConfig(
        in_channels=32, hidden_size=24, heads=2, depth=1, mlp_hidden=40,
        timestep_channels=256, pooled_channels=16, has_scale_factor=False,
    )  # fmt: skip
    config = DiTConfig(
        in_channels=16, out_channels=16, hidden_size=32, heads=2, depth=1, depth_single=1, mlp_hidden=64,
        context_channels=24, pooled_channels=16, timestep_channels=256, rope_axes=(4, 6, 6), rope_theta=500.0,
        connector=connector, text_token_mapping=False,
    )  # fmt: skip
    vae = VAEConfig(
        in_channels=3,
        channels=(8, 8),
        res_blocks=1,
        z_channels=4,
        groups=4,
        scale_factor=1.5,
        shift_factor=-0.25,
    )
    short = {"prefix": "Edit:", "template_tokens": 0, "text_tokens": 20}
    short["template_tokens"] = count_template_tokens(tokenizer, "Edit:")
    save(DiT(config), VAE(vae), root, preset="official-v1.1", overrides=short)
    save_text_model(text, tokenizer, root / "text_encoder", root / "processor", min_pixels=3136, max_pixels=50176)
    return root


def test_load_gives_every_component(whole: Path) -> None:
    model = load(whole, device="cpu", dtype=torch.bfloat16)
    assert isinstance(model, Components)
    assert (model.name, model.variant.name, model.variant.text_tokens) == ("whole", "official-v1.1", 20)
    assert (model.dit.dtype, model.dit.config.rope_theta) == (torch.bfloat16, 500.0)
    assert model.vae.dtype == torch.float32  # §4: the official code keeps it so
    assert (model.vae.config.scale_factor, model.vae.config.shift_factor) == (1.5, -0.25)
    assert model.dit.double_blocks[0].fp32_norms
    assert model.conditioner.model.dtype == torch.bfloat16
    assert len(model.digest) == 64


def test_load_with_another_preset(whole: Path) -> None:
    model = load(whole, device="cpu", dtype=torch.bfloat16, variant="diffusers-v1.1")
    assert (model.variant.name, model.vae.dtype) == ("diffusers-v1.1", torch.bfloat16)
    assert not model.dit.double_blocks[0].fp32_norms
    model = load(whole, device="cpu", dtype=torch.bfloat16, vae_dtype=torch.float64)
    assert (model.dit.dtype, model.vae.dtype) == (torch.bfloat16, torch.float64)


def test_networks_of_different_models_do_not_load_together(whole: Path, diffusers: Make) -> None:
    root = diffusers()
    for part in ("text_encoder", "processor"):
        (root / part).symlink_to(whole / part)
    with pytest.raises(InputError, match=r"text_encoder.*: text width 32, .*transformer.* takes 12"):
        load(root, device="cpu", dtype=torch.float32)
    (root / "vae").rename(root / "unused")
    (root / "vae").symlink_to(whole / "vae")
    with pytest.raises(InputError, match=r"vae.*: makes 16 channels a token, .* takes 64"):
        load(root, device="cpu", dtype=torch.float32)


# Peak memory: in a process of its own, from the kernel's high-water mark of that process.

MEASURE = """
import sys, torch
from pathlib import Path
from step1x.engine.dit import is_modulation
from step1x.engine.folder import locate
from step1x.engine.weights import build_dit
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
dit = build_dit(locate(sys.argv[1]), fp32_norms=True, device="cpu", dtype=torch.bfloat16)
print(before, peak(), sum(value.nbytes for value in dit.parameters()))
"""
WIDE = DiTConfig(
    in_channels=64, out_channels=64, hidden_size=2048, heads=16, depth=2, depth_single=3, mlp_hidden=8192,
    context_channels=1024, pooled_channels=768, timestep_channels=256, rope_axes=(16, 56, 56), rope_theta=1e4,
    connector=ConnectorConfig(
        in_channels=1024, hidden_size=1024, heads=8, depth=1, mlp_hidden=4096,
        timestep_channels=256, pooled_channels=768, has_scale_factor=False,
    ),
    text_token_mapping=False,
)  # fmt: skip


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file of zeros that takes no room on disk."""
    lines, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        lines[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(lines).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_a_gigabyte_takes_the_model_and_less_than_a_gigabyte_more(tmp_path: Path) -> None:
    """In the diffusers layout, where fused tensors are put together from parts."""
    with torch.device("meta"):
        official = shapes(DiT(WIDE))
    (tmp_path / "transformer").mkdir()
    targets = layouts.to_diffusers(official, layouts.dit_map(), WIDE.hidden_size)
    sparse(tmp_path / "transformer" / "a.safetensors", {target.key: target.shape for target in targets})
    (tmp_path / "model_index.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    before, peak, model = map(int, done.stdout.split())
    print(f"model {model / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {before / 1e9:.2f} GB of it before loading")
    assert model >= 1e9
    assert peak <= model + 1e9
    assert peak - before <= model + 0.25e9  # what loading itself adds: a tensor, and libraries
