"""Who computes attention: our kernel, PyTorch's, or an installed library, all called as `attention` is.

Libraries take no bias per key, or lose their fast kernel to it. Where few keys are biased (the rows that stand for
collapsed padding) they need none: they attend to all keys without bias and return the log-sum-exp of the logits, and
`merge` adds what the biases change.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from step1x.kernels.attention import attention, attention_reference, check, joined
from step1x.kernels.attention_fp8 import attention_fp8
from step1x.kernels.launch import CHIPS, capability, nearest, runs_kernels


class Attention(Protocol):
    """q (batch, heads, M, D), k and v (batch, heads, N, D), bias (batch, N) -> (batch, M, heads * D)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, /) -> Tensor: ...


# Without bias -> out (batch, heads, M, D) and the log-sum-exp of its logits (batch, heads, M).
WithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# PyTorch's own choice. Its flash kernels take no mask: with a bias, a GPU gets the memory-efficient kernel, and the
# bias is rounded to q's dtype, in bfloat16 by up to 0.8 % of the weight of a key that stands for 8 to 55, 1.6 % above.
sdpa = attention_reference


def merge(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention to all keys with the bias on some, from attention without: k, v and bias are those keys' alone.

    A key of logit s and bias b weighs exp(s - lse) of the sum without bias and gains e^b - 1 times that. Exact, but
    made for b >= 0: a key masked out (b = -inf) would cancel what `out` already rounded.
    """
    dtype = lse.dtype
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * q.shape[-1] ** -0.5
    gain = torch.expm1(bias.to(dtype))[:, None, None] * torch.exp(logits - lse[..., None])  # (batch, heads, M, keys)
    return ((out.to(dtype) + gain @ v.to(dtype)) / (1 + gain.sum(-1, keepdim=True))).to(out.dtype)


def merged(biased: slice | None, with_lse: WithLse, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`biased`: the keys whose bias may differ from zero, known to the host, so that nothing waits for the GPU."""
    check(q, k, v, bias)
    out, lse = with_lse(q, k, v)
    if bias is not None:
        if biased is None:
            raise ValueError("this attention backend must be told which keys carry a bias")
        out = merge(out, lse, q, k[:, :, biased], v[:, :, biased], bias[:, biased])
    return joined(out)


def torch_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernels; cuDNN's where it has one of its own for the chip. float32 and float64 on CPU only."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif capability(q.device) in (90, 100):
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


# Part of a GPU's name -> its fastest exact backend, which "fp8" and "sage" are not, and each with the line of
# bench/results that says so.
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


def measured(device: torch.device) -> str:
    """The backend of "auto"."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return next((name for part, name in MEASURED.items() if part in gpu and name in available(device)), "sdpa")


def choose(name: str, device: torch.device, biased: slice | None = None) -> Attention:
    """The backend of that name, or "auto". biased: see `merged`."""
    if name == "auto":
        name = measured(device)
    if name not in available(device):
        raise ValueError(
            f"attention backend {name!r} is not available on {device}: auto, {', '.join(available(device))}"
        )
    backends: dict[str, Attention] = {
        "sdpa": sdpa,
        "merged": partial(merged, biased, torch_lse),
        "triton": attention,
        "fp8": attention_fp8,
        "flash3": partial(merged, biased, flash3_lse),
        "sage": partial(merged, biased, sage_lse),
    }
    return backends[name]
