"""Attention by other backends: biases merged exactly, the adapters' layouts, names and what is available."""

import sys
from itertools import product
from math import log
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.bench.counting import Launches
from step1x.kernels import attention_backends as module
from step1x.kernels.attention import attention_lse_reference, attention_op, attention_reference
from step1x.kernels.attention_backends import (
    automatic_name,
    available,
    checked_by,
    choose,
    flash3_lse,
    merged,
    merged_op,
    sage_lse,
    torch_lse,
)
from step1x.kernels.attention_fp8 import attention_fp8

CPU = torch.device("cpu")


def qkv(queries: int, keys: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries)
    packed = torch.randn(2, max(queries, keys), 3, 2, 16, dtype=torch.float64) * scale
    q, k, v = packed.to(dtype).permute(2, 0, 3, 1, 4)
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]


def counts(keys: int, biased: slice, most: float = 300.0) -> Tensor:
    """Two requests of which the second has one row of padding less."""
    bias = torch.zeros(2, keys, dtype=torch.float64)
    bias[:, biased] = log(most)
    bias[1, biased.start] = 0
    return bias


@given(
    queries=st.integers(1, 40), start=st.integers(0, 20), count=st.integers(1, 9), scale=st.sampled_from([0.1, 1, 4])
)
@settings(max_examples=25, deadline=None)
def test_merged_is_exact(queries: int, start: int, count: int, scale: float) -> None:
    q, k, v = qkv(queries, 31, torch.float64, scale)
    biased = slice(start, start + count)
    bias = counts(31, biased)
    out = merged(biased, torch_lse, q, k, v, bias)
    assert (out - attention_reference(q, k, v, bias)).abs().max() < 1e-12 * v.abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_merged_in_lower_precision(dtype: torch.dtype, bound: float) -> None:
    q, k, v = qkv(33, 29, dtype)
    bias = counts(29, slice(5, 8))
    out = merged(slice(5, 8), torch_lse, q, k, v, bias.float())
    exact = attention_reference(q.double(), k.double(), v.double(), bias)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert (out - exact).abs().max() < bound * v.abs().max()


def test_merged_without_bias() -> None:
    q, k, v = qkv(5, 7, torch.float64)
    torch.testing.assert_close(choose("merged", CPU)(q, k, v, None), attention_reference(q, k, v, None))


def test_merged_must_know_the_biased_keys() -> None:
    q, k, v = qkv(5, 7, torch.float32)
    with pytest.raises(ValueError, match="which keys carry a bias"):
        choose("merged", CPU)(q, k, v, torch.zeros(2, 7))


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, return_attn_probs: bool) -> tuple[Tensor, Tensor]:
    """As FlashAttention-3's: (batch, rows, heads, D) in and out."""
    assert return_attn_probs
    out, lse = attention_lse_reference(*(x.transpose(1, 2) for x in (q, k, v)), None)
    return out.unflatten(-1, (q.shape[2], -1)), lse


def sageattn(q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, return_lse: bool) -> tuple[Tensor, Tensor]:
    assert (tensor_layout, return_lse) == ("HND", True)
    out, lse = attention_lse_reference(q, k, v, None)
    return out.unflatten(-1, (q.shape[1], -1)).transpose(1, 2), lse


@pytest.mark.parametrize(
    ("package", "function", "with_lse"),
    [("flash_attn_interface", flash_attn_func, flash3_lse), ("sageattention", sageattn, sage_lse)],
    ids=["flash3", "sage"],
)
def test_adapters(package: str, function: Any, with_lse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType(package)
    setattr(stand_in, function.__name__, function)
    monkeypatch.setitem(sys.modules, package, stand_in)
    q, k, v = qkv(9, 11, torch.float64)
    bias = counts(11, slice(2, 5))
    out = merged(slice(2, 5), with_lse, q, k, v, bias)
    torch.testing.assert_close(out, attention_reference(q, k, v, bias), rtol=1e-12, atol=1e-12)


# Which of PyTorch's kernels gives the log-sum-exp: cuDNN's where it has one of its own for the chip.
LIBRARIES = {80: "flash", 86: "flash", 89: "flash", 90: "cudnn", 100: "cudnn", 103: "cudnn", 120: "flash", 121: "flash"}


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


@pytest.mark.parametrize(("chip", "library"), LIBRARIES.items())
def test_the_library_of_a_chip(chip: int, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, str]:
        called.append("flash")
        return q, q[..., 0], "what is not used"

    def cudnn(q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool) -> tuple[Tensor, Tensor, str]:
        assert with_lse
        called.append("cudnn")
        return q, q[..., :1], "what is not used"

    monkeypatch.setattr(module, "capability", lambda device: chip)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash, raising=False)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn, raising=False)
    q = torch.zeros(2, 3, 5, 16).as_subclass(OnGpu)
    out, lse = torch_lse(q, q, q)
    assert called == [library]
    assert out is q
    assert lse.shape == (2, 3, 5)


