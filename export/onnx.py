"""ONNX graphs of an engine folder's networks, which hold no weights: they point into the safetensors files beside them.

A graph is traced from a hollow module (no weight is read), each operation of kernels/ as one node (onnx_ops.py), and
its initializers are external data: so many bytes from there in `dit.safetensors` or `vae.safetensors`. Weights are
used as they are stored, (out, in). Layers that the engine stores in 8 bits are dequantised where they are multiplied
(DequantizeLinear), and the rows that come into them pass through 8 bits, each by its own scale, as the engine's own do.
TensorRT and onnxruntime read the pattern as 8-bit products.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from step1x.engine.checkpoint import entries
from step1x.engine.dit import DiT, is_modulation
from step1x.engine.errors import InputError
from step1x.engine.hollow import hollow_dit, hollow_vae
from step1x.engine.vae import VAE
from step1x.export.core import (
    ENTRIES,
    Decoder,
    Encoder,
    Entry,
    RowsCore,
    RowsOutputs,
    StepCore,
    quiet,
    rows_example,
    step_example,
)
from step1x.export.onnx_quantised import LARGEST, Piece, quantise
from step1x.quant.linear import QuantizedLinear

OPSET = 23  # the first whose DequantizeLinear makes bfloat16 of float32 scales
SUFFIX = ".onnx"
INSTALL = "ONNX graphs need onnx, onnxscript and onnxruntime: pip install 'step1x-engine[onnx]'"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IR_VERSION = 10  # of the files
BLOCKS = ("double_blocks.", "single_blocks.")
STORED = {"F32": "FLOAT", "BF16": "BFLOAT16", "F16": "FLOAT16", "F8_E4M3": "FLOAT8E4M3FN", "I8": "INT8"}
AT = re.compile(r"\bs\d+\b")  # a free size, as torch.export names it

Axes = Mapping[str, Mapping[int, str]]  # of an input or output: its free axes
SHARED: Axes = {
    "text": {0: "batch", 1: "text"},
    **{name: {0: "batch"} for name in ("image_mods", "text_mods", "single_mods", "final_mods")},
    "bias": {0: "batch", 1: "text"},
}
# rows: text and image together; computed: text rows and active ones.
AXES: Mapping[Entry, Axes] = {
    "step": {
        "target": {0: "batch", 1: "target"},
        "reference": {0: "batch", 1: "reference"},
        **SHARED,
        **{name: {0: "batch", 2: "rows"} for name in ("cosine", "sine")},
        "velocity": {0: "batch", 1: "target"},
    },
    "rows": {
        **{name: {0: "batch", 1: "active"} for name in ("tokens", "rows", "velocity")},
        **SHARED,
        **{name: {0: "batch", 2: "computed"} for name in ("cosine", "sine")},
        **{name: {0: "batch", 3: "rows"} for name in ("keys", "values", "new_keys", "new_values")},
    },
    "encoder": {
        "pixels": {0: "batch", 2: "height", 3: "width"},
        "moments": {0: "batch", 2: "latent_height", 3: "latent_width"},
    },
    "decoder": {
        "latents": {0: "batch", 2: "latent_height", 3: "latent_width"},
        "pixels": {0: "batch", 2: "height", 3: "width"},
    },
}
FOLLOWING = ("rows", "computed", "height", "width")  # sums of other sizes, or products


class External(NamedTuple):
    """Where the values of an initializer lie."""

    name: str
    file: str  # in the graph's folder
    dtype: str  # of ONNX
    shape: tuple[int, ...]
    offset: int
    length: int  # bytes


class Traced(NamedTuple):
    """A module to trace, its tensors by their keys, and what it is called with."""

    module: nn.Module
    prefix: str  # of the keys in the module's own names
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]


def export_onnx(
    dit: DiT,
    vae: VAE,
    folder: Path,
    which: Sequence[Entry] = ENTRIES,
) -> list[Path]:
    """Writes a graph for each entry beside `dit.safetensors` and `vae.safetensors`, whose headers alone are read.

    dit and vae, hollow or loaded, say what is in these files. Raises InputError with one line.
    """
    written = []
    for entry in which:
        path = folder / f"{entry}{SUFFIX}"
        path.write_bytes(graph_in(folder, entry, dit, vae))
        written.append(path)
    return written


def graph_in(folder: Path, entry: Entry, dit: DiT, vae: VAE) -> bytes:
    """`graph` of an entry of an engine folder."""
    network, file = (dit, "dit") if entry in ("step", "rows") else (vae, "vae")
    return graph(entry, network, folder / f"{file}.safetensors")


def graph(entry: Entry, network: DiT | VAE, tensors: Path) -> bytes:
    """The file of an entry's graph. tensors: the network's, to lie beside it.

    Raises InputError, one line: onnx is not installed, a dtype or scheme that ONNX has no standard operators for, or
    a file that is not the network's.
    """
    if network.dtype not in DTYPES:
        raise InputError(f"ONNX graphs are in float32, bfloat16 or float16; this model is in {network.dtype}")
    ir, layers = needed(), quantised(network)
    with quiet():
        model = trace(entry, traced(entry, network))
        pieces = cut(model, opened(model))
        quantise(model, pieces, layers)
        fill(model, pieces, tensors)
        return ir.to_proto(model).SerializeToString(deterministic=True)


def quantised(network: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of the blocks by name. Raises InputError for one that no graph can be made of."""
    found = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, QuantizedLinear) and name.startswith(BLOCKS) and not is_modulation(f"{name}.weight")
    }
    for name, layer in found.items():
        if layer.scheme.removesuffix("-weight") not in LARGEST:
            raise InputError(
                f"{name}: ONNX has no standard operators for {layer.scheme}; build with fp8 or int8 weights"
            )
    return found


