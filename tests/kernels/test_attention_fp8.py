"""8-bit attention in the interpreter against its definition in torch, and the definition against exact attention."""

from math import log
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.kernels import attention_fp8 as module
from step1x.kernels.attention import attention_reference
from step1x.kernels.attention_fp8 import (
    attention_fp8,
    attention_fp8_op,
    attention_fp8_reference,
    attention_fp8_triton,
    quantise_reference,
    quantise_triton,
)
from step1x.kernels.launch import CHIPS

CPU = torch.device("cpu")
EXAMPLES = len(list(attention_fp8_op.examples(CPU, torch.float32)))
# Kernel against reference: sums in another order, and in bfloat16 the result's last bit.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def example(index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(index)
    return list(attention_fp8_op.examples(CPU, dtype))[index]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return attention_reference(q.double(), k.double(), v.double(), None if bias is None else bias.double())


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=[89, 90], ids=["pointers", "descriptors"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "capability", lambda device: request.param)
    return request.param


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("index", range(EXAMPLES))
def test_quantisation(index: int, dtype: torch.dtype) -> None:
    """Bit for bit, and so where blocks are filled up."""
    q, k, v, _ = example(index, dtype)
    for found, wanted in zip(quantise_triton(q, k, v), quantise_reference(q, k, v), strict=True):
        assert found.shape == wanted.shape
        assert found.is_contiguous()
        torch.testing.assert_close(found.view(torch.uint8), wanted.view(torch.uint8), rtol=0, atol=0)


def test_the_quantised_are_near() -> None:
    """Half of the last of three bits, and less near zero; the scale of a block is that of its largest."""
    q, k, v = (normal(1, 2, rows, 32) for rows in (200, 100, 100))
    k[:, :, 64:] *= 1000  # another block
    v[..., 5] *= 1000  # another channel
    q8, q_scale, k8, k_scale, v8, v_scale = quantise_reference(q, k, v)
    assert (q8.shape, k8.shape, v8.shape) == ((1, 2, 256, 32), (1, 2, 128, 32), (1, 2, 32, 128))
    assert all(x.float().abs().amax() == 448 for x in (q8, k8, v8))
    to_logits = 32**-0.5 / log(2)
    for values, scales, wanted in (
        (q8, q_scale.repeat_interleave(128, 2)[..., None] / to_logits, q),
        (k8, k_scale.repeat_interleave(64, 2)[..., None], k - k.mean(2, keepdim=True)),
        (v8.mT, v_scale[:, :, None], v),
    ):
        found, rows = values.float() * scales, wanted.shape[2]
        bound = (wanted.abs() / 16).maximum(torch.full_like(wanted, 2.0**-10) * scales.expand_as(found)[:, :, :rows])
        assert ((found[:, :, :rows] - wanted).abs() <= bound * 1.0001).all()
        assert (found[:, :, rows:] == 0).all()


@pytest.mark.usefixtures("poisoned_memory", "chip")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("index", range(EXAMPLES))
def test_kernel(index: int, dtype: torch.dtype) -> None:
    arguments = example(index, dtype)
    out = attention_fp8_triton(*arguments)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert error(out, attention_fp8_reference(*arguments)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("index", range(EXAMPLES))
def test_examples_are_near_exact_attention(index: int, dtype: torch.dtype) -> None:
    """One key is itself; where one key of few has nearly all the weight, 8 bits may choose another."""
    arguments = example(index, dtype)
    bound = {3: 2**-8, 5: 0.4}.get(index, 0.06)
    assert error(attention_fp8_reference(*arguments), exact(*arguments)) < bound


@pytest.mark.usefixtures("poisoned_memory")
@given(
    queries=st.integers(1, 140),
    keys=st.integers(1, 140),
    head_dim=st.sampled_from([32, 64, 128]),
    biased=st.booleans(),
    chip=st.sampled_from([89, 90]),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sizes(
    queries: int, keys: int, head_dim: int, biased: bool, chip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "capability", lambda device: chip)
    torch.manual_seed(queries)
    q, k, v = (normal(1, 1, rows, head_dim) for rows in (queries, keys, keys))
    bias = normal(1, keys) * 5 if biased else None
    assert error(attention_fp8_triton(q, k, v, bias), attention_fp8_reference(q, k, v, bias)) < 1e-3


@pytest.mark.usefixtures("chip")
def test_any_strides() -> None:
    """Rows that begin anywhere, channels that are not adjacent, heads that are one."""
    torch.manual_seed(0)
    q = normal(1, 2, 40, 33)[..., 1:]
    k = normal(1, 2, 32, 40).mT
    v = normal(1, 1, 40, 32).expand(1, 2, 40, 32)
    bias = normal(40, 1).T
    out = attention_fp8_triton(q, k, v, bias)
    assert error(out, attention_fp8_reference(q, k, v, bias)) < 1e-5
    assert error(out, exact(q, k, v, bias)) < 0.06


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [24, 32, 128])
def test_error_of_normal_numbers(head_dim: int, dtype: torch.dtype) -> None:
    """Of logits with variance 1, 5.4 %: 3.8 % by the weights and v, the rest by q and k."""
    torch.manual_seed(head_dim)
    q, k, v = (normal(1, 2, 500, head_dim).to(dtype) for _ in range(3))
    out = attention_fp8(q, k, v, None)
    assert out.dtype == dtype
    assert 0.045 < error(out, exact(q, k, v, None)) < 0.06


@pytest.mark.parametrize(("scale", "measured"), [(0.1, 0.038), (2, 0.076), (4, 0.092)])
def test_error_of_flat_and_peaked_weights(scale: float, measured: float) -> None:
    torch.manual_seed(0)
    q, k, v = (normal(1, 2, 500, 128) for _ in range(3))
    found = error(attention_fp8(scale * q, k, v, None), exact(scale * q, k, v, None))
    assert 0.85 * measured < found < 1.15 * measured


def test_what_all_keys_share_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an offset of 30 standard deviations; without smoothing the error would be ten times as large."""
    torch.manual_seed(0)
    q, k, v = (normal(1, 2, 300, 64) for _ in range(3))
    offset = 30 * normal(1, 2, 1, 64)
    plain = error(attention_fp8(q, k, v, None), exact(q, k, v, None))
    assert error(attention_fp8(q, k + offset, v, None), exact(q, k + offset, v, None)) < 1.1 * plain
    monkeypatch.setattr(module, "_mean", lambda k: torch.zeros_like(k[:, :, :1]))
    assert error(attention_fp8_reference(q, k + offset, v, None), exact(q, k + offset, v, None)) > 10 * plain


def test_any_vector_in_place_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, the mean of other keys: exact but for what is rounded."""
    torch.manual_seed(0)
    q, k, v = (normal(1, 2, 300, 64) for _ in range(3))
    monkeypatch.setattr(module, "_mean", lambda k: normal(1, 2, 1, 64))
    assert error(attention_fp8_reference(q, k, v, None), exact(q, k, v, None)) < 0.06


@pytest.mark.usefixtures("chip")
def test_the_bias_is_not_rounded() -> None:
    """Among 300 others, a key that counts for 300 weighs one half; with its bias in bfloat16 it weighs 0.5037."""
    q, k, v = torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 301, 32), torch.zeros(1, 1, 301, 32)
    bias = torch.zeros(1, 301)
    v[:, :, 7], bias[:, 7] = 1, log(300)
    for run in (attention_fp8_reference, attention_fp8_triton):
        torch.testing.assert_close(run(q, k, v, bias), torch.full((1, 1, 32), 0.5), rtol=1e-5, atol=0)


