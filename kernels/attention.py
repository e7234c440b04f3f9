"""Attention without a mask: every query sees every key, and each key may carry a bias.

    out = softmax(q kᵀ / √D + bias) v

One pass over the keys with a running maximum and a running sum (Milakov and Gimelshein 2018, arXiv:1805.02867; tiled
as in FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 1), so the logits, queries x keys floats a head, never
reach memory. Also in the pass: the bias of collapsed padding (model.md §3.9), which flash libraries do not take, and
the layout (batch, queries, heads * D) that the next product reads: q, k, v are read once, out is written once.

`attention_lse` also returns the logarithm of each query's sum of exponentials, by which parts computed over different
keys are merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import e, log, log2
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.kernels.launch import (
    Compilation,
    Example,
    adjacent,
    capability,
    define,
    jit,
    jit_for_sizes,
    nearest,
    tl,
    triton,
)

HEAD_DIMS = (32, 64, 128)  # of the kernel; the references take any
STRIDES = ("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row")
SIZES = ("heads", "queries", "keys")


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"q, k, v must be (batch, heads, rows, D), k like v: got {[*map(_shape, (q, k, v))]}")
    if (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]):
        raise ValueError(f"q and k must agree in all but their rows: got {_shape(q)} and {_shape(k)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype: got {[x.dtype for x in (q, k, v)]}")
    if k.shape[2] == 0:
        raise ValueError("attention needs at least one key")
    if bias is not None and bias.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"bias must be (batch, keys) = {(k.shape[0], k.shape[2])}: got {_shape(bias)}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def joined(out: Tensor) -> Tensor:
    """(batch, heads, rows, D) -> contiguous (batch, rows, heads * D)."""
    return out.transpose(1, 2).flatten(2).contiguous()


def attention_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q (batch, heads, M, D), k and v (batch, heads, N, D), bias (batch, N) -> (batch, M, heads * D)."""
    check(q, k, v, bias)
    dtype = q.dtype if q.is_cuda else torch.promote_types(q.dtype, torch.float32)  # CUDA takes no other than q's
    mask = None if bias is None else bias[:, None, None].to(dtype)
    return joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def attention_lse_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`attention` and its log-sum-exp (batch, heads, M), float32 or wider."""
    check(q, k, v, bias)
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias[:, None, None]
    return joined((logits.softmax(-1) @ v.to(dtype)).to(q.dtype)), logits.logsumexp(-1)


@jit
def _rows(  # type: ignore[no-untyped-def]
    x, stride, batch, head, first, count, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Rows first .. first + BLOCK of a head, zeros beyond `count`; x: a descriptor, else a pointer to the head."""
    if TMA:
        rows = x.load([batch, head, first, 0]).reshape(BLOCK, HEAD_DIM)
    else:
        row = tl.arange(0, BLOCK)[:, None]
        at = x + first * stride + row * stride + tl.arange(0, HEAD_DIM)[None, :]
        rows = tl.load(at, mask=first + row < count, other=0.0)
    return rows


