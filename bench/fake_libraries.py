"""What a CUDA machine's libraries have and a CPU has not, what they refuse, and operators run again in place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from step1x.bench.pretend import tensors

aten = torch.ops.aten
LEAST_ROWS = 17  # of `torch._int_mm` on CUDA
EIGHT_BIT = (aten._scaled_mm, aten._int_mm)


def _attended(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    """As the libraries' attention: (batch, heads, M, D) with heads side by side, log-sum-exps, seven for a backward."""
    logits = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    out = (logits.softmax(-1) @ v.float()).to(q.dtype)
    none = [q.new_empty(0) for _ in range(5)]
    return out.transpose(1, 2).contiguous().transpose(1, 2), logits.logsumexp(-1), *none[:2], 0, 0, *none[2:]


# Attention that has no kernel on a CPU.
LIBRARIES: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention: _attended,
    aten._scaled_dot_product_cudnn_attention: _attended,
}


def check_product(packet: Any, args: Any, kwargs: Any) -> None:
    """Raises RuntimeError for 8-bit products that cuBLASLt has not got (torch: aten/src/ATen/native/cuda/Blas.cpp)."""
    rows, weight = args[0], args[1]
    if packet is aten._int_mm:
        if rows.shape[0] < LEAST_ROWS or rows.shape[1] % 8 or weight.shape[1] % 8:
            raise RuntimeError(f"_int_mm: no kernel for {tuple(rows.shape)} x {tuple(weight.shape)}")
        return
    if rows.shape[1] % 16 or weight.shape[1] % 16 or not rows.is_contiguous() or not weight.t().is_contiguous():
        raise RuntimeError(f"_scaled_mm: no kernel for {tuple(rows.shape)} x {tuple(weight.shape)} or their strides")
    named = dict(zip(("bias", "scale_result", "out_dtype"), args[4:7], strict=False)) | kwargs
    if args[2].numel() > 1 and named.get("out_dtype") != torch.bfloat16:
        raise RuntimeError("_scaled_mm: scales by row come with bfloat16 results only")


def again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Runs an operator once more, with its results in the memory of those it gave before."""
    if func.is_view:
        return
    given = {one.untyped_storage()._cdata for one in tensors((args, kwargs))}
    fresh = tensors(LIBRARIES.get(func.overloadpacket, func)(*args, **kwargs))
    for before, now in zip(tensors(out), fresh, strict=True):
        if before.untyped_storage()._cdata not in given:
            aten.copy_(before, now)


def changed_operands(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to, by its schema."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return found