@pytest.mark.parametrize("name", ["auto", "sdpa", "merged"])
def test_chosen_on_cpu(name: str) -> None:
    q, k, v = qkv(9, 11, torch.float64)
    bias = counts(11, slice(4, 6))
    out = choose(name, CPU, slice(4, 6))(q, k, v, bias)
    torch.testing.assert_close(out, attention_reference(q, k, v, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["triton", "flash3", "sage", "nonsense"])
def test_unavailable(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is not available on cpu: auto, sdpa, merged, fp8$"):
        choose(name, CPU)


@pytest.mark.parametrize(
    ("chip", "names"),
    [
        (75, "sdpa"),
        (80, "sdpa merged triton sage"),
        (86, "sdpa merged triton sage"),
        (89, "sdpa merged triton fp8 sage"),
        (90, "sdpa merged triton fp8 flash3 sage"),
        (120, "sdpa merged triton fp8 sage"),
    ],
)
def test_available_on(chip: int, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capability", lambda device: chip)
    monkeypatch.setattr(module, "runs_kernels", lambda index: chip >= 80)
    monkeypatch.setattr(module, "find_spec", lambda package: "installed")
    assert available(torch.device("cuda")) == tuple(names.split())


def test_fp8_is_chosen_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available", lambda device: ("sdpa", "fp8"))
    assert choose("fp8", CPU) is attention_fp8
    assert automatic_name(CPU, slice(2, 4)) == "sdpa"
    assert not {"fp8", "sage"} & set(module.MEASURED.values())  # not exact


GPU = torch.device("cuda", 0)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes device 0 a GPU of a compute capability, of which PyTorch's name is "A card"."""

    def make(found: int) -> None:
        monkeypatch.setattr(module, "capability", lambda device: found if device.type == "cuda" else 0)
        monkeypatch.setattr(module, "runs_kernels", lambda index: found >= 80)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    return make


def test_auto_is_merged_where_the_biased_keys_are_known(chip: Any) -> None:
    for found in (80, 86, 89, 90, 100, 120):
        chip(found)
        assert automatic_name(GPU, slice(4, 6)) == "merged"
        assert automatic_name(GPU, None) == "sdpa", "any key may carry one"
        assert checked_by("auto", GPU, slice(4, 6)) is merged_op
    chip(75)
    assert automatic_name(GPU, slice(4, 6)) == "sdpa"
    assert checked_by("auto", GPU, slice(4, 6)) is None
    assert automatic_name(CPU, slice(4, 6)) == "sdpa"


def test_auto_follows_what_was_measured(chip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chip(90)
    monkeypatch.setitem(module.MEASURED, "A card", "triton")
    assert automatic_name(GPU, slice(4, 6)) == automatic_name(GPU, None) == "triton"
    assert checked_by("auto", GPU, slice(4, 6)) is attention_op
    monkeypatch.setitem(module.MEASURED, "A card", "flash3")  # not there
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    assert automatic_name(GPU, slice(4, 6)) == "merged"


def test_auto_asks_the_library_only_where_there_is_a_bias(chip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for dtypes that it does not take."""
    chip(90)
    asked = []

    def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(q.dtype)
        return torch_lse(*(x.as_subclass(Tensor) for x in (q, k, v)))

    monkeypatch.setattr(module, "torch_lse", with_lse)
    monkeypatch.setattr(module, "sdpa", lambda q, k, v, bias: "sdpa")
    attend = choose("auto", GPU, slice(4, 6))
    bias = counts(11, slice(4, 6)).float()
    for dtype, with_bias in product((torch.bfloat16, torch.float32, torch.float64), (True, False)):
        q, k, v = (x.as_subclass(OnGpu) for x in qkv(9, 11, dtype))
        found = attend(q, k, v, bias if with_bias else None)
        assert isinstance(found, str) != (with_bias and dtype == torch.bfloat16)
    assert asked == [torch.bfloat16]


def test_merged_takes_two_launches() -> None:
    """On a GPU, where an operation of ours is one; q, k and v as the engine has them."""
    (q, k, v), bias = qkv(9, 11, torch.float32), counts(11, slice(4, 6)).float()
    with Launches() as launches:
        merged(slice(4, 6), torch_lse, q, k, v, bias)
    assert dict(launches.operators) == {
        "aten._scaled_dot_product_flash_attention_for_cpu.default": 1,
        "step1x.merge_biased.default": 1,
    }
