"""Who multiplies quantised rows: by capability, by name, and where torchao is not there or not the one."""

import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from step1x.quant import choice, torchao_backend
from step1x.quant.choice import DYNAMIC, product_of, why_not_torchao
from step1x.quant.linear import QuantizedLinear, use_products
from step1x.quant.schemes import SCHEMES

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the CUDA device one of a compute capability."""

    def make(capability: int) -> None:
        monkeypatch.setattr(choice, "capability", lambda device: capability if device.type == "cuda" else 0)

    return make


def version_is(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        assert name == "torchao"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("capability", "by_torchao"),
    [(70, ""), (75, ""), (80, "int8"), (86, "int8"), (89, "fp8 int8"), (90, "fp8 int8"), (120, "fp8 int8")],
)
def test_auto_goes_by_the_card(capability, by_torchao, card):
    card(capability)
    assert [scheme for scheme in SCHEMES if product_of("auto", scheme, CUDA)] == by_torchao.split()
    assert [scheme for scheme in SCHEMES if product_of("auto", scheme, CPU)] == []


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_name_holds_on_any_device(device, card):
    card(120)
    assert [product_of("torch", scheme, device) for scheme in DYNAMIC] == [None, None]
    assert product_of("torchao", "fp8", device) is torchao_backend.fp8_product
    assert product_of("torchao", "int8", device) is torchao_backend.int8_product
    assert [product_of("torchao", scheme, device) for scheme in SCHEMES if scheme not in DYNAMIC] == [None] * 5


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "torchao 0.18 is not installed"),
        ("0.17.0", "torchao 0.17.0 is installed, 0.18 is needed"),
        ("0.180.0", "torchao 0.180.0 is installed, 0.18 is needed"),
    ],
)
def test_without_the_release_auto_is_torch_and_torchao_an_error(found, reason, card, monkeypatch, caplog):
    card(90)
    version_is(found, monkeypatch)
    with caplog.at_level(logging.INFO, logger=choice.log.name):
        assert product_of("auto", "fp8", CUDA) is None
    assert caplog.messages == [f"products by torch: {reason}"]
    with pytest.raises(ValueError, match="products = 'torchao'") as error:
        product_of("torchao", "fp8", CPU)
    line = f"products = 'torchao': {reason}; pip install 'torchao>=0.18,<0.19', or take products = 'torch'"
    assert str(error.value) == line
    assert product_of("torchao", "int8-weight", CPU) is None  # nothing to multiply by it


def test_a_torchao_that_cannot_be_imported_is_a_reason(monkeypatch):
    monkeypatch.delitem(sys.modules, "step1x.quant.torchao_backend")
    monkeypatch.delattr("step1x.quant.torchao_backend")
    monkeypatch.setitem(sys.modules, "torchao.kernel", None)
    reason = why_not_torchao()
    assert reason is not None
    assert f"cannot be imported with torch {torch.__version__}: " in reason
    assert "torchao.kernel" in reason
    assert "\n" not in reason


def test_layers_of_a_module_are_set_and_set_back():
    layers = {scheme: QuantizedLinear.empty(scheme, 64, 32, bias=True, dtype=torch.float32) for scheme in SCHEMES[1:]}
    module = nn.ModuleDict({scheme.replace("-", "_"): layer for scheme, layer in layers.items()})
    use_products(module, "torchao", CPU)
    assert [scheme for scheme, layer in layers.items() if layer.product] == ["fp8", "int8"]
    use_products(module, "auto", CPU)
    assert not any(layer.product for layer in layers.values())


QUIET = """
import logging, os, sys, warnings
warnings.simplefilter("error")
import torch
from step1x.quant.linear import QuantizedLinear, use_products
layer = QuantizedLinear.of("{scheme}", torch.nn.Linear(64, 32).requires_grad_(False))
layer(torch.ones(2, 64))
use_products(layer, "auto", torch.device("cpu"))
assert "torchao" not in sys.modules
before = dict(os.environ)
use_products(layer, "torchao", torch.device("cpu"))
layer(torch.ones(2, 64))
assert "torchao" in sys.modules
assert dict(os.environ) == before
assert logging.root.manager.disable == 0
"""


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_torchao_is_imported_when_it_is_needed_and_says_nothing(scheme):
    clean = {name: value for name, value in os.environ.items() if name != choice.SKIP}
    command = [sys.executable, "-c", QUIET.format(scheme=scheme)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