def needed() -> Any:
    """The package that graphs are made with. Raises InputError if it is not there."""
    try:
        import onnx_ir
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError(INSTALL) from None
    return onnx_ir


def traced(entry: Entry, network: DiT | VAE) -> Traced:
    """A plain hollow twin of a network: quantised layers are put into the graph, not traced."""
    from step1x.export.onnx_ops import portable

    if isinstance(network, VAE):
        hollow = hollow_vae(network.config).to(network.dtype)
        inputs = vae_inputs(entry, hollow)
        half: nn.Module = Encoder(hollow) if entry == "encoder" else Decoder(hollow)
        return Traced(half, "", inputs, [name for name in AXES[entry] if name not in inputs])
    twin = hollow_dit(network.config, network.final_layer.fp32_norms).to(network.dtype)
    if entry == "step":
        return Traced(StepCore(twin, portable), "dit.", step_example(twin)._asdict(), ["velocity"])
    return Traced(RowsCore(twin, portable), "dit.", rows_example(twin)._asdict(), RowsOutputs._fields)


def vae_inputs(entry: Entry, vae: VAE) -> dict[str, Tensor]:
    config = vae.config
    name, channels, side = (
        ("pixels", config.in_channels, 4 * config.factor) if entry == "encoder" else ("latents", config.z_channels, 6)
    )
    return {name: torch.empty(2, channels, side, 2 * side, dtype=vae.dtype, device="meta")}


def trace(entry: Entry, given: Traced) -> Any:
    """The graph of a module, without its weights: a model of onnx_ir, whose initializers have their keys as names."""
    from onnx_ir.passes import common

    from step1x.export.onnx_ops import TRANSLATIONS

    axes = AXES[entry]
    names = {name for one in axes.values() for name in one.values()} - {*FOLLOWING}
    sizes: dict[str, Any] = {name: Dim(name) for name in sorted(names)} | dict.fromkeys(FOLLOWING, Dim.AUTO)
    free = [{axis: sizes[name] for axis, name in axes[key].items()} for key in given.inputs]
    program = torch.export.export(
        given.module.eval().requires_grad_(False),
        tuple(given.inputs.values()),
        dynamic_shapes=(*free[:2], *([tuple(free[2:])] if free[2:] else [])),
    )
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(given.inputs),
        output_names=list(given.outputs),
        custom_translation_table=TRANSLATIONS,
        optimize=False,
        verbose=False,
    )
    assert made is not None
    model: Any = made.model
    model.ir_version = IR_VERSION
    for value in list(model.graph.initializers.values()):
        value.const_value = None  # nothing that is made of a weight can be folded
    for clean in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        clean(model)
    for value in list(model.graph.initializers.values()):
        if value.const_value is None:
            value.name = value.name.removeprefix(given.prefix)
    name_axes(model, axes)
    return model


