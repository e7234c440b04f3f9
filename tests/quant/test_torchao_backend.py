"""Products by torchao: the same bits as torch's, nothing copied, wherever a layer's weights lie."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from step1x.engine.residency import Packed
from step1x.kernels.adaln import quantise_rows
from step1x.quant import products, torchao_backend
from step1x.quant.choice import DYNAMIC
from step1x.quant.linear import QuantizedLinear, exactly, product_of_rows, use_products
from step1x.quant.torchao_backend import float8_tensor
from step1x.quant.weights import quantise_int8

CPU = torch.device("cpu")
SHAPES = [(1, 16, 16), (1, 3072, 48), (2, 48, 16), (17, 64, 208), (33, 1040, 80), (130, 192, 112)]  # rows, in, out


def pair(scheme: str, width: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> list[QuantizedLinear]:
    """The same layer twice: by torch, and by torchao."""
    torch.manual_seed(width + outputs)
    plain = nn.Linear(width, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight[0] = 0  # its scale is the least there is
    made = [QuantizedLinear.of(scheme, plain) for _ in range(2)]
    use_products(made[1], "torchao", CPU)
    return made


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "width", "outputs"), SHAPES)
def test_the_same_bits(scheme, dtype, bias, rows, width, outputs):
    ours, theirs = pair(scheme, width, outputs, dtype, bias)
    x = torch.randn(rows, width, dtype=dtype)
    x[-1] *= 1e-20
    assert torch.equal(theirs(x), ours(x))


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_batches_parts_and_rows_that_are_quantised_already(scheme):
    ours, theirs = pair(scheme, 192, 80, torch.bfloat16)
    x = torch.randn(2, 3, 192, dtype=torch.bfloat16)
    assert torch.equal(theirs(x), ours(x))
    for outputs in (slice(0, 48), slice(48, None), slice(16, 32)):
        assert torch.equal(product_of_rows(theirs, x, outputs), product_of_rows(ours, x, outputs))
    rows = (quantise_rows if scheme == "fp8" else quantise_int8)(x)
    assert torch.equal(theirs(rows), ours(x))


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_exact_reruns_are_not_torchao_s(scheme, monkeypatch):
    ours, theirs = pair(scheme, 192, 80, torch.float32)
    calls, real = [], theirs.product
    assert real is not None
    monkeypatch.setattr(theirs, "product", lambda *given: (calls.append(given), real(*given))[1])
    x = torch.randn(5, 192)
    quantised = theirs(x)
    with exactly(theirs), exactly(ours):
        exact = theirs(x)
        assert torch.equal(exact, ours(x))
    assert not torch.equal(exact, quantised)
    assert len(calls) == 1


def test_int8_in_pieces_is_the_same(monkeypatch):
    ours, theirs = pair("int8", 192, 80, torch.bfloat16)
    x = torch.randn(11, 192, dtype=torch.bfloat16)
    wanted = ours(x)
    monkeypatch.setattr(products, "PIECE", 4)
    assert torch.equal(theirs(x), wanted)


def places(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride())


def test_fp8_parts_are_wrapped_where_they_lie():
    layer = pair("fp8", 192, 80, torch.bfloat16)[1]
    for outputs in (slice(None), slice(16, 48)):
        parts = layer.weight[outputs], layer.weight_scale[outputs]
        wrapped = float8_tensor(parts, torch.bfloat16)
        assert [places(wrapped.qdata), places(wrapped.scale)] == [places(part) for part in parts]


def test_int8_parts_are_multiplied_where_they_lie(monkeypatch):
    layer, given = pair("int8", 192, 80, torch.bfloat16)[1], []
    real = torchao_backend.int_scaled_matmul
    monkeypatch.setattr(torchao_backend, "int_scaled_matmul", lambda *one: (given.append(one), real(*one))[1])
    layer(torch.randn(3, 192, dtype=torch.bfloat16), slice(16, 48))
    [(values, matrix, scales)] = given
    assert places(matrix.t()) == places(layer.weight[16:48])
    assert (values.dtype, values.shape, scales.shape) == (torch.int8, (3, 192), (3, 1))


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_weights_that_move_are_read_where_they_lie(scheme, backend):
    """As residency moves them: the buffers stay, their memory changes, inside a whole graph too."""
    ours, theirs = pair(scheme, 64, 48, torch.bfloat16)
    x = torch.randn(19, 64, dtype=torch.bfloat16)
    run = theirs if backend is None else torch.compile(theirs, fullgraph=True, dynamic=False, backend=backend)
    wanted = ours(x)
    assert torch.equal(run(x), wanted)
    assert torch.equal(run(x, slice(16, 48)), ours(x, slice(16, 48)))
    packed = Packed(theirs)
    assert torch.equal(run(x), wanted)
    elsewhere = packed.host.clone()
    packed.host.zero_()
    assert not run(x).any()
    packed.point(elsewhere)
    assert torch.equal(run(x), wanted)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it tensors may lie on a CUDA device that is not there."""
    # The method looks for the device itself before anything is dispatched.
    monkeypatch.setattr(Tensor, "copy_", lambda self, source: torch.ops.aten.copy_(self, source))
    with FakeTensorMode():
        yield


@pytest.mark.usefixtures("pretend")
@pytest.mark.parametrize("compiling", [False, True])
def test_int8_on_cuda_is_torchao_s_in_compiled_code_alone(compiling, monkeypatch):
    """Outside, torchao prints the rows, which waits for the GPU and breaks a capture, and copies the weight."""
    values, weight = (torch.zeros(count, 64, device="cuda").to(torch.int8) for count in (3, 48))
    scales, calls = [torch.ones(count, 1, device="cuda") for count in (3, 48)], []
    real = torchao_backend.int_scaled_matmul
    monkeypatch.setattr(torchao_backend, "int_scaled_matmul", lambda *one: (calls.append(one), real(*one))[1])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    out = torchao_backend.int8_product((values, scales[0]), (weight, scales[1]), None, torch.bfloat16)
    assert (out.device.type, out.shape, out.dtype) == ("cuda", (3, 48), torch.bfloat16)
    assert [(one[0].shape, one[1].stride()) for one in calls] == ([((17, 64), (1, 64))] if compiling else [])
