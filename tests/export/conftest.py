"""Small random networks, and engine folders with their ONNX graphs: what takes time is made once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from step1x.engine.dit import DiT, is_modulation
from step1x.engine.vae import VAE, VAEConfig
from step1x.export.core import ENTRIES
from step1x.export.onnx import export_onnx
from step1x.quant.linear import QuantizedLinear, quantise_layers
from step1x.training.recipe import dit_config


class Engine(NamedTuple):
    folder: Path
    dit: DiT
    vae: VAE


def make_dit(dtype: torch.dtype = torch.float32) -> DiT:
    torch.manual_seed(0)
    dit = DiT(dataclasses.replace(dit_config(64, 2, 2, 24), depth=1, depth_single=2))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit.to(dtype).requires_grad_(False)


def make_vae() -> VAE:
    torch.manual_seed(0)
    sizes = {"in_channels": 3, "channels": (4, 8), "res_blocks": 1, "z_channels": 4, "groups": 2}
    return VAE(VAEConfig(**sizes, scale_factor=0.5, shift_factor=0.1)).requires_grad_(False)


def write(folder: Path, dit: DiT, vae: VAE) -> Engine:
    """The files that graphs point into: modulations are not in them."""
    save_file({key: one for key, one in dit.state_dict().items() if not is_modulation(key)}, folder / "dit.safetensors")
    save_file(vae.state_dict(), folder / "vae.safetensors")
    return Engine(folder, dit, vae)


def mixed(dtype: torch.dtype) -> DiT:
    """Double blocks in fp8 and single ones in int8."""
    dit, other = (make_dit(dtype) for _ in range(2))
    quantise_layers(dit, "dit", "fp8")
    quantise_layers(other, "dit", "int8")
    dit.single_blocks = other.single_blocks
    return dit


def quantised_names(dit: DiT) -> list[str]:
    return [name for name, layer in dit.named_modules() if isinstance(layer, QuantizedLinear)]


@pytest.fixture(scope="session")
def small_dit() -> Callable[..., DiT]:
    return make_dit


@pytest.fixture(scope="session")
def quantised_dit() -> Callable[[torch.dtype], DiT]:
    return mixed


@pytest.fixture(scope="session")
def save() -> Callable[[Path, DiT, VAE], Engine]:
    return write


@pytest.fixture(scope="session")
def onnx_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """All entries in float32."""
    engine = write(tmp_path_factory.mktemp("onnx"), make_dit(), make_vae())
    paths = export_onnx(engine.dit, engine.vae, engine.folder)
    assert [path.name for path in paths] == [f"{entry}.onnx" for entry in ENTRIES]
    return engine


@pytest.fixture(scope="session")
def onnx_bf16(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The step in bfloat16 and 8 bits, exported from hollow networks: of the files only the headers are read."""
    engine = write(tmp_path_factory.mktemp("onnx_bf16"), mixed(torch.bfloat16), make_vae())
    hollow = engine._replace(dit=engine.dit.to("meta"))
    export_onnx(hollow.dit, hollow.vae, engine.folder, ["step"])
    return hollow
