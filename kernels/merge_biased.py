"""Attention to all keys with a bias on a few of them, from attention without any, joined for the next product.

Libraries' kernels take no bias per key, or lose their fast path to it; they do return the log-sum-exp of the logits.
A key of logit s and bias b weighs exp(s - lse) of the sum without biases and gains e^b - 1 times that:

    gain_j = (e^b_j - 1) exp(q k_j / √D - lse)        result = (out + sum_j gain_j v_j) / (1 + sum_j gain_j)

Exact, but made for b >= 0: a key masked out (b = -inf) would cancel what `out` already rounded. In separate launches
the products, the exponentials, the sums and the new layout each move the rows. Here one program holds some rows of a
head in registers: out and q are read once and the result is written once, 6 bytes per bfloat16 element.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log

import torch
from torch import Tensor

from step1x.kernels.attention import joined
from step1x.kernels.launch import Compilation, Example, adjacent, define, jit_for_sizes, tl, triton

ROWS = {2: 32, 4: 16}  # queries of a program, by bytes of an element; 32 in float32 spill 8 bytes on sm_120
WARPS, STAGES = 4, 1
STRIDES = (*(f"{name}_{axis}" for name in ("out", "q", "k", "v") for axis in ("batch", "head", "row")),)
SIZES = ("bias_batch", "heads", "queries", "keys")


def _check(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (out, lse, q, k, v, bias)]
    if out.dim() != 4 or out.shape != q.shape or lse.shape != q.shape[:3]:
        raise ValueError(f"out and q must be (batch, heads, M, D) and lse (batch, heads, M): got {shapes[:3]}")
    if k.shape != v.shape or k.dim() != 4 or (k.shape[:2], k.shape[3]) != (q.shape[:2], q.shape[3]):
        raise ValueError(f"k and v must be (batch, heads, keys, D) beside q {shapes[2]}: got {shapes[3:5]}")
    if bias.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"bias must be (batch, keys) = {(k.shape[0], k.shape[2])}: got {shapes[5]}")
    if not out.dtype == q.dtype == k.dtype == v.dtype:
        raise ValueError(f"out, q, k, v must have one dtype: got {[x.dtype for x in (out, q, k, v)]}")


def merge_biased_reference(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """out, q (batch, heads, M, D), lse (batch, heads, M); k, v (batch, heads, keys, D) and bias (batch, keys) of the
    biased keys alone -> (batch, M, heads * D).
    """
    _check(out, lse, q, k, v, bias)
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * q.shape[-1] ** -0.5
    gain = torch.expm1(bias.to(dtype))[:, None, None] * torch.exp(logits - lse.to(dtype)[..., None])
    return joined(((out.to(dtype) + gain @ v.to(dtype)) / (1 + gain.sum(-1, keepdim=True))).to(out.dtype))


@jit_for_sizes("lse", "bias", *SIZES)  # whose elements are read one by one
def _merge_biased_kernel(  # type: ignore[no-untyped-def]
    out, lse, q, k, v, bias, merged,
    out_batch, out_head, out_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    bias_batch, heads, queries, keys, scale, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    both = tl.program_id(1).to(tl.int64)
    batch, head = both // heads, both % heads
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    there = channel < DIM
    inside = (row < queries)[:, None] & there[None, :]
    at = out + batch * out_batch + head * out_head + row[:, None] * out_row + channel[None, :]
    acc = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = q + batch * q_batch + head * q_head + row[:, None] * q_row + channel[None, :]
    tile = tl.load(at, mask=inside, other=0.0).to(tl.float32) * scale
    without = tl.load(lse + both * queries + row, mask=row < queries, other=0.0)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    total = tl.full([ROWS], 1.0, tl.float32)
    for key in range(0, keys):
        one = tl.load(k + key * k_row + channel, mask=there, other=0.0).to(tl.float32)
        value = tl.load(v + key * v_row + channel, mask=there, other=0.0).to(tl.float32)
        more = tl.exp(tl.load(bias + batch * bias_batch + key)) - 1.0
        gain = more * tl.exp(tl.sum(tile * one[None, :], 1) - without)
        acc += gain[:, None] * value[None, :]
        total += gain
    at = ((batch * queries + row) * heads + head)[:, None] * DIM + channel[None, :]
    tl.store(merged + at, (acc / total[:, None]).to(merged.dtype.element_ty), mask=inside)


def merge_biased_triton(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    _check(out, lse, q, k, v, bias)
    if torch.float64 in (out.dtype, lse.dtype):
        raise ValueError("the kernel of merge_biased computes in float32: float64 is for the reference")
    merged = _fake(out, lse, q, k, v, bias)
    if merged.numel() == 0:
        return merged
    batch, heads, queries, head_dim = q.shape
    out, q, k, v = adjacent(out), adjacent(q), adjacent(k), adjacent(v)
    bias = bias.float() if bias.stride(1) == 1 else bias.float().contiguous()
    _merge_biased_kernel[(triton.cdiv(queries, ROWS[q.itemsize]), batch * heads)](
        out,
        lse.float().contiguous(),
        q,
        k,
        v,
        bias,
        merged,
        *(stride for x in (out, q, k, v) for stride in x.stride()[:3]),
        bias.stride(0),
        heads,
        queries,
        k.shape[2],
        head_dim**-0.5,
        ROWS=ROWS[q.itemsize],
        DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return merged


def _fake(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return out.new_empty(out.shape[0], out.shape[2], out.shape[1] * out.shape[3])


def _examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, biased: slice) -> Example:
        """What a library would have left: attention to all keys without a bias."""
        wide = torch.promote_types(dtype, torch.float32)
        logits = q.to(wide) @ k.to(wide).transpose(-1, -2) * q.shape[-1] ** -0.5
        out = (logits.softmax(-1) @ v.to(wide)).to(dtype)
        return out, logits.logsumexp(-1), q, k[:, :, biased], v[:, :, biased], bias[:, biased]

    def counts(batch: int, keys: int, *numbers: float) -> Tensor:
        bias = torch.zeros(batch, keys, device=device)
        bias[:, 7 : 7 + len(numbers)] = torch.tensor(numbers, device=device).log()
        return bias

    q, k, v = (normal(2, 3, rows, 128) for rows in (45, 77, 77))
    yield of(q, k, v, counts(2, 77, 1.0, 37.0, 145.2), slice(7, 10))  # of a model's heads, one key that gains nothing
    out, *rest = of(q, k, v, counts(2, 77, 1.5), slice(7, 8))  # one key
    yield out.transpose(1, 2).contiguous().transpose(1, 2), *rest  # as flash kernels leave it: heads side by side
    packed = normal(2, 33, 3, 2, 32).permute(2, 0, 3, 1, 4)  # q, k, v as one product leaves them
    q, k, v = packed.unbind(0)
    out, lse, *rest = of(q, k, v, counts(2, 33, 20.0, 2.0), slice(7, 9))
    yield out[:, :, 3:30], lse[:, :, 3:30], rest[0][:, :, 3:30], *rest[1:]  # queries pruned to a slice
    yield of(normal(1, 1, 1, 24), normal(1, 1, 12, 24), normal(1, 1, 12, 24), counts(1, 12, 3.0), slice(7, 8))
    q, k, v = 30 * normal(1, 1, 9, 32), 30 * normal(1, 1, 12, 32), 1e4 * normal(1, 1, 12, 32)  # nearly one-hot
    yield of(q, k, v, counts(1, 12, 300.0, 300.0), slice(7, 9))
    yield of(normal(1, 2, 5, 32), normal(1, 2, 9, 32), normal(1, 2, 9, 32), counts(1, 9), slice(4, 4))  # no key
    yield of(normal(2, 1, 0, 32), normal(2, 1, 9, 32), normal(2, 1, 9, 32), counts(2, 9, log(3)), slice(7, 8))


merge_biased_op = define("merge_biased", merge_biased_reference, merge_biased_triton, _fake, _examples)
merge_biased = merge_biased_op.call
OPS = (merge_biased_op,)


def compilations(chip: int) -> Iterator[Compilation]:
    """On every chip the same: heads of 128 are the released models', of 32 the bundled small one's."""
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for head_dim in (128, 32):
            given = dict.fromkeys(("out", "q", "k", "v"), f"*{dtype}") | {"lse": "*fp32", "bias": "*fp32"}
            pointers = {name: given[name] for name in ("out", "lse", "q", "k", "v", "bias")}
            yield Compilation(
                kernel=_merge_biased_kernel,
                signature={
                    **pointers,
                    "merged": f"*{dtype}",
                    **dict.fromkeys((*STRIDES, *SIZES), "i32"),
                    "scale": "fp32",
                },
                constants={"ROWS": ROWS[size], "DIM": head_dim, "BLOCK": head_dim},
                num_warps=WARPS,
                num_stages=STAGES,
                aligned=frozenset(STRIDES),
            )
