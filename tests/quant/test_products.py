"""Products of quantised rows: which kernels they call on which device, with what, and what comes out."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from step1x.quant import products, torchao_backend
from step1x.quant.products import fp8_product, int8_product, weight_only_product
from step1x.quant.weights import dequantise, quantise

FP8 = torch.float8_e4m3fn


class Calls:
    """Records the calls of a function of torch, and makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._real = getattr(torch, name)
        monkeypatch.setattr(torch, name, self._call)

    def _call(self, *given: Any, **options: Any) -> Tensor:
        self.made.append((given, options))
        return self._real(*given, **options)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it tensors may lie on a CUDA device that is not there: shapes, dtypes and layouts without figures."""
    # The method looks for the device itself before anything is dispatched.
    monkeypatch.setattr(Tensor, "copy_", lambda self, source: torch.ops.aten.copy_(self, source))
    with FakeTensorMode():
        yield


def scaled(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, width, device=device).to(dtype), torch.ones(rows, 1, device=device)


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize(
    ("device", "dtype", "row_wise"),
    [
        ("cpu", torch.bfloat16, True),
        ("cpu", torch.float32, True),
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float32, False),
        ("cuda", torch.float16, False),
    ],
)
@pytest.mark.parametrize("product", [fp8_product, torchao_backend.fp8_product])
def test_which_scales_scaled_mm_takes(product, device, dtype, row_wise, monkeypatch):
    """CUDA refuses row-wise scales for results that are not bfloat16; a CPU has them for all."""
    calls, bias = Calls(monkeypatch, "_scaled_mm"), torch.zeros(48, device=device, dtype=dtype)
    out = product(scaled(33, 64, FP8, device), scaled(48, 64, FP8, device), bias, dtype)
    assert (out.device.type, out.dtype, out.shape) == (device, dtype, (33, 48))
    [(given, options)] = calls.made
    scales = [options[name] if name in options else given[place] for place, name in ((2, "scale_a"), (3, "scale_b"))]
    assert [tuple(one.shape) for one in scales] == ([(33, 1), (1, 48)] if row_wise else [(), ()])
    assert options["out_dtype"] == (dtype if row_wise else torch.float32)
    assert options.get("use_fast_accum", False) == row_wise
    assert (given[0].stride(), given[1].stride()) == ((64, 1), (1, 64))  # the weight is not copied


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize(("rows", "given_rows"), [(1, [17]), (17, [17]), (18, [18]), (43, [20, 20, 17])])
def test_int_mm_on_cuda_gets_17_rows_at_least_in_each_piece(rows, given_rows, monkeypatch):
    monkeypatch.setattr(products, "PIECE", 20)
    calls = Calls(monkeypatch, "_int_mm")
    out = int8_product(scaled(rows, 64, torch.int8, "cuda"), scaled(48, 64, torch.int8, "cuda"), None, torch.bfloat16)
    assert (out.device.type, out.dtype, out.shape) == ("cuda", torch.bfloat16, (rows, 48))
    assert [given[0].shape[0] for given, _ in calls.made] == given_rows
    assert all(given[1].stride() == (1, 64) for given, _ in calls.made)


@pytest.mark.parametrize("rows", [0, 1, 3, 17, 50])
@pytest.mark.parametrize(("width", "outputs"), [(8, 8), (24, 40), (3080, 16)])
def test_int8_sums_are_exact_on_a_cpu(rows, width, outputs, monkeypatch):
    """By the integer product, for the largest sums too: it is ten times as fast as one in float64."""
    monkeypatch.setattr(products, "PIECE", 20)
    torch.manual_seed(rows)
    values, matrix = (torch.randint(-128, 128, (count, width), dtype=torch.int8) for count in (rows, outputs))
    values[:1], matrix[:1] = -128, -128
    one = torch.ones(())
    calls = Calls(monkeypatch, "_int_mm")
    out = int8_product((values, one.expand(rows, 1)), (matrix, one.expand(outputs, 1)), None, torch.float64)
    assert torch.equal(out, (values.double() @ matrix.double().t()).float().double())
    assert [given[0].shape[0] for given, _ in calls.made] == [len(part) for part in values.split(20)]


@pytest.mark.parametrize("scheme", ["fp8-weight", "int8-weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_weight_only_products_scale_the_result(scheme, dtype, with_bias, monkeypatch):
    """Rounded twice: the product, and what the float32 scale and the bias make of it."""
    torch.manual_seed(0)
    parts = quantise(scheme, torch.randn(48, 64) * torch.logspace(-6, 6, 48)[:, None])
    rows, bias = torch.randn(2, 5, 64, dtype=dtype), torch.randn(48, dtype=dtype) if with_bias else None
    out = weight_only_product(rows, (parts["weight"], parts["weight_scale"]), bias)
    codes = rows.double() @ parts["weight"].double().t()
    wanted = codes.to(dtype).double() * parts["weight_scale"].double().t() + (0 if bias is None else bias.double())
    assert (out.dtype, out.shape) == (dtype, (2, 5, 48))
    close = {"rtol": 2**-8, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    apart = dequantise(scheme, parts, torch.float64).abs().sum(-1) * torch.finfo(dtype).eps
    assert ((out.double() - wanted).abs() <= close["rtol"] * wanted.abs() + close["atol"] + apart).all()