def test_a_bias_counts_keys() -> None:
    """Thirteen equal keys as one with a bias of log 13: as near to exact attention as without."""
    torch.manual_seed(0)
    q, k, v = (normal(1, 2, 300, 64) for _ in range(3))
    bias = torch.zeros(1, 300)
    bias[:, -20:] = log(13)
    many = [torch.cat((x, x[:, :, -20:].repeat(1, 1, 12, 1)), 2) for x in (k, v)]
    assert error(exact(q, k, v, bias), exact(q, *many, None)) < 1e-6
    assert error(attention_fp8(q, k, v, bias), exact(q, *many, None)) < 0.06


def test_weights_alike() -> None:
    """They fall between the same two values of e4m3, so their errors have one sign: a mean is off by up to 3 %."""
    torch.manual_seed(0)
    q, k = 0.02 * normal(1, 2, 300, 64), normal(1, 2, 300, 64)
    v = 1 + 0.01 * normal(1, 2, 300, 64)
    out, wanted = attention_fp8(q, k, v, None), exact(q, k, v, None)
    assert 0.005 < error(out, wanted) < 0.02
    flat = torch.full((1, 300), -log(256 / 247.9))  # but one key, all just below the middle of 240 and 256
    flat[:, 0] = 0
    assert 0.02 < error(attention_fp8(0 * q, k, v, flat), exact(0 * q, k, v, flat)) < 0.035


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e15])
def test_large_and_tiny_values(size: float) -> None:
    """Scales take what e4m3 cannot hold: the same weights and, but for the size, the same result."""
    torch.manual_seed(0)
    q, k, v = (normal(1, 2, 90, 32) for _ in range(3))
    assert error(attention_fp8(q * size, k / size, v * size, None) / size, exact(q, k, v, None)) < 0.06


@pytest.mark.parametrize("run", [attention_fp8_triton, attention_fp8_reference, attention_fp8])
@pytest.mark.parametrize("shape", [(0, 2, 3, 32), (2, 2, 0, 32)])
def test_empty(run: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launch."""
    monkeypatch.setattr(module, "quantise_triton", None)
    q, k = torch.zeros(shape), torch.zeros(shape[0], 2, 5, 32)
    assert run(q, k, k, torch.zeros(shape[0], 5)).shape == (shape[0], shape[2], 64)


def test_registered() -> None:
    for arguments in attention_fp8_op.examples(CPU, torch.bfloat16):
        torch.library.opcheck(attention_fp8, arguments, test_utils=("test_schema", "test_faketensor"))


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
@pytest.mark.parametrize("run", [attention_fp8_triton, attention_fp8_reference])
def test_wrong_arguments(run: Any, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(*arguments)


@pytest.mark.parametrize("x", [X.double(), X[..., :24]], ids=["float64", "D24"])
def test_what_the_kernel_does_not_take(x: Tensor) -> None:
    with pytest.raises(ValueError, match="the kernel takes"):
        attention_fp8_triton(x, x, x, None)
    assert attention_fp8_reference(x, x, x, None).shape == (1, 5, 2 * x.shape[-1])


@pytest.mark.parametrize("chip", [80, 86])
def test_not_without_8_bit_products(chip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capability", lambda device: chip)
    with pytest.raises(ValueError, match=f"sm_{chip} has not"):
        attention_fp8_triton(X, X, X, None)
    assert not list(module.compilations(80))


@pytest.mark.parametrize("chip", [chip for chip, limits in CHIPS.items() if limits.fp8])
def test_compilations_fit_the_kernels(chip: int) -> None:
    found = list(module.compilations(chip))
    for one in found:
        assert {*one.signature, *one.constants} == {*one.kernel.arg_names}
        assert list(one.signature) == [name for name in one.kernel.arg_names if name in one.signature]
    assert len(found) == 16
