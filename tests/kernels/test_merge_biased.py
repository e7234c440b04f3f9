"""Biases merged into attention without any: the reference against attention with them, the kernel against float64."""

from math import log
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.kernels.attention import attention_lse_reference, attention_reference
from step1x.kernels.launch import CHIPS
from step1x.kernels.merge_biased import (
    OPS,
    compilations,
    merge_biased,
    merge_biased_op,
    merge_biased_reference,
    merge_biased_triton,
)

CPU = torch.device("cpu")
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # of the largest value; bf16 rounds the result and `out`
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # Loop bounds of a kernel are arrays of one number in the interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


def without(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As a library leaves attention without a bias: (batch, heads, M, D) and the log-sum-exp."""
    out, lse = attention_lse_reference(q, k, v, None)
    return out.unflatten(-1, (q.shape[1], -1)).transpose(1, 2), lse


def wide(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(one.double() for one in arguments)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_kernel_against_float64(dtype: torch.dtype) -> None:
    for arguments in merge_biased_op.examples(CPU, dtype):
        found, exact = merge_biased_triton(*arguments), merge_biased_reference(*wide(arguments))
        assert (found.shape, found.dtype, found.is_contiguous()) == (exact.shape, dtype, True)
        assert found.isfinite().all()
        largest = max((float(one.abs().max()) for one in (arguments[0], arguments[4]) if one.numel()), default=0.0)
        assert found.numel() == 0 or float((found.double() - exact).abs().max()) <= BOUNDS[dtype] * largest


@given(
    queries=st.integers(1, 70),
    keys=st.integers(1, 9),
    head_dim=st.sampled_from([8, 24, 32, 128]),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_kernel_is_attention_with_the_bias(queries: int, keys: int, head_dim: int, scale: float) -> None:
    torch.manual_seed(queries)
    q, k, v = (scale * torch.randn(2, 3, rows, head_dim) for rows in (queries, keys + 3, keys + 3))
    bias = torch.zeros(2, keys + 3)
    bias[:, 1 : keys + 1] = 5 * torch.rand(2, keys)
    some = slice(1, keys + 1)
    exact = attention_reference(q.double(), k.double(), v.double(), bias.double())
    for merge in (merge_biased_triton, merge_biased_reference):
        found = merge(*without(q, k, v), q, k[:, :, some], v[:, :, some], bias[:, some])
        assert float((found - exact).abs().max()) <= 2e-6 * float(v.abs().max())


def test_both_guidance_branches_have_biases_of_their_own() -> None:
    q, k, v = (torch.randn(2, 2, rows, 32, dtype=torch.float64) for rows in (33, 29, 29))
    bias = torch.zeros(2, 29, dtype=torch.float64)
    bias[0, 5:8], bias[1, 7] = log(100.0), log(300.0)
    found = merge_biased(*without(q, k, v), q, k[:, :, 5:8], v[:, :, 5:8], bias[:, 5:8])
    torch.testing.assert_close(found, attention_reference(q, k, v, bias), rtol=1e-12, atol=1e-12)


def test_registered() -> None:
    for arguments in merge_biased_op.examples(CPU, torch.float32):
        torch.library.opcheck(merge_biased, arguments, test_utils=("test_schema", "test_faketensor"))


X = torch.zeros(1, 2, 5, 32)
FEW = X[:, :, :3]
LSE, BIAS = torch.zeros(1, 2, 5), torch.zeros(1, 3)


@pytest.mark.parametrize("run", [run for op in OPS for run in (op.kernel, op.reference)])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X[0], LSE, X, FEW, FEW, BIAS), "out and q must be"),
        ((X, LSE[..., 1:], X, FEW, FEW, BIAS), "lse"),
        ((X, LSE, X, FEW[:, 1:], FEW[:, 1:], BIAS), "beside q"),
        ((X, LSE, X, FEW, FEW[:, :, 1:], BIAS), "k and v must be"),
        ((X, LSE, X, FEW, FEW, BIAS[:, 1:]), r"bias must be \(batch, keys\) = \(1, 3\): got \(1, 2\)"),
        ((X, LSE, X, FEW.double(), FEW, BIAS), "one dtype"),
    ],
)
def test_wrong_arguments(run: Any, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(*arguments)


def test_float64_has_no_kernel() -> None:
    with pytest.raises(ValueError, match="float64"):
        merge_biased_triton(*wide((X, LSE, X, FEW, FEW, BIAS)))


@pytest.mark.parametrize("chip", CHIPS)
def test_compilations_fit_the_kernel(chip: int) -> None:
    for one in compilations(chip):
        assert {*one.signature, *one.constants} == {*one.kernel.arg_names}
        assert list(one.signature) == [name for name in one.kernel.arg_names if name in one.signature]
