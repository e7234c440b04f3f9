"""ONNX forms of the operations of kernels/: standard operators alone, with the roundings that the references have.

Each function translates calls of the operation of its name, for `torch.onnx.export`: tensors are values of the graph,
all else is Python's. Statistics, rotations and sums that the references make in float32 are made in it here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset23 as op
from torch import Tensor

from step1x.kernels.launch import Op
from step1x.kernels.qk_norm_rope import qk_norm_rope_op, qk_norm_rope_scatter_op

FLOAT = ir.DataType.FLOAT
EPSILON = 1e-6  # of all norms
END = 2**63 - 1  # of any axis


def cast(x: Any, given: ir.DataType, dtype: ir.DataType) -> Any:
    """x, which is `given`. Values inside of a translation do not know their types."""
    return x if given == dtype else op.Cast(x, to=dtype)


def constant(values: Any, dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.tensor(np.asarray(values, dtype.numpy()), dtype=dtype))


def numbers(*values: int) -> Any:
    return op.Constant(value_ints=values)


def adaln(x: Any, shift: Any, scale: Any, fp32: bool) -> Any:
    return normed(x, shift, scale, fp32, x)


def normed(x: Any, shift: Any, scale: Any, fp32: bool, like: Any) -> Any:
    """`adaln` of rows of the type of `like`."""
    wide = FLOAT if fp32 else like.dtype
    ones = constant(np.ones(like.shape[-1]), wide)
    rows, *_ = op.LayerNormalization(cast(x, like.dtype, wide), ones, axis=-1, epsilon=EPSILON)
    factor = cast(op.Add(scale, constant(1, like.dtype)), like.dtype, wide)
    return cast(op.Add(op.Mul(factor, rows), cast(shift, like.dtype, wide)), wide, like.dtype)


def gated_residual(x: Any, gate: Any, y: Any, fused: bool) -> Any:
    wide = FLOAT if fused else x.dtype
    rows, factor, change = (cast(one, x.dtype, wide) for one in (x, gate, y))
    return cast(op.Add(rows, op.Mul(factor, change)), wide, x.dtype)


def gated_residual_adaln(x: Any, gate: Any, y: Any, fused: bool, shift: Any, scale: Any, fp32: bool) -> Any:
    rows = gated_residual(x, gate, y, fused)
    return rows, normed(rows, shift, scale, fp32, x)


def gelu_join(attended: Any, hidden: Any) -> Any:
    gelu = op.Gelu(hidden, approximate="tanh")
    return gelu if attended is None else op.Concat(attended, gelu, axis=-1)


def attention(q: Any, k: Any, v: Any, bias: Any) -> Any:
    attended = sdpa(q, k, v, None if bias is None else op.Unsqueeze(cast(bias, bias.dtype, q.dtype), numbers(1, 2)))
    return op.Reshape(op.Transpose(attended, perm=(0, 2, 1, 3)), numbers(0, 0, -1))


def sdpa(q: Any, k: Any, v: Any, mask: Any = None, **_: Any) -> Any:
    scaled = op.Mul(q, constant(q.shape[-1] ** -0.5, q.dtype))
    logits = op.MatMul(scaled, op.Transpose(k, perm=(0, 1, 3, 2)))
    return op.MatMul(op.Softmax(logits if mask is None else op.Add(logits, mask), axis=-1), v)


def qk_norm_rope(
    image: Any, text: Any, image_scales: Any, text_scales: Any, cos: Any, sin: Any, heads: int
) -> tuple[Any, Any, Any]:
    both, v = heads_of(image, image_scales, heads)
    if text is not None:
        first, v_first = heads_of(text, text_scales, heads)
        both, v = op.Concat(first, both, axis=3), op.Concat(v_first, v, axis=3)
    q, k = op.Split(cast(rotated(both, cos, sin), FLOAT, image.dtype), axis=0, num_outputs=2)
    return tuple(op.Squeeze(part, numbers(0)) for part in (q, k, v))


def qk_norm_rope_single(rows: Any, scales: Any, cos: Any, sin: Any, heads: int) -> tuple[Any, Any]:
    both = normed_heads(op.Transpose(op.Reshape(rows, numbers(0, 0, 2, heads, -1)), perm=(2, 0, 3, 1, 4)), rows, scales)
    q, k = op.Split(cast(rotated(both, cos, sin), FLOAT, rows.dtype), axis=0, num_outputs=2)
    return op.Squeeze(q, numbers(0)), op.Squeeze(k, numbers(0))


def heads_of(rows: Any, scales: Any, heads: int) -> tuple[Any, Any]:
    """Normed q and k as float32 (2, batch, heads, rows, head_dim), v as (1, ...), of the rows of a QKV product."""
    parts = op.Transpose(op.Reshape(rows, numbers(0, 0, 3, heads, -1)), perm=(2, 0, 3, 1, 4))
    return normed_heads(some(parts, 0, 0, 2), rows, scales), some(parts, 0, 2, 3)


def normed_heads(both: Any, rows: Any, scales: Any) -> Any:
    """q and k (2, batch, heads, rows, head_dim) of the type of `rows`, normed, as float32."""
    wide = cast(both, rows.dtype, FLOAT)
    mean = op.ReduceMean(op.Mul(wide, wide), numbers(-1), keepdims=1)
    scaled = op.Div(wide, op.Sqrt(op.Add(mean, constant(EPSILON, FLOAT))))
    factors = op.Unsqueeze(cast(scales, scales.dtype, FLOAT), numbers(1, 2, 3))
    return cast(cast(op.Mul(scaled, factors), FLOAT, rows.dtype), rows.dtype, FLOAT)


def rotated(x: Any, cosine: Any, sine: Any) -> Any:
    """Adjacent channel pairs of float32 x (2, batch, heads, rows, head_dim), tables (batch, 1, rows, head_dim / 2)."""
    even, odd = op.Split(op.Reshape(x, numbers(0, 0, 0, 0, -1, 2)), axis=-1, num_outputs=2)
    c, s = (op.Unsqueeze(table, numbers(-1)) for table in (cosine, sine))
    turned = op.Sub(op.Mul(c, even), op.Mul(s, odd)), op.Add(op.Mul(s, even), op.Mul(c, odd))
    return op.Reshape(op.Concat(*turned, axis=-1), numbers(0, 0, 0, 0, -1))


def group_norm(x: Any, groups: int, weight: Any, bias: Any, eps: float = 1e-5, cudnn: bool = True) -> Any:
    return op.GroupNormalization(x, weight, bias, num_groups=groups, epsilon=eps)


def split(x: Any, size: int, axis: int = 0) -> Any:
    """Equal parts."""
    count = x.shape[axis] // size
    return op.Split(x, axis=axis, num_outputs=count) if count > 1 else (op.Identity(x),)


def split_with_sizes(x: Any, sizes: Sequence[Any], axis: int = 0) -> Any:
    """Two parts, whose sizes may be values of the graph."""
    first, _ = sizes
    return some(x, axis, None, first), some(x, axis, first, None)


def some(x: Any, axis: int = 0, first: Any = None, end: Any = None, step: int = 1) -> Any:
    """A slice; where it begins and ends may be values of the graph."""
    begin, stop = (
        numbers(bound) if isinstance(bound, int) else op.Reshape(bound, numbers(-1))
        for bound in (0 if first is None else first, END if end is None else end)
    )
    return op.Slice(x, begin, stop, numbers(axis), numbers(step))


def scattered(*given: Any) -> Tensor:
    """`qk_norm_rope_scatter` in torch, for a graph: rows are not checked, as no graph can raise an error."""
    *parts, rows, keys, values = given
    q, k, v = qk_norm_rope_op.call(*parts)
    batch, heads, texts = rows.shape[0], parts[-1], q.shape[2] - rows.shape[1]
    joint = torch.cat((torch.arange(texts, device=rows.device).expand(batch, -1), texts + rows), dim=1)
    of_batch, of_heads = (torch.arange(count, device=rows.device) for count in (batch, heads))
    place = of_batch[:, None, None], of_heads[:, None], joint[:, None]
    keys.index_put_(place, k)
    values.index_put_(place, v)
    return q


def portable(operation: Op) -> Callable[..., Any]:
    """What stands for an operation while a graph is traced: one node, which TRANSLATIONS knows."""
    return scattered if operation is qk_norm_rope_scatter_op else operation.call


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.step1x.adaln.default: adaln,
    torch.ops.step1x.gated_residual.default: gated_residual,
    torch.ops.step1x.gated_residual_adaln.default: gated_residual_adaln,
    torch.ops.step1x.gelu_join.default: gelu_join,
    torch.ops.step1x.attention.default: attention,
    torch.ops.step1x.qk_norm_rope.default: qk_norm_rope,
    torch.ops.step1x.qk_norm_rope_single.default: qk_norm_rope_single,
    torch.ops.aten.slice.Tensor: some,
    torch.ops.aten.split.Tensor: split,
    torch.ops.aten.split_with_sizes.default: split_with_sizes,
    torch.ops.aten.scaled_dot_product_attention.default: sdpa,
    torch.ops.aten.group_norm.default: group_norm,
}
