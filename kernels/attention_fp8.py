"""Attention in 8 bits: both products of attention.py in e4m3, of which tensor cores do twice as many as in bfloat16.

    out = softmax(q kᵀ / √D + bias) v

q and k have a scale per block of rows, v one per channel; what is not multiplied by a tensor core stays in float32.
Blocks are constants, so the same definition holds on every chip. As in SageAttention (Zhang et al. 2024,
arXiv:2410.02367, section on smoothing k), k is taken less its mean over the keys: that changes every logit of a query
by the same number and the softmax not at all, but what all keys share no longer takes up the three bits of mantissa.
It is exact for any vector in place of the mean, which therefore may count keys that are masked out, and collapsed ones
(model.md §3.9) once.

The weights of the softmax are rounded too, relative to the largest so far. Their sum is of the unrounded ones: the
errors, of at most 1/16 each and of both signs, average out over the keys, while rounded weights would have to be
converted back in a loop that is bound by its exponentials. It is a float32 sum, since e4m3 has no room for one.
Where all weights are alike, their errors are too, and a mean can be off by 3 % (`test_weights_alike`).

The product of the weights with a block of v is summed apart and then added in float32, since Hopper's tensor cores add
8-bit products with about 14 bits (DeepSeek-V3 report 2024, arXiv:2412.19437, §3.3.2).

For each element of k and v, in bfloat16, PyTorch reads 2 bytes (the mean, the largest magnitudes); then for each of
q, k and v one launch reads 2 and writes 1, and attention reads that. v is written transposed, since Hopper's 8-bit
products want both operands with what is summed over side by side in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from math import e, inf, log2
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.kernels.adaln import E4M3_MAX, SMALLEST, quantised, row_scale
from step1x.kernels.attention import HEAD_DIMS, attention_op, check, joined
from step1x.kernels.launch import (
    CHIPS,
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

QUERIES, KEYS = 128, 64  # rows of q and of k that share a scale; what a program and a step of its loop compute
WARPS, STAGES = 8, 3
STRIDES = ("x_batch", "x_head", "x_row")

# e4m3 values and float32 scales of q (batch, heads, M, D) and (batch, heads, blocks), of k likewise with N, and of v
# (batch, heads, D, N) and (batch, heads, D); M and N filled up with zeros to whole blocks. q's scales include the
# factor of the logits, in powers of two.
Quantised = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _factor(q: Tensor) -> float:
    return q.shape[3] ** -0.5 * log2(e)


def _mean(k: Tensor) -> Tensor:
    return k.mean(2, keepdim=True, dtype=torch.float32)


def _channel_scales(v: Tensor) -> Tensor:
    peaks = torch.linalg.vector_norm(v, inf, 2)  # the largest magnitudes, without a copy of all
    return peaks.float().clamp(min=SMALLEST) / E4M3_MAX


def _biases(k: Tensor, bias: Tensor | None) -> Tensor:
    """(batch, N) for logits in powers of two; -inf for what fills the last block."""
    batch, _, keys, _ = k.shape
    known = k.new_zeros(batch, keys, dtype=torch.float32) if bias is None else bias.float() * log2(e)
    return F.pad(known, (0, -keys % KEYS), value=-inf).contiguous()


def quantise_reference(q: Tensor, k: Tensor, v: Tensor) -> Quantised:
    def filled(x: Tensor, rows: int) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[2] % rows))

    def in_blocks(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        blocks = filled(x, rows).unflatten(2, (-1, rows))
        scales = blocks.abs().amax((3, 4)).clamp(min=SMALLEST) / E4M3_MAX
        return (blocks / scales[..., None, None]).to(torch.float8_e4m3fn).flatten(2, 3), scales

    q8, q_scale = in_blocks(q.float(), QUERIES)
    k8, k_scale = in_blocks(k.float() - _mean(k), KEYS)
    v_scale = _channel_scales(v)
    v8 = (filled(v.float(), KEYS) / v_scale[:, :, None]).to(torch.float8_e4m3fn)
    return q8, q_scale * _factor(q), k8, k_scale, v8.mT.contiguous(), v_scale


def attention_fp8_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q (batch, heads, M, D), k and v (batch, heads, N, D), bias (batch, N) -> (batch, M, heads * D)."""
    check(q, k, v, bias)
    q8, q_scale, k8, k_scale, v8, v_scale = quantise_reference(q, k, v)
    tile = q8.float()
    acc = torch.zeros_like(tile)
    highest = torch.full_like(tile[..., :1], -1e38)
    total = torch.zeros_like(highest)
    factors = q_scale.repeat_interleave(QUERIES, 2)[..., None]
    blocks = zip(
        k8.split(KEYS, 2), k_scale.split(1, 2), v8.split(KEYS, 3), _biases(k, bias).split(KEYS, 1), strict=True
    )
    for keys, scale, values, biases in blocks:
        logits = tile @ keys.float().mT * (factors * scale[..., None]) + biases[:, None, None]
        higher = torch.maximum(highest, logits.amax(-1, keepdim=True))
        shrink = torch.exp2(highest - higher)
        weights = torch.exp2(logits - (higher - 8))
        acc = acc * shrink + weights.to(torch.float8_e4m3fn).float() @ values.float().mT
        total = total * shrink + weights.sum(-1, keepdim=True)
        highest = higher
    out = acc * v_scale[:, :, None] / total
    return joined(out[:, :, : q.shape[2]].to(q.dtype))


