"""Who computes attention: our kernel, PyTorch's, or an installed library, all called as `attention` is.

Libraries take no bias per key, or lose their fast kernel to it. Where few keys are biased (the rows that stand for
collapsed padding) they need none: they attend to all keys without bias and return the log-sum-exp of the logits, and
`merge_biased` adds what the biases change: two launches.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import log
from typing import Protocol

import torch
from torch import Tensor

from step1x.kernels.attention import attention, attention_op, attention_reference, check, joined
from step1x.kernels.attention_fp8 import attention_fp8, attention_fp8_op
from step1x.kernels.launch import CHIPS, Example, Op, assuming, capability, nearest, runs_kernels
from step1x.kernels.merge_biased import merge_biased, merge_biased_reference


class Attention(Protocol):
    """q (batch, heads, M, D), k and v (batch, heads, N, D), bias (batch, N) -> (batch, M, heads * D)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, /) -> Tensor: ...


# Without bias -> out (batch, heads, M, D) and the log-sum-exp of its logits (batch, heads, M).
WithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# PyTorch's own choice. Its flash kernels take no mask: with a bias, a GPU gets the memory-efficient kernel, and the
# bias is rounded to q's dtype, in bfloat16 by up to 0.8 % of the weight of a key that stands for 8 to 55, 1.6 % above.
sdpa = attention_reference


# `merge_biased`, or its reference.
Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def merged(
    biased: slice | None,
    with_lse: WithLse,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    merge: Merge = merge_biased,
) -> Tensor:
    """`biased`: the keys whose bias may differ from zero, known to the host, so that nothing waits for the GPU."""
    check(q, k, v, bias)
    out, lse = with_lse(q, k, v)
    if bias is None:
        return joined(out)
    if biased is None:
        raise ValueError("this attention backend must be told which keys carry a bias")
    return merge(out, lse, q, k[:, :, biased], v[:, :, biased], bias[:, biased])


def automatic(biased: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`biased` where there is a bias; PyTorch's own choice without one, and in dtypes that flash kernels lack."""
    short = q.device.type == "cpu" or q.dtype in (torch.bfloat16, torch.float16)
    return biased(q, k, v, bias) if bias is not None and short else sdpa(q, k, v, bias)


def torch_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernels; cuDNN's where it has one of its own for the chip. float32 and float64 on CPU only."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif nearest(capability(q.device)) in (90, 100):
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out, lse.reshape(q.shape[:3])


def flash3_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-3: (batch, rows, heads, D)."""
    attend = import_module("flash_attn_interface").flash_attn_func
    out, lse = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), return_attn_probs=True)
    return out.transpose(1, 2), lse


def sage_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """SageAttention: q and k in 8 bits, so results differ by some per cent from exact ones."""
    out, lse = import_module("sageattention").sageattn(q, k, v, tensor_layout="HND", return_lse=True)
    return out, lse


# Part of a GPU's name -> its fastest exact backend where it is another than "auto" takes, which "fp8" and "sage" are
# not, and each with the line of bench/results that says so.
MEASURED: dict[str, str] = {}


def available(device: torch.device) -> tuple[str, ...]:
    chip = capability(device)
    kernels = device.type == "cuda" and runs_kernels(device.index or 0)
    usable = {
        "sdpa": True,
        "merged": device.type == "cpu" or chip >= 80,
        "triton": kernels,
        "fp8": device.type == "cpu" or (kernels and CHIPS[nearest(chip)].fp8),  # a CPU has its definition
        "flash3": chip == 90 and find_spec("flash_attn_interface") is not None,
        "sage": chip >= 80 and find_spec("sageattention") is not None,
    }
    return tuple(name for name, there in usable.items() if there)


def automatic_name(device: torch.device, biased: slice | None) -> str:
    """The backend of "auto" where there is a bias on the keys `biased`; None: on any."""
    there = available(device)
    gpu = "" if assuming() or device.type != "cuda" else torch.cuda.get_device_name(device)
    known = next((name for part, name in MEASURED.items() if part in (gpu or device.type) and name in there), None)
    if known is not None:
        return known
    return "merged" if device.type == "cuda" and biased is not None and "merged" in there else "sdpa"


def choose(name: str, device: torch.device, biased: slice | None = None, merge: Merge = merge_biased) -> Attention:
    """The backend of that name, or "auto". biased: see `merged`."""
    if name == "auto":
        return partial(automatic, choose(automatic_name(device, biased), device, biased, merge))
    if name not in available(device):
        raise ValueError(
            f"attention backend {name!r} is not available on {device}: auto, {', '.join(available(device))}"
        )
    backends: dict[str, Attention] = {
        "sdpa": sdpa,
        "merged": partial(merged, biased, torch_lse, merge=merge),
        "triton": attention,
        "fp8": attention_fp8,
        "flash3": partial(merged, biased, flash3_lse, merge=merge),
        "sage": partial(merged, biased, sage_lse, merge=merge),
    }
    return backends[name]


def checked_by(name: str, device: torch.device, biased: slice | None) -> Op | None:
    """The operation whose check (checks.py) a backend rests on, if it rests on one of ours or on `merged`."""
    name = automatic_name(device, biased) if name == "auto" else name
    return {"merged": merged_op, "triton": attention_op, "fp8": attention_fp8_op}.get(name)


EXAMPLE = slice(7, 10)  # the biased keys of the examples


def _merged_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return merged(EXAMPLE, torch_lse, q, k, v, bias, merge_biased_reference)


def _examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    for heads, queries, keys, head_dim in ((3, 130, 200, 128), (2, 45, 77, 32)):
        rows = (queries, keys, keys)
        q, k, v = (torch.randn(2, heads, count, head_dim, device=device).to(dtype) for count in rows)
        bias = torch.zeros(2, keys, device=device)
        bias[:, EXAMPLE] = torch.tensor([0.0, log(37.0), log(145.2)], device=device)
        yield q, k, v, bias


# Not registered: what is checked is PyTorch's kernel of the chip, of which two results are put to use.
merged_op = Op(
    name="attention_merged",
    call=_merged_call,
    reference=attention_reference,
    kernel=_merged_call,
    examples=_examples,
    dtypes=(torch.bfloat16,),
)
