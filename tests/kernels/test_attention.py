"""Attention in the interpreter against plain torch: any sizes and strides, biases, masked keys, the log-sum-exp."""

from collections.abc import Iterator
from math import log
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.kernels import attention as module
from step1x.kernels.attention import (
    OPS,
    attention_lse_reference,
    attention_lse_triton,
    attention_op,
    attention_reference,
    attention_triton,
)
from step1x.kernels.launch import CHIPS, Op

# Loop bounds of a kernel are arrays of one number in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

CPU = torch.device("cpu")
EXAMPLES = len(list(attention_op.examples(CPU, torch.float32)))
# bf16 rounds the weights before the second product and the result, by up to 2**-9 of the largest value each.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def example(index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(index)
    return list(attention_op.examples(CPU, dtype))[index]


def error(out: Tensor, exact: Tensor, v: Tensor) -> float:
    """Against the largest value, of which each result is a mean."""
    return float((out.double() - exact).abs().max() / v.double().abs().max())


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return attention_lse_reference(q.double(), k.double(), v.double(), None if bias is None else bias.double())


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN: what the kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[80, 90], ids=["pointers", "descriptors"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Both ways of loading tiles; blocks of 32 so that a few keys make several."""
    monkeypatch.setattr(module, "capability", lambda device: request.param)
    monkeypatch.setattr(module, "launch", lambda chip, head_dim, dtype: module.Launch(32, 32, 4, 2, chip >= 90))
    return request.param


@pytest.mark.usefixtures("poisoned", "chip")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("index", range(EXAMPLES))
def test_kernel(index: int, dtype: torch.dtype) -> None:
    q, k, v, bias = example(index, dtype)
    out, lse = attention_lse_triton(q, k, v, bias)
    wanted, wanted_lse = exact(q, k, v, bias)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert error(out, wanted, v) < BOUNDS[dtype]
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@given(
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    head_dim=st.sampled_from([32, 64, 128]),
    biased=st.booleans(),
    chip=st.sampled_from([80, 90]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sizes(
    queries: int, keys: int, head_dim: int, biased: bool, chip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "capability", lambda device: chip)
    monkeypatch.setattr(module, "launch", lambda chip, head_dim, dtype: module.Launch(32, 32, 4, 2, chip >= 90))
    torch.manual_seed(queries)
    q, k, v = (torch.randn(1, 1, rows, head_dim) for rows in (queries, keys, keys))
    bias = torch.randn(1, keys) * 5 if biased else None
    assert error(attention_triton(q, k, v, bias), exact(q, k, v, bias)[0].double(), v) < BOUNDS[torch.float32]


@pytest.mark.parametrize("chip", CHIPS)
def test_launch_settings_of_a_chip(chip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as large as on the GPU, more than one of each."""
    monkeypatch.setattr(module, "capability", lambda device: chip)
    torch.manual_seed(chip)
    q, k, v = (torch.randn(1, 1, rows, 128).bfloat16() for rows in (129, 150, 150))
    bias = torch.randn(1, 150)
    assert error(attention_triton(q, k, v, bias), exact(q, k, v, bias)[0], v) < BOUNDS[torch.bfloat16]


def strided(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows that begin anywhere, channels that are not adjacent, heads that are one: nothing a descriptor takes."""
    torch.manual_seed(0)
    wide = torch.randn(1, 2, 40, 33).to(dtype)
    return [
        wide[..., 1:],
        torch.randn(1, 2, 32, 40).to(dtype).mT,
        torch.randn(1, 1, 40, 32).to(dtype).expand(1, 2, 40, 32),
    ]


@pytest.mark.usefixtures("chip")
def test_any_strides() -> None:
    q, k, v = strided()
    assert error(attention_triton(q, k, v, None), exact(q, k, v, None)[0], v) < BOUNDS[torch.float32]
    q, k, v = (x.transpose(0, 1)[:, :, :32] for x in (q, k, v))  # whole blocks of keys
    bias = torch.randn(32, 2).T
    assert error(attention_triton(q, k, v, bias), exact(q, k, v, bias)[0], v) < BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reference(dtype: torch.dtype) -> None:
    """The one by PyTorch's kernel and the one with the log-sum-exp."""
    q, k, v, bias = example(0, dtype)
    out, lse = attention_lse_reference(q, k, v, bias)
    bound = {torch.float64: 1e-14, **BOUNDS}[dtype]
    assert error(attention_reference(q, k, v, bias), exact(q, k, v, bias)[0], v) < bound
    assert error(out, exact(q, k, v, bias)[0], v) < bound
    assert (out.dtype, lse.dtype) == (dtype, torch.promote_types(dtype, torch.float32))


def test_a_bias_counts_keys() -> None:
    """n equal keys are one whose bias is log n."""
    q, k, v, _ = example(0, torch.float64)
    last = [x[:, :, -1:].expand(-1, -1, 12, -1) for x in (k, v)]
    many = attention_reference(q, torch.cat((k, last[0]), 2), torch.cat((v, last[1]), 2), None)
    bias = torch.zeros(2, 45, dtype=torch.float64)
    bias[:, -1] = log(13)
    torch.testing.assert_close(attention_reference(q, k, v, bias), many, rtol=1e-13, atol=1e-13)


def test_the_bias_is_not_rounded() -> None:
    """Among 300 others, a key that counts for 300 weighs one half; with its bias in bfloat16 it weighs 0.5037."""
    q, k, v = torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 301, 32), torch.zeros(1, 1, 301, 32)
    bias = torch.zeros(1, 301)
    v[:, :, 7], bias[:, 7] = 1, log(300)
    for run in (attention_reference, attention_triton):
        out = run(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias)
        torch.testing.assert_close(out.float(), torch.full((1, 1, 32), 0.5), rtol=0, atol=2**-9)


def test_parts_merge() -> None:
    """Attention to all keys from two calls over a half each."""
    q, k, v, bias = example(0, torch.float32)
    parts = [slice(0, 17), slice(17, 45)]
    outs, lses = zip(*(attention_lse_triton(q, k[:, :, s], v[:, :, s], bias[:, s]) for s in parts), strict=True)
    weights = torch.stack(lses).softmax(0).transpose(2, 3).repeat_interleave(32, dim=3)
    merged = sum(w * o for w, o in zip(weights, outs, strict=True))
    assert error(merged, exact(q, k, v, bias)[0], v) < BOUNDS[torch.float32]


@pytest.mark.parametrize("run", [op.kernel for op in OPS] + [op.call for op in OPS])
@pytest.mark.parametrize("shape", [(0, 2, 3, 32), (2, 2, 0, 32)])
def test_empty(run: Any, shape: tuple[int, ...]) -> None:
    q, k = torch.zeros(shape), torch.zeros(shape[0], 2, 5, 32)
    result = run(q, k, k, torch.zeros(shape[0], 5))
    assert (result if isinstance(result, Tensor) else result[0]).shape == (shape[0], shape[2], 64)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_registered(op: Op) -> None:
    for arguments in op.examples(CPU, torch.float32):
        torch.library.opcheck(op.call, arguments, test_utils=("test_schema", "test_faketensor"))


X = torch.zeros(1, 2, 5, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X[0], X, X, None), "q, k, v must be"),
        ((X, X, X[:, :, 1:], None), "k like v"),
        ((X[:, 1:], X, X, None), "agree in all but their rows"),
        ((X, X.double(), X, None), "one dtype"),
        ((X, X[:, :, :0], X[:, :, :0], None), "at least one key"),
        ((X, X, X, torch.zeros(1, 4)), r"bias must be \(batch, keys\) = \(1, 5\): got \(1, 4\)"),
    ],
)
@pytest.mark.parametrize("run", [run for op in OPS for run in (op.kernel, op.reference)])
def test_wrong_arguments(run: Any, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(*arguments)


@pytest.mark.parametrize("x", [X.double(), X[..., :24]], ids=["float64", "D24"])
def test_what_the_kernel_does_not_take(x: Tensor) -> None:
    with pytest.raises(ValueError, match="the kernel takes"):
        attention_triton(x, x, x, None)
    assert attention_reference(x, x, x, None).shape == (1, 5, 2 * x.shape[-1])


@pytest.mark.parametrize("chip", CHIPS)
def test_compilations_fit_the_kernel(chip: int) -> None:
    found = list(module.compilations(chip))
    for one in found:
        assert {*one.signature, *one.constants} == {*one.kernel.arg_names}
        assert list(one.signature) == [name for name in one.kernel.arg_names if name in one.signature]
    assert len(found) == (6 if chip in (90, 100) else 4)