@jit_for_sizes("heads", "rows")
def _quantise_rows_kernel(  # type: ignore[no-untyped-def]
    x, mean, out, scales, x_batch, x_head, x_row, heads, rows, factor, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    both = tl.program_id(1).to(tl.int64)  # batch and head
    place = both * tl.num_programs(0) + tl.program_id(0)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    x += both // heads * x_batch + both % heads * x_head
    tile = tl.load(x + row.to(tl.int64) * x_row + channel, row < rows, 0.0).to(tl.float32)
    if mean is not None:
        tile = tl.where(row < rows, tile - tl.load(mean + both * HEAD_DIM + channel), 0.0)
    scale = row_scale(tl.max(tl.abs(tile)))
    tl.store(scales + place, scale * factor)
    at = place * BLOCK + tl.arange(0, BLOCK)[:, None]
    tl.store(out + at * HEAD_DIM + channel, quantised(tile, scale))


@jit_for_sizes("heads", "rows")
def _quantise_values_kernel(  # type: ignore[no-untyped-def]
    x, scales, out, x_batch, x_head, x_row, heads, rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    both = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, HEAD_DIM)
    x += both // heads * x_batch + both % heads * x_head
    tile = tl.load(x + row.to(tl.int64)[:, None] * x_row + channel[None, :], (row < rows)[:, None], 0.0)
    tile = quantised(tile, tl.load(scales + both * HEAD_DIM + channel)[None, :])
    at = (both * HEAD_DIM + channel)[:, None] * (tl.num_programs(0) * BLOCK) + row[None, :]
    tl.store(out + at, tile.T)


@jit
def _tile(  # type: ignore[no-untyped-def]
    x, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """A tile of a matrix made up of whole ones; x: a descriptor, else a pointer to its rows, `stride` apart."""
    if TMA:
        tile = x.load([row, column])
    else:
        at = x + row.to(tl.int64) * stride + column + tl.arange(0, ROWS)[:, None] * stride
        tile = tl.load(at + tl.arange(0, COLUMNS)[None, :])
    return tile


@jit_for_sizes("heads", "queries", "keys")
def _attention_fp8_kernel(  # type: ignore[no-untyped-def]
    q, q_scale, k, k_scale, v, v_scale, bias, out, heads, queries, keys,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    both = tl.program_id(1)
    place = both * tl.num_programs(0) + tl.program_id(0)
    steps = tl.cdiv(keys, BLOCK_N)
    tile = _tile(q, place * BLOCK_M, 0, HEAD_DIM, BLOCK_M, HEAD_DIM, TMA)
    factor = tl.load(q_scale + place)
    bias += (both // heads).to(tl.int64) * steps * BLOCK_N
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    highest = tl.full([BLOCK_M], -1e38, tl.float32)  # finite: a block whose keys are all masked out then adds nothing
    total = tl.zeros([BLOCK_M], tl.float32)
    for step in range(0, steps):
        start = step * BLOCK_N
        keys_tile = _tile(k, both * steps * BLOCK_N + start, 0, HEAD_DIM, BLOCK_N, HEAD_DIM, TMA)
        logits = tl.dot(tile, keys_tile.T) * (factor * tl.load(k_scale + both * steps + step))
        logits += tl.load(bias + start + tl.arange(0, BLOCK_N))[None, :]
        higher = tl.maximum(highest, tl.max(logits, 1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(logits - (higher - 8.0)[:, None])  # up to 256, of 448 that e4m3 has; `total` has it too
        values = _tile(v, both * HEAD_DIM, start, steps * BLOCK_N, HEAD_DIM, BLOCK_N, TMA)
        # Without its last argument the compiler would have the tensor cores add `acc`.
        part = tl.dot(weights.to(tl.float8e4nv), values.T, max_num_imprecise_acc=BLOCK_N)
        acc = acc * shrink[:, None] + part
        total = total * shrink + tl.sum(weights, 1)
        highest = higher
    channel = tl.arange(0, HEAD_DIM)
    acc *= tl.load(v_scale + both * HEAD_DIM + channel)[None, :]
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = ((both // heads).to(tl.int64) * queries + query) * heads + both % heads
    at = out + row[:, None] * HEAD_DIM + channel[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), (query < queries)[:, None])


def with_descriptors(chip: int) -> bool:
    """Whether tiles come through tensor descriptors, as in attention.py.

    The rest of a launch is the same on all chips. For D = 128: sm_89 174 registers of 255, 64 KB shared (mma.sync);
    sm_90 208, 65 KB (wgmma); sm_100 157, 65 KB (tcgen05); sm_120 190, 64 KB. Blocks of 128 keys would take 242
    registers and 113 KB on sm_90; v not transposed costs it 32 stores of a byte per thread and step. Nothing has been
    timed yet.
    """
    return chip in (90, 100)


def quantise_triton(q: Tensor, k: Tensor, v: Tensor) -> Quantised:
    batch, heads, _, head_dim = k.shape

    def in_blocks(x: Tensor, rows: int, mean: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        x, blocks = adjacent(x), triton.cdiv(x.shape[2], rows)
        out = x.new_empty(batch, heads, blocks * rows, head_dim, dtype=torch.float8_e4m3fn)
        scales = x.new_empty(batch, heads, blocks, dtype=torch.float32)
        _quantise_rows_kernel[(blocks, batch * heads)](
            x,
            mean,
            out,
            scales,
            *x.stride()[:3],
            heads,
            x.shape[2],
            factor,
            BLOCK=rows,
            HEAD_DIM=head_dim,
            num_warps=WARPS,
        )
        return out, scales

    v, v_scale, blocks = adjacent(v), _channel_scales(v), triton.cdiv(v.shape[2], KEYS)
    v8 = v.new_empty(batch, heads, head_dim, blocks * KEYS, dtype=torch.float8_e4m3fn)
    _quantise_values_kernel[(blocks, batch * heads)](
        v,
        v_scale,
        v8,
        *v.stride()[:3],
        heads,
        v.shape[2],
        BLOCK=KEYS,
        HEAD_DIM=head_dim,
        num_warps=WARPS,
    )
    return *in_blocks(q, QUERIES, None, _factor(q)), *in_blocks(k, KEYS, _mean(k), 1.0), v8, v_scale


def attention_fp8_triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    check(q, k, v, bias)
    chip = capability(q.device)
    if chip and not CHIPS[nearest(chip)].fp8:
        raise ValueError(f"8-bit attention needs e4m3 tensor cores, which sm_{chip} has not")
    batch, heads, queries, head_dim = q.shape
    if head_dim not in HEAD_DIMS or q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"the kernel takes bfloat16 or float32 and D of {HEAD_DIMS}: got {q.dtype}, D = {head_dim}")
    out = _fake(q, k, v, bias)
    if out.numel() == 0:
        return out
    tma = with_descriptors(nearest(chip))
    q8, q_scale, k8, k_scale, v8, v_scale = quantise_triton(q, k, v)
    _attention_fp8_kernel[(triton.cdiv(queries, QUERIES), batch * heads)](
        _tiles(q8, QUERIES, head_dim, tma),
        q_scale,
        _tiles(k8, KEYS, head_dim, tma),
        k_scale,
        _tiles(v8, head_dim, KEYS, tma),
        v_scale,
        _biases(k, bias),
        out,
        heads,
        queries,
        k.shape[2],
        BLOCK_M=QUERIES,
        BLOCK_N=KEYS,
        HEAD_DIM=head_dim,
        TMA=tma,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def _tiles(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """x for `_tile`: all its rows one below the other."""
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x.flatten(0, 2), [rows, columns])


def _fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


def _examples(device: torch.device, dtype: torch.dtype) -> Iterable[Example]:
    """Those of `attention`, and several blocks of queries and of keys that have much in common."""
    yield from attention_op.examples(device, dtype)
    q, k, v = (torch.randn(2, 2, rows, 64, device=device).to(dtype) for rows in (130, 150, 150))
    yield q, k + 30 * k[:, :, :1], v, torch.randn(2, 150, device=device)


attention_fp8_op = define(
    "attention_fp8", attention_fp8_reference, attention_fp8_triton, _fake, _examples, fp8=True, tolerance=2**-7
)
attention_fp8 = attention_fp8_op.call

OPS = (attention_fp8_op,)


def compilations(chip: int) -> Iterator[Compilation]:
    """Heads of 128 are the released models', of 32 the bundled small one's. Nothing where there are no such cores."""
    if not CHIPS[chip].fp8:
        return
    tma = with_descriptors(chip)
    for kind, head_dim in product(("*bf16", "*fp32"), (128, 32)):
        shapes = {"q": (QUERIES, head_dim), "k": (KEYS, head_dim), "v": (head_dim, KEYS)}
        signature = {}
        for name, (rows, columns) in shapes.items():
            signature[name] = f"tensordesc<fp8e4nv[{rows},{columns}]>" if tma else "*fp8e4nv"
            signature[f"{name}_scale"] = "*fp32"
        signature |= {"bias": "*fp32", "out": kind, **dict.fromkeys(("heads", "queries", "keys"), "i32")}
        yield Compilation(
            kernel=_attention_fp8_kernel,
            signature=signature,
            constants={"BLOCK_M": QUERIES, "BLOCK_N": KEYS, "HEAD_DIM": head_dim, "TMA": tma},
            num_warps=WARPS,
            num_stages=STAGES,
        )
        integers = dict.fromkeys((*STRIDES, "heads", "rows"), "i32")
        for block, centred in ((QUERIES, False), (KEYS, True)):
            yield Compilation(
                kernel=_quantise_rows_kernel,
                signature={
                    "x": kind,
                    **({"mean": "*fp32"} if centred else {}),
                    **{"out": "*fp8e4nv", "scales": "*fp32", **integers, "factor": "fp32"},
                },
                constants={**({} if centred else {"mean": None}), "BLOCK": block, "HEAD_DIM": head_dim},
                num_warps=WARPS,
                num_stages=3,
                aligned=frozenset(STRIDES),
            )
        yield Compilation(
            kernel=_quantise_values_kernel,
            signature={"x": kind, "scales": "*fp32", "out": "*fp8e4nv", **integers},
            constants={"BLOCK": KEYS, "HEAD_DIM": head_dim},
            num_warps=WARPS,
            num_stages=3,
            aligned=frozenset(STRIDES),
        )
