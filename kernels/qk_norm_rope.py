"""From the fused QKV product to what attention takes: query and key norms, rotary positions, heads before rows.

qk_norm_rope          q, k and v of text rows and image rows, joined, in one launch.
qk_norm_rope_single   q and k of rows of one stream, whose v attention reads where the product left it.
qk_norm_rope_scatter  of text rows and some image tokens: q of them, k and v into a cache that holds all rows.

Formula: model.md §3.5 and §3.6, engine/dit.py (QKNorm, apply_rope). Per head, with its learnt scale s:

    y = round(x / sqrt(mean(x²) + 1e-6) * s)
    (even, odd) -> round(cos * even - sin * odd), round(sin * even + cos * odd)      for adjacent channels of y

Bytes: a row of 3 * width values is read once and written once, 18 KB each way at width 3072 in bfloat16; cosines and
sines add 512 bytes a row and are shared by the heads of a program. In separate launches for the norms, for joining the
text rows and for the rotation, q and k would be read and written three times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from step1x.kernels.launch import Compilation, Example, adjacent, define, jit, jit_for_sizes, tl, triton

EPS = 1e-6
WARPS = 8  # 64 registers a thread in bfloat16; 4 warps take 96 and a barrier


class _Sizes(NamedTuple):
    batch: int
    text: int  # rows
    image: int  # rows
    head_dim: int


def _require(name: str, found: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(found.shape) not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(str, allowed))}, got {tuple(found.shape)}")


def _sizes(
    image: Tensor,
    text: Tensor | None,
    image_scales: Tensor,
    text_scales: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    parts: int = 3,  # that a row holds: q, k and v, or q and k
) -> _Sizes:
    if image.ndim != 3 or heads < 1 or image.shape[2] == 0 or image.shape[2] % (2 * parts * heads):
        raise ValueError(f"image must be (batch, tokens, {parts} * {heads} heads * even), got {tuple(image.shape)}")
    if (text is None) != (text_scales is None):
        raise ValueError("text and text_scales must come together")
    batch, tokens, width = image.shape
    head_dim = width // (parts * heads)
    _require("image_scales", image_scales, (2, head_dim))
    if text is not None and text_scales is not None:
        _require("text", text, (batch, text.shape[1], width))
        _require("text_scales", text_scales, (2, head_dim))
        if (text.dtype, text_scales.dtype) != (image.dtype, image_scales.dtype):
            raise ValueError("text and text_scales must have the dtypes of image and image_scales")
    sizes = _Sizes(batch, 0 if text is None else text.shape[1], tokens, head_dim)
    tables = [(rows, 1, sizes.text + tokens, head_dim // 2) for rows in (1, batch)]
    _require("cos", cos, *tables)
    _require("sin", sin, tuple(cos.shape))
    return sizes


def _check_caches(image: Tensor, sizes: _Sizes, heads: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
    if rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64, got {rows.dtype}")
    _require("rows", rows, (1, sizes.image), (sizes.batch, sizes.image))
    if keys.ndim != 4 or keys.shape[2] < sizes.text:
        raise ValueError(f"keys must be 4-dimensional with {sizes.text} text rows first, got {tuple(keys.shape)}")
    _require("keys", keys, (sizes.batch, heads, keys.shape[2], sizes.head_dim))
    _require("values", values, tuple(keys.shape))
    if not (keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype == image.dtype):
        raise ValueError("keys and values must be contiguous and of the image's dtype")


def _normed(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (normed * scale.to(wide.dtype)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # On a CPU the same products and sums in a sixteenth of the time; exporters do not know complex numbers.
    if x.device.type == "cpu" and not torch.compiler.is_exporting():
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    even, odd = wide[..., ::2], wide[..., 1::2]
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2).to(x.dtype)


def qk_norm_rope_reference(
    image: Tensor,
    text: Tensor | None,
    image_scales: Tensor,
    text_scales: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (batch, heads, text + image rows, head_dim), text rows first.

    image (batch, N, 3 * width), text (batch, T, 3 * width): outputs of the QKV products, all heads of q, then of k,
    then of v; text None: rows of one stream only. *_scales (2, head_dim): of the query's and of the key's norm.
    cos, sin: (batch or 1, 1, T + N, head_dim / 2).
    """
    _sizes(image, text, image_scales, text_scales, cos, sin, heads)
    parts = []
    for rows, scales in ((text, text_scales), (image, image_scales)):
        if rows is not None and scales is not None:
            q, k, v = rows.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            parts.append((_normed(q, scales[0]), _normed(k, scales[1]), v))
    q, k, v = (torch.cat(streams, dim=2) for streams in zip(*parts, strict=True))
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def qk_norm_rope_single_reference(
    rows: Tensor, scales: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """q and k, each (batch, heads, N, head_dim), of rows (batch, N, 2 * width): all heads of q, then of k.

    scales, cos, sin, heads: as above.
    """
    _sizes(rows, None, scales, None, cos, sin, heads, parts=2)
    q, k = rows.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = (_rotated(_normed(part, scale), cos, sin) for part, scale in zip((q, k), scales, strict=True))
    return q.contiguous(), k.contiguous()


def qk_norm_rope_scatter_reference(
    image: Tensor,
    text: Tensor | None,
    image_scales: Tensor,
    text_scales: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """q (batch, heads, T + n, head_dim) of the text rows and of n image tokens; their k and v go into the caches.

    keys, values (batch, heads, T + all image tokens, head_dim), contiguous, changed in place: text row i goes to row i,
    image token j of picture b to row T + rows[b, j]. rows (batch or 1, n): different from each other. One that lies
    outside of the caches is a ValueError on a CPU and undefined on a GPU, where a check would wait for the device.
    """
    sizes = _sizes(image, text, image_scales, text_scales, cos, sin, heads)
    _check_caches(image, sizes, heads, rows, keys, values)
    outside = (rows < 0) | (rows >= keys.shape[2] - sizes.text)
    if rows.device.type == "cpu" and not torch.compiler.is_exporting() and outside.any():
        raise ValueError(f"rows must be from 0 to {keys.shape[2] - sizes.text - 1}, got {rows[outside][0].item()}")
    q, k, v = qk_norm_rope_reference(image, text, image_scales, text_scales, cos, sin, heads)
    first = torch.arange(sizes.text, device=rows.device).expand(rows.shape[0], -1)
    joint = torch.cat((first, sizes.text + rows), dim=1)
    if joint.shape[0] == 1:
        keys.index_copy_(2, joint[0], k)
        values.index_copy_(2, joint[0], v)
    else:
        places = joint[:, None, :, None].expand(k.shape)
        keys.scatter_(2, places, k)
        values.scatter_(2, places, v)
    return q


@jit
def _normed_and_rotated(  # type: ignore[no-untyped-def]
    x, scale, cos, sin, EPS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / DIM + EPS)
    normed = (wide * inverse * scale).to(x.dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(normed, (ROWS, BLOCK // 2, 2)))
    rotated = tl.join(cos * even - sin * odd, sin * even + cos * odd)
    return tl.reshape(rotated, (ROWS, BLOCK)).to(x.dtype)


COUNTS = ("rows_batch_stride", "image_rows", "text_rows", "cache_rows")


@jit_for_sizes("rows_ptr", *COUNTS)
def _qk_norm_rope_kernel(  # type: ignore[no-untyped-def]
    image_ptr,
    text_ptr,
    image_scales_ptr,
    text_scales_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,  # None: k and v have the rows of q
    q_ptr,
    k_ptr,
    v_ptr,  # None: rows hold q and k alone
    image_batch_stride,
    image_row_stride,
    text_batch_stride,
    text_row_stride,
    table_batch_stride,
    rows_batch_stride,
    image_rows,
    text_rows,
    cache_rows,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # heads of a program
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    text_blocks = tl.cdiv(text_rows, ROWS)
    is_text = block < text_blocks  # a program's rows are of one stream
    source_ptr = tl.where(is_text, text_ptr + batch * text_batch_stride, image_ptr + batch * image_batch_stride)
    scales_ptr = tl.where(is_text, text_scales_ptr, image_scales_ptr)
    row_stride = tl.where(is_text, text_row_stride, image_row_stride)
    row = tl.where(is_text, block, block - text_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < tl.where(is_text, text_rows, image_rows)
    joint = tl.where(is_text, row, row + text_rows)
    stored = joint
    if rows_ptr is not None:
        chosen = tl.load(rows_ptr + batch * rows_batch_stride + row, mask=valid & (block >= text_blocks), other=0)
        stored = tl.where(is_text, row, chosen + text_rows)

    column = tl.arange(0, BLOCK)[None, :]
    mask = valid[:, None] & (column < DIM)
    half = tl.arange(0, BLOCK // 2)[None, :]
    table = batch * table_batch_stride + joint[:, None] * (DIM // 2) + half
    cos = tl.load(cos_ptr + table, mask=valid[:, None] & (half < DIM // 2), other=0.0)
    sin = tl.load(sin_ptr + table, mask=valid[:, None] & (half < DIM // 2), other=0.0)
    q_scale = tl.load(scales_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    k_scale = tl.load(scales_ptr + DIM + column, mask=column < DIM, other=0.0).to(tl.float32)

    source_ptr += row[:, None] * row_stride + column
    for index in range(GROUP):
        head = tl.program_id(0) * GROUP + index
        plane = batch * HEADS + head
        q = tl.load(source_ptr + head * DIM, mask=mask, other=0.0)
        k = tl.load(source_ptr + (HEADS + head) * DIM, mask=mask, other=0.0)
        q = _normed_and_rotated(q, q_scale, cos, sin, EPS, DIM, BLOCK, ROWS)
        k = _normed_and_rotated(k, k_scale, cos, sin, EPS, DIM, BLOCK, ROWS)
        tl.store(q_ptr + (plane * (text_rows + image_rows) + joint[:, None]) * DIM + column, q, mask=mask)
        target = (plane * cache_rows + stored[:, None]) * DIM + column
        tl.store(k_ptr + target, k, mask=mask)
        if v_ptr is not None:
            v = tl.load(source_ptr + (2 * HEADS + head) * DIM, mask=mask, other=0.0)
            tl.store(v_ptr + target, v, mask=mask)


def _constants(heads: int, head_dim: int) -> dict[str, int | float]:
    """2048 elements of a head, and 3 or 4 heads one after the other, which share the cosines and sines.

    Of 16 rows of head_dim 128, each head is 256 bytes in one piece on the way in and 4 KB on the way out, and programs
    next to each other read heads next to each other. 1024² with its reference and 640 text rows make 3312 programs.
    """
    block = triton.next_power_of_2(head_dim)
    return {
        "EPS": EPS,
        "HEADS": heads,
        "GROUP": max(count for count in (1, 2, 3, 4) if heads % count == 0),
        "DIM": head_dim,
        "BLOCK": block,
        "ROWS": max(2048 // block, 1),
    }


def _launch(
    image: Tensor,
    text: Tensor | None,
    scales: tuple[Tensor, Tensor | None],
    tables: tuple[Tensor, Tensor],
    heads: int,
    sizes: _Sizes,
    stored: tuple[Tensor | None, Tensor, Tensor | None],
) -> Tensor:
    """q; `stored` are the rows of the caches or None, keys, and values or None."""
    if image.dtype == torch.float64:
        raise ValueError("the kernel of qk_norm_rope computes in float32: float64 is for the reference")
    batch, text_rows, image_rows, head_dim = sizes
    rows, keys, values = stored
    q = image.new_empty((batch, heads, text_rows + image_rows, head_dim))
    if q.numel() == 0:
        return q
    image = adjacent(image)
    text = image if text is None else adjacent(text)  # never read where there are no text rows
    image_scales = adjacent(scales[0].contiguous())
    text_scales = image_scales if scales[1] is None else adjacent(scales[1].contiguous())
    cos, sin = (adjacent(table.contiguous()) for table in tables)
    constants = _constants(heads, head_dim)
    blocks = triton.cdiv(text_rows, constants["ROWS"]) + triton.cdiv(image_rows, constants["ROWS"])
    _qk_norm_rope_kernel[heads // int(constants["GROUP"]), blocks, batch](
        image,
        text,
        image_scales,
        text_scales,
        cos,
        sin,
        rows if rows is None else rows.contiguous(),
        q,
        keys,
        values,
        image.stride(0),
        image.stride(1),
        text.stride(0),
        text.stride(1),
        0 if cos.shape[0] == 1 else cos.stride(0),
        0 if rows is None or len(rows) == 1 else image_rows,
        image_rows,
        text_rows,
        keys.shape[2],
        **constants,
        num_warps=WARPS,
        num_stages=1,
    )
    return q


def qk_norm_rope_triton(
    image: Tensor,
    text: Tensor | None,
    image_scales: Tensor,
    text_scales: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _sizes(image, text, image_scales, text_scales, cos, sin, heads)
    keys = image.new_empty((sizes.batch, heads, sizes.text + sizes.image, sizes.head_dim))
    values = torch.empty_like(keys)
    q = _launch(image, text, (image_scales, text_scales), (cos, sin), heads, sizes, (None, keys, values))
    return q, keys, values


def qk_norm_rope_single_triton(
    rows: Tensor, scales: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    sizes = _sizes(rows, None, scales, None, cos, sin, heads, parts=2)
    keys = rows.new_empty((sizes.batch, heads, sizes.image, sizes.head_dim))
    return _launch(rows, None, (scales, None), (cos, sin), heads, sizes, (None, keys, None)), keys


def qk_norm_rope_scatter_triton(
    image: Tensor,
    text: Tensor | None,
    image_scales: Tensor,
    text_scales: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    sizes = _sizes(image, text, image_scales, text_scales, cos, sin, heads)
    _check_caches(image, sizes, heads, rows, keys, values)
    return _launch(image, text, (image_scales, text_scales), (cos, sin), heads, sizes, (rows, keys, values))


def _fake_q(image: Tensor, text: Tensor | None, heads: int) -> Tensor:
    batch, tokens, width = image.shape
    rows = tokens if text is None else tokens + text.shape[1]
    return image.new_empty((batch, heads, rows, width // (3 * heads)))


def _fake(
    image: Tensor,
    text: Tensor | None,
    image_scales: Tensor,
    text_scales: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_q(image, text, heads), _fake_q(image, text, heads), _fake_q(image, text, heads)


def _fake_single(rows: Tensor, scales: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = rows.shape
    q = rows.new_empty((batch, heads, tokens, width // (2 * heads)))
    return q, torch.empty_like(q)


def _fake_scatter(
    image: Tensor,
    text: Tensor | None,
    image_scales: Tensor,
    text_scales: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    return _fake_q(image, text, heads)


def _examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def tables(batch: int, rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
        angles = 100 * torch.rand((batch, 1, rows, head_dim // 2), device=device, dtype=torch.float64)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return angles.cos().to(exact), angles.sin().to(exact)

    # Text and image rows that end within a block, one table for the batch, several groups of heads.
    yield normal(2, 17, 6 * 3 * 128), normal(2, 5, 6 * 3 * 128), normal(2, 128), normal(2, 128), *tables(1, 22, 128), 6
    # A single block: the QKV columns of a wider product.
    yield normal(2, 33, 448)[..., :384], None, normal(2, 64), None, *tables(2, 33, 64), 2
    # One row of each stream, a head_dim that is no power of two, rows cut from longer ones.
    yield normal(1, 4, 216)[:, 2:3], normal(1, 3, 216)[:, 1:2], normal(2, 24), normal(2, 24), *tables(1, 2, 24), 3
    for size in (3e4, 1e-3):  # 1e-3: the mean square is as small as eps
        text = (size * normal(1, 3, 200))[..., 8:]
        yield size * normal(1, 5, 192), text, normal(2, 32), normal(2, 32), *tables(1, 8, 32), 2


def _single_examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """The streams of the image of `_examples`, with their own part of the tables."""
    for image, text, scales, _, cos, sin, heads in _examples(device, dtype):
        first = 0 if text is None else text.shape[1]
        yield image[..., : image.shape[2] // 3 * 2], scales, cos[:, :, first:], sin[:, :, first:], heads


def _scatter_examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    for image, text, image_scales, text_scales, cos, sin, heads in _examples(device, dtype):
        batch, tokens, width = image.shape
        text_rows = 0 if text is None else text.shape[1]
        rows = torch.stack([torch.randperm(tokens + 3, device=device)[:tokens] for _ in range(batch)])
        keys, values = torch.randn((2, batch, heads, text_rows + tokens + 3, width // (3 * heads)), device=device)
        for chosen in (rows, rows[:1]):
            yield image, text, image_scales, text_scales, cos, sin, heads, chosen, keys.to(dtype), values.to(dtype)


def compilations(chip: int) -> Iterator[Compilation]:
    """On every chip the same: the released models and the small bundled one, whole steps and region steps."""
    strides = ("image_batch_stride", "image_row_stride", "text_batch_stride", "text_row_stride", "table_batch_stride")
    ways: tuple[tuple[str, ...], ...] = (("v_ptr",), (), ("rows_ptr", "v_ptr"))  # joined, single, scattered
    for heads, head_dim in ((24, 128), (6, 32)):
        for dtype in ("bf16", "fp32"):
            values = ("image_ptr", "text_ptr", "image_scales_ptr", "text_scales_ptr", "q_ptr", "k_ptr", "v_ptr")
            types = dict.fromkeys(values, f"*{dtype}") | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "rows_ptr": "*i64"}
            for way in ways:
                absent = dict.fromkeys({"rows_ptr", "v_ptr"} - {*way})
                given = {name: kind for name, kind in types.items() if name not in absent}
                yield Compilation(
                    kernel=_qk_norm_rope_kernel,
                    signature=given | dict.fromkeys((*strides, *COUNTS), "i32"),
                    constants=_constants(heads, head_dim) | absent,
                    num_warps=WARPS,
                    num_stages=1,
                    aligned=frozenset(strides),
                )


qk_norm_rope_op = define("qk_norm_rope", qk_norm_rope_reference, qk_norm_rope_triton, _fake, _examples)
qk_norm_rope = qk_norm_rope_op.call
qk_norm_rope_single_op = define(
    "qk_norm_rope_single",
    qk_norm_rope_single_reference,
    qk_norm_rope_single_triton,
    _fake_single,
    _single_examples,
)
qk_norm_rope_single = qk_norm_rope_single_op.call
qk_norm_rope_scatter_op = define(
    "qk_norm_rope_scatter",
    qk_norm_rope_scatter_reference,
    qk_norm_rope_scatter_triton,
    _fake_scatter,
    _scatter_examples,
    mutates=("keys", "values"),
)
qk_norm_rope_scatter = qk_norm_rope_scatter_op.call
OPS = (qk_norm_rope_op, qk_norm_rope_single_op, qk_norm_rope_scatter_op)
