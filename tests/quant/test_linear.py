"""Quantised layers: the product that each scheme stands for, parts of it, and their place in a model."""

import pytest
import torch
from torch import nn

from step1x.kernels.adaln import quantise_rows
from step1x.quant import products
from step1x.quant.linear import QuantizedLinear, product_of_rows, quantise_layers, swap
from step1x.quant.schemes import SCHEMES
from step1x.quant.weights import dequantise, quantise_int8

QUANTISED = [scheme for scheme in SCHEMES if scheme != "plain"]
ERROR = {"fp8": 0.04, "fp8-weight": 0.03, "int8": 0.015, "int8-weight": 0.01, "int4-weight": 0.1, "nvfp4": 0.12}


def plain(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(192, 80, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("scheme", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_near_the_plain_product(scheme, dtype, bias):
    layer = plain(dtype, bias=bias)
    quantised = QuantizedLinear.of(scheme, layer)
    x = torch.randn(2, 3, 192, dtype=dtype)
    out, wanted = quantised(x), layer(x)
    assert (out.shape, out.dtype) == (wanted.shape, wanted.dtype)
    error = ((out - wanted).float().norm() / wanted.float().norm()).item()
    assert error < ERROR[scheme] + (0.005 if dtype == torch.bfloat16 else 0), error


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_quantised_rows_rounds_once(scheme, dtype):
    layer = QuantizedLinear.of(scheme, plain(dtype))
    x = torch.randn(19, 192, dtype=dtype)
    values, scales = (quantise_rows if scheme == "fp8" else quantise_int8)(x)
    weight = dequantise(scheme, {name: getattr(layer, name) for name in layer.parts}, torch.float64)
    wanted = (values.double() * scales) @ weight.t() + layer.bias.double()
    torch.testing.assert_close(layer(x), wanted.to(dtype), rtol=2e-6 if dtype == torch.float32 else 2**-8, atol=1e-6)


@pytest.mark.parametrize("scheme", QUANTISED)
def test_some_outputs_are_those_of_the_whole(scheme):
    layer = QuantizedLinear.of(scheme, plain())
    x = torch.randn(5, 192)
    got = torch.cat([product_of_rows(layer, x, slice(0, 48)), product_of_rows(layer, x, slice(48, None))], dim=-1)
    torch.testing.assert_close(got, layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_some_outputs_of_a_plain_layer(bias):
    layer, x = plain(bias=bias), torch.randn(5, 192)
    torch.testing.assert_close(product_of_rows(layer, x, slice(16, 48)), layer(x)[:, 16:48])


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_int8_sums_are_those_of_int_mm(rows):
    layer = QuantizedLinear.of("int8", plain(bias=False))
    x = torch.randn(rows, 192)
    values, scales = quantise_int8(x)
    sums = torch._int_mm(values, layer.weight.t()).float()
    assert torch.equal(layer(x), sums * scales * layer.weight_scale.t())


@pytest.mark.parametrize("scheme", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_without_tensors(scheme, dtype):
    """As on CUDA, but for the figures: small numbers of rows, and more than a piece."""
    layer = QuantizedLinear.empty(scheme, 192, 80, bias=True, dtype=dtype, device="meta")
    for rows in (1, 17, 5000):
        out = layer(torch.empty(2, rows, 192, dtype=dtype, device="meta"))
        assert (out.shape, out.dtype) == ((2, rows, 80), dtype)


def test_int8_in_pieces_is_the_same(monkeypatch):
    layer, x = QuantizedLinear.of("int8", plain()), torch.randn(11, 192)
    wanted = layer(x)
    monkeypatch.setattr(products, "PIECE", 4)
    assert torch.equal(layer(x), wanted)


def test_fp8_takes_rows_that_are_quantised_already():
    layer, x = QuantizedLinear.of("fp8", plain(torch.bfloat16)), torch.randn(2, 3, 192, dtype=torch.bfloat16)
    assert torch.equal(layer(quantise_rows(x)), layer(x))


def model() -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict({"linear1": nn.Linear(64, 96), "linear2": nn.Linear(64, 24), "norm": nn.LayerNorm(64)})
    return nn.ModuleDict({"single_blocks": nn.ModuleList([block]), "img_in": nn.Linear(64, 64)})


def test_swap_makes_room_for_what_a_file_holds():
    filled, empty = model(), model().to("meta")
    # linear2 has 24 outputs: no multiple of 16.
    assert quantise_layers(filled, "dit", "fp8") == {"single_blocks.0.linear1": "fp8"}
    assert swap(empty, "dit", "fp8") == {"single_blocks.0.linear1": "fp8"}
    layer = empty.get_submodule("single_blocks.0.linear1")
    assert isinstance(layer, QuantizedLinear)
    assert (layer.in_features, layer.out_features, layer.weight.device.type) == (64, 96, "meta")
    stored, wanted = filled.state_dict(), empty.state_dict()
    assert {key: (part.shape, part.dtype) for key, part in stored.items()} == {
        key: (part.shape, part.dtype) for key, part in wanted.items()
    }
    empty.load_state_dict(stored, assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), filled.get_submodule("single_blocks.0.linear1")(x))


def test_plain_swaps_nothing():
    assert swap(model(), "dit", "plain") == {}