def name_axes(model: Any, axes: Axes) -> None:
    """Gives free sizes their names, in inputs and outputs and in what is computed from them."""
    import onnx_ir as ir

    ends = [*model.graph.inputs, *model.graph.outputs]
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        names |= {str(value.shape[axis].value): name for axis, name in axes[value.name].items()}

    def named(size: Any) -> Any:
        if isinstance(size, int) or size.value is None:
            return size
        return AT.sub(lambda symbol: names.get(symbol[0], symbol[0]), size.value)

    for value in [*ends, *(out for node in model.graph for out in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([named(size) for size in value.shape])
    for value in ends:
        value.shape = ir.Shape([axes[value.name].get(axis, size) for axis, size in enumerate(value.shape)])


def opened(model: Any) -> dict[str, Piece]:
    """The initializers that are stored tensors: those that have no values of their own."""
    return {name: Piece(name) for name, value in model.graph.initializers.items() if value.const_value is None}


def cut(model: Any, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """The initializers with those that some rows of a stored tensor are, in the place of the nodes that took them."""
    import onnx_ir as ir

    found = dict(pieces)
    for node in [node for node in model.graph if node.op_type == "Slice" and node.inputs[0].name in pieces]:
        whole, first, end, axis, step = (one.const_value and one.const_value.numpy() for one in node.inputs)
        assert (*axis, *step) == (0, 1)
        whole, out = node.inputs[0], node.outputs[0]
        rows = range(whole.shape[0])[int(first[0]) : int(end[0])]
        name = f"{whole.name}[{rows.start}:{rows.stop}]"
        if name not in found:
            value = ir.Value(name=name, type=whole.type, shape=ir.Shape([len(rows), *whole.shape[1:]]))
            model.graph.initializers.add(value)
            found[name] = Piece(whole.name, rows.start, rows.stop)
        ir.convenience.replace_all_uses_with(out, model.graph.initializers[name])
        model.graph.remove(node, safe=True)
    for name in [name for name in found if not model.graph.initializers[name].uses()]:
        del model.graph.initializers[name], found[name]
    return found


def fill(model: Any, pieces: Mapping[str, Piece], tensors: Path) -> None:
    """Says of each initializer where its bytes lie. Raises InputError if they are not there, or other ones are."""
    import onnx_ir as ir

    stored = entries(tensors)
    for name, piece in pieces.items():
        value, found = model.graph.initializers[name], stored.get(piece.key)
        if found is None:
            raise InputError(f"{tensors}: lacks {piece.key}; build the engine again")
        length = int(value.dtype.itemsize * math.prod(value.shape))
        row = found.size // found.shape[0]
        end = found.shape[0] if piece.end is None else piece.end
        if STORED.get(found.dtype) != value.dtype.name or length != row * (end - piece.first):
            raise InputError(
                f"{tensors}: {piece.key} is {found.dtype} {list(found.shape)}, the graph needs "
                f"{value.dtype.name} {list(value.shape)}; build the engine again"
            )
        value.const_value = ir.ExternalTensor(
            tensors.name,
            found.start + row * piece.first,
            length,
            value.dtype,
            shape=value.shape,
            name=name,
            base_dir=tensors.parent,
        )


def read(path: Path) -> Any:
    """A graph without its weights, as onnx's ModelProto. Raises InputError if it is none that this version writes."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise InputError(f"{path}: {INSTALL}") from None
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except DecodeError:
        raise InputError(f"{path}: damaged, no ONNX graph; build the engine again") from None
    opsets = {one.domain: one.version for one in model.opset_import}
    if (model.ir_version, opsets) != (IR_VERSION, {"": OPSET}):
        raise InputError(
            f"{path}: a graph of IR version {model.ir_version} with opset {opsets.get('', 'none')}, this version "
            f"reads {IR_VERSION} with {OPSET}; build the engine again"
        )
    return model


def externals(path: Path) -> list[External]:
    """Where the initializers of a graph lie that are not in it. Reads the graph alone, and raises what `read` does."""
    model, found = read(path), []
    from onnx import TensorProto

    for one in model.graph.initializer:
        if one.data_location == TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in one.external_data}
            place = said["location"], TensorProto.DataType.Name(one.data_type), tuple(one.dims)
            found.append(External(one.name, *place, int(said["offset"]), int(said["length"])))
    return found
