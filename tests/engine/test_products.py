"""Edits with the bundled model whose quantised rows are multiplied by torch and by torchao."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

from step1x.bench.counters import photograph
from step1x.engine import Edit, Engine, build
from step1x.engine.build import Order, find_source
from step1x.engine.errors import InputError
from step1x.engine.executor import Execution, stepper
from step1x.engine.store import engines_folder
from step1x.profiles import load_profile
from step1x.quant import torchao_backend
from step1x.quant.linear import QuantizedLinear, dynamic, quantise_layers

PRODUCTS = {"fp8": torchao_backend.fp8_product, "int8": torchao_backend.int8_product}


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def profile(folder: Path, scheme: str, dtype: str) -> Path:
    """Of a CPU: every layer that can be, is quantised with its rows."""
    path = folder / f"{scheme}-{dtype}.toml"
    head = f"description = 'x'\ndevice = 'cpu'\ndtype = '{dtype}'\nvae_dtype = 'float32'\n"
    path.write_text(head + "[weights]\n" + "".join(f"{part} = '{scheme}'\n" for part in ("dit", "text", "vision")))
    return path


def edited(engine: Engine) -> Edit:
    return engine.edit(photograph(80, 64), "make it darker", seed=3, size=64, steps=2, guidance=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", PRODUCTS)
def test_the_same_picture(scheme, dtype, tmp_path):
    path, found = profile(tmp_path, scheme, dtype), {}
    for products in ("torch", "torchao", None):
        engine = Engine.load(profile=path, cache=False, products=products)
        layers = [*dynamic(engine.dit), *dynamic(engine.conditioner.model)]
        assert len(layers) > 40
        wanted = PRODUCTS[scheme] if products == "torchao" else None  # auto is torch on a CPU
        assert {layer.product for layer in layers} == {wanted}
        found[products] = edited(engine)
    assert len(list(engines_folder().iterdir())) == 1  # one engine serves all
    pictures = {one.image.tobytes() for one in found.values()}
    assert len(pictures) == 1
    assert not any("rerun" in one.metadata for one in found.values())


def test_torchao_multiplies_in_an_edit(tmp_path, monkeypatch):
    """That the picture is the same is no proof that it did."""
    calls, real = [], torchao_backend.float8_tensor
    monkeypatch.setattr(torchao_backend, "float8_tensor", lambda *one: (calls.append(one), real(*one))[1])
    edited(Engine.load(profile=profile(tmp_path, "fp8", "bfloat16"), cache=False, products="torchao"))
    assert len(calls) > 2 * 2 * 32  # rows and weights of 32 layers in two steps


def test_products_are_no_part_of_an_engine():
    own, source = load_profile("cpu").changed({"weights": {"dit": "fp8"}}), find_source(None)
    orders = [Order.of(source, own.changed({"products": products}), None) for products in ("auto", "torch", "torchao")]
    assert len({order.key for order in orders}) == 1
    assert all(b"products" not in order.settings[build.PROFILE] for order in orders)
    assert Order.of(source, own.changed({"kernels": "off"}), None).key != orders[0].key


def test_without_torchao_asking_for_it_is_one_line_before_anything_is_built(tmp_path, monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "torchao":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    said: list[str] = []
    with pytest.raises(InputError, match=r"torchao 0\.18 is not installed; pip install") as error:
        Engine.load(profile=profile(tmp_path, "fp8", "float32"), products="torchao", say=said.append)
    assert "\n" not in str(error.value)
    assert not said
    assert not engines_folder().exists()
    assert Engine.load(profile="cpu", cache=False, products="torchao").dit.device.type == "cpu"  # nothing to multiply


def test_what_is_not_one_of_the_products_is_an_error(small_dit, monkeypatch):
    with pytest.raises(InputError, match="products: input should be 'auto', 'torch' or 'torchao'"):
        Engine.load(device="cpu", products="mslk")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.1")
    dit = small_dit(dtype=torch.float32)
    quantise_layers(dit, "dit", "fp8")
    with pytest.raises(InputError, match=r"torchao 0\.17\.1 is installed, 0\.18 is needed"):
        stepper(dit, Execution(products="torchao"))


@pytest.mark.parametrize(("scheme", "backend"), [("fp8", "eager"), ("int8", "eager"), ("int8", "aot_eager")])
def test_compiled_blocks_are_whole_graphs(scheme, backend, small_dit, step_arguments):
    found = []
    for products in ("torch", "torchao"):
        dit = small_dit(1, 1, dtype=torch.float32)
        quantise_layers(dit, "dit", scheme)
        assert any(isinstance(layer, QuantizedLinear) for layer in dit.modules())
        tokens, step, rope = step_arguments(dit)
        torch._dynamo.reset()
        runner = stepper(dit, Execution(compiled=True, products=products), backend)
        found.append(runner.velocity(tokens, step, rope))
    torch._dynamo.reset()
    assert torch.equal(*found)