@jit
def _step(  # type: ignore[no-untyped-def]
    tile, acc, highest, total, k, k_row, v, v_row, bias, batch, head, start, keys, scale,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running softmax, in powers of two, over one more block of keys."""
    keys_tile = _rows(k, k_row, batch, head, start, keys, BLOCK_N, HEAD_DIM, TMA)
    logits = tl.dot(tile, keys_tile.T, input_precision="ieee") * scale
    key = start + tl.arange(0, BLOCK_N)
    if bias is not None:
        logits += tl.load(bias + key)[None, :] * 1.4426950408889634
    elif MASKED:
        logits = tl.where(key[None, :] < keys, logits, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    shrink = tl.exp2(highest - higher)
    weights = tl.exp2(logits - higher[:, None])
    values = _rows(v, v_row, batch, head, start, keys, BLOCK_N, HEAD_DIM, TMA)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total * shrink + tl.sum(weights, 1)


@jit_for_sizes(*SIZES)
def _attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bias, out, lse, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, queries, keys, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    if not TMA:
        q += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        k += batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
        v += batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
    q_row, k_row, v_row = q_row.to(tl.int64), k_row.to(tl.int64), v_row.to(tl.int64)
    if bias is not None:  # its rows are padded with -inf to whole blocks
        bias += tl.cdiv(keys, BLOCK_N).to(tl.int64) * batch * BLOCK_N
    tile = _rows(q, q_row, batch, head, first, queries, BLOCK_M, HEAD_DIM, TMA)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    highest = tl.full([BLOCK_M], -1e38, tl.float32)  # finite: a block whose keys are all masked out then adds nothing
    total = tl.zeros([BLOCK_M], tl.float32)
    # A last block cut short by the end of the keys is masked by the bias, or else on its own.
    whole = keys // BLOCK_N * BLOCK_N if bias is None else keys
    for start in range(0, whole, BLOCK_N):
        acc, highest, total = _step(
            tile, acc, highest, total, k, k_row, v, v_row, bias, batch, head, start, keys, scale,
            BLOCK_N, HEAD_DIM, TMA, False,
        )  # fmt: skip
    if bias is None:  # noqa: SIM102 (known while compiling, the next is not)
        if whole < keys:
            acc, highest, total = _step(
                tile, acc, highest, total, k, k_row, v, v_row, bias, batch, head, whole, keys, scale,
                BLOCK_N, HEAD_DIM, TMA, True,
            )  # fmt: skip
    query = first + tl.arange(0, BLOCK_M)
    inside = query < queries
    lse += tl.program_id(1).to(tl.int64) * queries
    tl.store(lse + query, (highest + tl.log2(total)) * 0.6931471805599453, inside)
    at = ((batch.to(tl.int64) * queries + query) * heads + head)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), inside[:, None])


@dataclass(frozen=True, slots=True)
class Launch:
    block_m: int  # queries of a program
    block_n: int  # keys of a step
    num_warps: int
    num_stages: int
    tma: bool  # tiles come through tensor descriptors


def launch(chip: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """The numbers are of D = 128. Nothing spills there and at 32; at 64, which no model of ours has, 16 bytes on sm_100
    and 8 in float32 on sm_89. No setting has been timed yet.
    """
    if dtype == torch.float32:
        # No tensor cores: up to 80 registers. With 4 warps and blocks of 32 keys, triton 3.8 takes all 255 of them and
        # spills up to 376 bytes, where 3.6 takes 147; with two stages triton 3.7 spills 16 bytes on sm_100.
        return Launch(32, 16, 8, 1, False)
    if chip in (90, 100):
        # sm_90 (wgmma): 217 registers of 255, 161 KB shared; blocks of 64 keys and 3 stages: 147, 129 KB, but the sums
        # are rescaled twice as often. sm_100 (tcgen05): 183, 161 KB.
        return Launch(128, 128, 8, 2, True) if head_dim == 128 else Launch(128, 64, 4, 2, True)
    # mma.sync: 196 registers, 64 KB shared of 99 KB on sm_89 and sm_120; blocks of 64 keys spill 56 bytes. Without
    # descriptors: sm_80 and sm_89 have none, on sm_120 Triton does not overlap such copies with products (one stage).
    return Launch(128, 32, 8, 3, False)


def _aligned(x: Tensor) -> Tensor:
    """`adjacent`, and a copy where an axis is expanded, which no descriptor takes."""
    return adjacent(x if all(x.stride()) else x.clone(memory_format=torch.contiguous_format))


def _tiles(x: Tensor, rows: int, tma: bool) -> Any:
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 1, rows, x.shape[3]])


def attention_lse_triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    check(q, k, v, bias)
    batch, heads, queries, head_dim = q.shape
    if head_dim not in HEAD_DIMS or q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"the kernel takes bfloat16 or float32 and D of {HEAD_DIMS}: got {q.dtype}, D = {head_dim}")
    out, lse = _lse_fake(q, k, v, bias)
    if out.numel() == 0:
        return out, lse
    settings = launch(nearest(capability(q.device)), head_dim, q.dtype)
    if bias is None and not settings.tma:  # the masked last block, apart as below, would make mma.sync spill
        bias = q.new_zeros(batch, k.shape[2], dtype=torch.float32)
    if bias is not None:
        bias = F.pad(bias.float(), (0, -k.shape[2] % settings.block_n), value=float("-inf")).contiguous()
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    _attention_kernel[(triton.cdiv(queries, settings.block_m), batch * heads)](
        _tiles(q, settings.block_m, settings.tma),
        _tiles(k, settings.block_n, settings.tma),
        _tiles(v, settings.block_n, settings.tma),
        bias,
        out,
        lse,
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        heads,
        queries,
        k.shape[2],
        head_dim**-0.5 * log2(e),
        BLOCK_M=settings.block_m,
        BLOCK_N=settings.block_n,
        HEAD_DIM=head_dim,
        TMA=settings.tma,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
    return out, lse


def attention_triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return attention_lse_triton(q, k, v, bias)[0]


def _lse_fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    lse = q.new_empty(batch, heads, queries, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(batch, queries, heads * head_dim), lse


def _fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return _lse_fake(q, k, v, bias)[0]


def _examples(device: torch.device, dtype: torch.dtype) -> Iterable[Example]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

    def counts(batch: int, keys: int, start: int, stop: int) -> Tensor:
        bias = torch.zeros(batch, keys, device=device)
        bias[:, start:stop] = log(37.0)
        return bias

    packed = normal(2, 45, 3, 2, 32).permute(2, 0, 3, 1, 4)  # q, k, v as one product leaves them
    yield *packed.unbind(0), counts(2, 45, 7, 9)
    yield packed[0, :, :, 11:40], packed[1], packed[2], None  # queries pruned to a slice
    yield normal(1, 2, 1, 64), normal(1, 2, 130, 64), normal(1, 2, 130, 64), counts(1, 130, 0, 130)  # one query
    yield normal(1, 1, 3, 128), normal(1, 1, 1, 128), normal(1, 1, 1, 128), None  # one key
    masked = counts(1, 140, 130, 135)
    masked[:, :129] = float("-inf")  # whole blocks, the first among them
    yield normal(1, 1, 5, 32), normal(1, 1, 140, 32), normal(1, 1, 140, 32), masked
    yield 30 * normal(1, 1, 33, 32), 30 * normal(1, 1, 66, 32), 1e4 * normal(1, 1, 66, 32), None  # nearly one-hot
    yield 1e-4 * normal(1, 1, 33, 32), 1e-4 * normal(1, 1, 66, 32), 1e-4 * normal(1, 1, 66, 32), None  # nearly a mean


attention_op = define("attention", attention_reference, attention_triton, _fake, _examples)
attention = attention_op.call
attention_lse_op = define("attention_lse", attention_lse_reference, attention_lse_triton, _lse_fake, _examples)
attention_lse = attention_lse_op.call

OPS = (attention_op, attention_lse_op)


def compilations(chip: int) -> Iterator[Compilation]:
    """Heads of 128 are the released models', of 32 the bundled small one's."""
    for (dtype, kind), head_dim, biased in product(
        ((torch.bfloat16, "bf16"), (torch.float32, "fp32")), (128, 32), (True, False)
    ):
        settings = launch(chip, head_dim, dtype)
        if not (biased or settings.tma):
            continue
        rows = {"q": settings.block_m, "k": settings.block_n, "v": settings.block_n}
        tiles = {name: f"tensordesc<{kind}[1,1,{count},{head_dim}]>" for name, count in rows.items()}
        signature = {
            **(tiles if settings.tma else dict.fromkeys(rows, f"*{kind}")),
            **({"bias": "*fp32"} if biased else {}),
            **{"out": f"*{kind}", "lse": "*fp32"},
            **dict.fromkeys((*STRIDES, *SIZES), "i32"),
            "scale": "fp32",
        }
        constants = {
            **({} if biased else {"bias": None}),
            **{"BLOCK_M": settings.block_m, "BLOCK_N": settings.block_n, "HEAD_DIM": head_dim, "TMA": settings.tma},
        }
        yield Compilation(
            kernel=_attention_kernel,
            signature=signature,
            constants=constants,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
            aligned=frozenset(STRIDES),
        )
