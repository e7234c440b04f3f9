"""Linear layers with quantised weights, and what puts them into a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x.kernels.adaln import quantise_rows
from step1x.quant.choice import DYNAMIC, Products, product_of
from step1x.quant.products import Product, fp8_product, int8_product, weight_only_product
from step1x.quant.rules import Component, rules
from step1x.quant.schemes import Scheme, fits, layout
from step1x.quant.weights import dequantise, quantise, quantise_int8

__all__ = [
    "QuantizedLinear",
    "Rows",
    "dynamic",
    "exactly",
    "product_of_rows",
    "quantise",
    "quantise_layers",
    "swap",
    "use_products",
]

Rows = Tensor | tuple[Tensor, Tensor]  # (..., in), or for fp8 e4m3 values (..., in) and float32 scales (..., 1)
ALL = slice(None)
EIGHT_BIT = ("fp8", "fp8-weight", "int8", "int8-weight")


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored as the tensors of `schemes.layout`; all are buffers, as the bias is.

    fp8 and int8 quantise the rows that come in, too, with a scale for each; the other schemes dequantise the weight
    for the product. Results are in `dtype`. To be moved to a device, never cast: the buffers' dtypes are the scheme's.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, scheme: Scheme, parts: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> None:
        """parts: as `quantise` makes them; dtype: of results."""
        super().__init__()
        self.scheme = scheme
        self.dtype = dtype
        self.exact = False  # rows that come in are not quantised: for `exactly`
        self.product: Product | None = None  # None: torch's; for `use_products`
        self.parts = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.register_buffer("bias", bias)
        packed = 2 if parts["weight"].dtype == torch.uint8 else 1
        self.out_features, self.in_features = parts["weight"].shape[0], parts["weight"].shape[1] * packed

    @classmethod
    def empty(
        cls,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Self:
        """A layer to be filled from a file."""
        shapes = layout(scheme, out_features, in_features)
        parts = {
            name: torch.empty(shape, dtype=getattr(torch, stored), device=device)
            for name, (shape, stored) in shapes.items()
        }
        return cls(scheme, parts, torch.empty(out_features, dtype=dtype, device=device) if bias else None, dtype)

    @classmethod
    def of(cls, scheme: Scheme, linear: nn.Linear) -> Self:
        """A layer quantised from a plain one."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(scheme, quantise(scheme, linear.weight), bias, linear.weight.dtype)

    def forward(self, rows: Rows, outputs: slice = ALL) -> Tensor:
        """(..., out) of rows (..., in) in `dtype`. outputs: which of the outputs are computed."""
        # A scalar is for all rows of the weight.
        parts = {name: part[outputs] if part.ndim else part for name in self.parts for part in [getattr(self, name)]}
        bias = None if self.bias is None else self.bias[outputs]
        if self.scheme not in DYNAMIC or (self.exact and isinstance(rows, Tensor)):
            assert isinstance(rows, Tensor)
            if self.scheme in EIGHT_BIT:
                return weight_only_product(rows, (parts["weight"], parts["weight_scale"]), bias)
            return F.linear(rows, dequantise(self.scheme, parts, self.dtype), bias)
        quantised = rows if isinstance(rows, tuple) else self._quantised(rows)
        product = self.product or (fp8_product if self.scheme == "fp8" else int8_product)
        values, scales = (part.reshape(-1, part.shape[-1]) for part in quantised)
        out = product((values, scales), (parts["weight"], parts["weight_scale"]), bias, self.dtype)
        return out.unflatten(0, quantised[0].shape[:-1])

    def _quantised(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return quantise_rows(rows) if self.scheme == "fp8" else quantise_int8(rows)

    def extra_repr(self) -> str:
        return f"{self.scheme}, in_features={self.in_features}, out_features={self.out_features}"


def dynamic(module: nn.Module) -> list[QuantizedLinear]:
    """The layers of a module that quantise the rows that come in."""
    return [layer for layer in module.modules() if isinstance(layer, QuantizedLinear) and layer.scheme in DYNAMIC]


def use_products(module: nn.Module, choice: Products, device: torch.device) -> None:
    """Sets who multiplies in the layers of a module that quantise rows, when they run on a device.

    Raises ValueError, one line, if torchao is asked for and cannot be had.
    """
    layers = dynamic(module)
    found = {scheme: product_of(choice, scheme, device) for scheme in {layer.scheme for layer in layers}}
    for layer in layers:
        layer.product = found[layer.scheme]


@contextmanager
def exactly(module: nn.Module) -> Iterator[None]:
    """Within it no layer of a module quantises rows: weights are dequantised, products are in the compute dtype.

    Slow. What other threads run in the module meanwhile may be exact as well.
    """
    layers = dynamic(module)
    for layer in layers:
        layer.exact = True
    try:
        yield
    finally:
        for layer in layers:
            layer.exact = False


def product_of_rows(layer: nn.Linear | QuantizedLinear, rows: Rows, outputs: slice) -> Tensor:
    """Those outputs of a layer, plain or quantised: the product with some rows of its weight."""
    if isinstance(layer, QuantizedLinear):
        return layer(rows, outputs)
    assert isinstance(rows, Tensor)
    return F.linear(rows, layer.weight[outputs], None if layer.bias is None else layer.bias[outputs])


def chosen(module: nn.Module, component: Component, scheme: Scheme) -> dict[str, Scheme]:
    """The linear layers that the rules quantise, by name; those whose sizes do not fit their scheme stay plain."""
    given = rules(component, scheme)
    found: dict[str, Scheme] = {}
    for name, layer in module.named_modules():
        wanted = given.scheme(name) if isinstance(layer, nn.Linear) else "plain"
        if isinstance(layer, nn.Linear) and wanted != "plain" and fits(wanted, layer.out_features, layer.in_features):
            found[name] = wanted
    return found


def swap(module: nn.Module, component: Component, scheme: Scheme) -> dict[str, Scheme]:
    """Puts empty quantised layers, each on its layer's device, in the place of those that `chosen` returns."""

    def empty(wanted: Scheme, layer: nn.Linear) -> QuantizedLinear:
        sizes, like = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight
        return QuantizedLinear.empty(wanted, *sizes, dtype=like.dtype, device=like.device)

    return _replaced(module, chosen(module, component, scheme), empty)


def quantise_layers(module: nn.Module, component: Component, scheme: Scheme) -> dict[str, Scheme]:
    """`swap` of a model that has its weights: each layer is quantised from the one it replaces."""
    return _replaced(module, chosen(module, component, scheme), QuantizedLinear.of)


def _replaced(
    module: nn.Module, found: dict[str, Scheme], make: Callable[[Scheme, nn.Linear], QuantizedLinear]
) -> dict[str, Scheme]:
    for name, wanted in found.items():
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        module.set_submodule(name, make(wanted, layer))
    return found
