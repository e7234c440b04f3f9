"""Quantised layers in an ONNX graph: QuantizeLinear and DequantizeLinear around the products of a plain one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from step1x.kernels.adaln import E4M3_MAX, SMALLEST
from step1x.quant.linear import QuantizedLinear
from step1x.quant.schemes import Scheme
from step1x.quant.weights import INT8_MAX

LARGEST = {"fp8": E4M3_MAX, "int8": INT8_MAX}  # quantised value of the schemes that quantise rows, too


class Piece(NamedTuple):
    """What an initializer is: some rows of a stored tensor, all if there is no end."""

    key: str
    first: int = 0
    end: int | None = None


def quantise(model: Any, pieces: dict[str, Piece], layers: Mapping[str, QuantizedLinear]) -> None:
    """Puts the stored values and scales of quantised layers in the place of their weights, and what undoes them.

    The rows that come into layers that quantise them pass through the layer's 8 bits, too.
    """
    for name, piece in list(pieces.items()):
        owner, _, kind = piece.key.rpartition(".")
        if owner not in layers or kind != "weight":
            continue
        scheme = layers[owner].scheme
        for product in dequantise_weight(model, pieces, name, scheme):
            if scheme in LARGEST:
                quantise_rows(model, product, scheme)


def quantised_type(scheme: str) -> Any:
    import onnx_ir as ir

    return ir.DataType.FLOAT8E4M3FN if scheme.startswith("fp8") else ir.DataType.INT8


def dequantise_weight(model: Any, pieces: dict[str, Piece], name: str, scheme: str) -> list[Any]:
    """Makes an initializer what is stored, dequantised with a scale for each row; returns the products it is in."""
    import onnx_ir as ir

    graph, piece = model.graph, pieces[name]
    plain = graph.initializers.pop(name)
    stored = ir.Value(name=name, type=ir.TensorType(quantised_type(scheme)), shape=plain.shape)
    scales = name.replace(".weight", ".weight_scale")
    scale = ir.Value(name=scales, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(plain.shape[:1]))
    pieces[scales] = piece._replace(key=f"{piece.key}_scale")
    users = [use.node for use in plain.uses()]
    node = ir.node("DequantizeLinear", [stored, scale], {"axis": 0, "output_dtype": int(plain.dtype)})
    plain.name = f"{name}.plain"
    like(node.outputs[0], plain)
    for value in (stored, scale):
        graph.initializers.add(value)
    ir.convenience.replace_all_uses_with(plain, node.outputs[0])
    graph.insert_before(users[0], node)
    return [use.node for user in users for use in user.outputs[0].uses()]  # a user is the Transpose before a product


def quantise_rows(model: Any, product: Any, scheme: Scheme) -> None:
    """Lets the rows of a product pass through 8 bits, each by a scale of its own, which the result is multiplied by.

    The scales are made where the rows are, so those that QuantizeLinear is given are all 1: runtimes want constants.
    """
    import onnx_ir as ir

    kind, wide, rows, out = quantised_type(scheme), ir.DataType.FLOAT, product.inputs[0], product.outputs[0]
    name, dtype = out.name, rows.dtype
    one = inline(model, "one", 1, wide)
    nodes: list[Any] = []

    def made(kind_of: str, given: list[Any], type_: Any, shape: Any, **attributes: Any) -> Any:
        node = ir.node(kind_of, given, attributes)
        nodes.append(node)
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{name}_{scheme}_{len(nodes)}", ir.TensorType(type_), shape
        return value

    each = ir.Shape([*rows.shape[:-1], 1])
    exact = made("Cast", [rows], wide, rows.shape, to=int(wide))
    peak = made(
        "ReduceMax",
        [made("Abs", [exact], wide, rows.shape), inline(model, "last_axis", [-1], ir.DataType.INT64)],
        wide,
        each,
        keepdims=1,
    )
    peak = made("Max", [peak, inline(model, "smallest", SMALLEST, wide)], wide, each)
    scale = made("Div", [peak, inline(model, f"largest_{scheme}", LARGEST[scheme], wide)], wide, each)
    share = made("Div", [exact, scale], wide, rows.shape)
    bits = made("QuantizeLinear", [share, one, inline(model, f"zero_{scheme}", 0, kind)], kind, rows.shape)
    back = made("DequantizeLinear", [bits, one], dtype, rows.shape, output_dtype=int(dtype))
    model.graph.insert_before(product, nodes)
    product.replace_input_with(0, back)
    users = list(out.uses())
    nodes = []
    name = f"{name}_out"
    scaled = made("Mul", [made("Cast", [out], wide, out.shape, to=int(wide)), scale], wide, out.shape)
    final = made("Cast", [scaled], dtype, out.shape, to=int(dtype))
    model.graph.insert_after(product, nodes)
    for user, index in users:
        user.replace_input_with(index, final)


def inline(model: Any, name: str, number: object, dtype: Any) -> Any:
    """An initializer in the graph itself, made once."""
    import numpy as np
    import onnx_ir as ir

    if name not in model.graph.initializers:
        tensor = ir.tensor(np.asarray(number, dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
        model.graph.initializers.add(value)
    return model.graph.initializers[name]


def like(value: Any, other: Any) -> None:
    value.name, value.type, value.shape = other.name, other.type, other.shape
