"""Graphs of hollow networks: valid, without weights, pointing at the bytes that loading the engine would take."""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from step1x.engine.dit import is_modulation
from step1x.engine.errors import InputError
from step1x.export.core import ENTRIES
from step1x.export.onnx import (
    AXES,
    OPSET,
    Piece,
    export_onnx,
    externals,
    fill,
    opened,
    quiet,
    trace,
    traced,
)
from step1x.quant.linear import quantise_layers

ONNX_DTYPES = {"FLOAT": torch.float32, "BFLOAT16": torch.bfloat16, "FLOAT8E4M3FN": torch.float8_e4m3fn}
ONNX_DTYPES["INT8"] = torch.int8
WEIGHT = re.compile(r"\.weight(\[\d+:\d+\])?")


def bytes_at(folder: Path, found) -> Tensor:
    with (folder / found.file).open("rb") as file:
        file.seek(found.offset)
        return torch.frombuffer(bytearray(file.read(found.length)), dtype=torch.uint8)


def check_weights(engine, entry: str) -> set[str]:
    """Compares every external initializer with the module's own tensor; returns the keys."""
    network = engine.dit if entry in ("step", "rows") else engine.vae
    tensors, keys = dict(network.state_dict()), set()
    for found in externals(engine.folder / f"{entry}.onnx"):
        key, _, rows = found.name.partition("[")
        expected = tensors[key]
        if rows:
            first, end = map(int, rows.rstrip("]").split(":"))
            expected = expected[first:end]
        assert expected.dtype == ONNX_DTYPES[found.dtype], found
        assert expected.numel() == torch.Size(found.shape).numel()
        assert torch.equal(bytes_at(engine.folder, found), expected.contiguous().view(torch.uint8).flatten()), found
        keys.add(key)
    return keys


@pytest.mark.parametrize("entry", ENTRIES)
def test_graphs_are_valid_and_of_standard_operators(onnx_engine, entry):
    path = onnx_engine.folder / f"{entry}.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", OPSET)]
    assert not {node.domain for node in model.graph.node} - {""}
    assert not model.functions
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize("entry", ENTRIES)
def test_inputs_and_outputs_have_the_names_of_their_fields_and_named_axes(onnx_engine, entry):
    graph = onnx.load(onnx_engine.folder / f"{entry}.onnx", load_external_data=False).graph
    ends = [*graph.input, *graph.output]
    assert [end.name for end in ends] == expected_names(entry)
    for end in ends:
        sizes = end.type.tensor_type.shape.dim
        assert {axis: one.dim_param for axis, one in enumerate(sizes) if one.dim_param} == AXES[entry][end.name]


def expected_names(entry: str) -> list[str]:
    shared = ["text", "image_mods", "text_mods", "single_mods", "final_mods", "cosine", "sine", "bias"]
    return {
        "step": ["target", "reference", *shared, "velocity"],
        "rows": ["tokens", "rows", *shared, "keys", "values", "velocity", "new_keys", "new_values"],
        "encoder": ["pixels", "moments"],
        "decoder": ["latents", "pixels"],
    }[entry]


@pytest.mark.parametrize("entry", ENTRIES)
def test_all_values_have_a_type_and_a_rank(onnx_engine, entry):
    model = onnx.shape_inference.infer_shapes(
        onnx.load(onnx_engine.folder / f"{entry}.onnx", load_external_data=False), strict_mode=True, data_prop=True
    )
    known = {one.name for one in model.graph.value_info if one.type.tensor_type.HasField("shape")}
    known |= {one.name for one in model.graph.output}
    assert {out for node in model.graph.node for out in node.output if out} <= known


@pytest.mark.parametrize("entry", ENTRIES)
def test_initializers_are_the_modules_tensors_where_they_lie(onnx_engine, entry):
    keys = check_weights(onnx_engine, entry)
    half = {"encoder": "encoder.", "decoder": "decoder."}.get(entry, "")
    used = (*("img_in.", "double_blocks.", "single_blocks.", "final_layer.linear."), "encoder.", "decoder.")
    tensors = (onnx_engine.vae if half else onnx_engine.dit).state_dict()
    assert keys == {key for key in tensors if key.startswith(half or used) and not is_modulation(key)}


def test_weights_are_used_as_they_are_stored_and_nothing_large_is_in_a_graph(onnx_engine):
    model = onnx.load(onnx_engine.folder / "step.onnx", load_external_data=False)
    users = {name: node.op_type for node in model.graph.node for name in node.input if WEIGHT.search(name)}
    assert set(users.values()) == {"Transpose"}
    inside = [one for one in model.graph.initializer if one.data_location != onnx.TensorProto.EXTERNAL]
    assert max(onnx.numpy_helper.to_array(one).nbytes for one in inside) <= 64 * 4


def test_quantised_weights_are_dequantised_where_they_lie(onnx_bf16):
    path = onnx_bf16.folder / "step.onnx"
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path, load_external_data=False).graph
    stored = {one.name: one for one in graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL}
    backs = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = [node for node in backs if node.input[0] in stored]
    assert Counter(onnx.TensorProto.DataType.Name(stored[node.input[0]].data_type) for node in weights) == {
        "FLOAT8E4M3FN": 8,  # of a double block
        "INT8": 5,  # of two single ones: the last one takes its first layer in two parts
    }
    for node in weights:
        values, scale = (stored[name] for name in node.input)
        options = {one.name: one.i for one in node.attribute}
        assert options == {"axis": 0, "output_dtype": onnx.TensorProto.BFLOAT16}
        assert (scale.data_type, list(scale.dims)) == (onnx.TensorProto.FLOAT, list(values.dims[:1]))
    assert len(backs) - len(weights) == len([node for node in graph.node if node.op_type == "QuantizeLinear"]) == 13


def test_hollow_networks_are_enough(onnx_bf16, quantised_dit):
    """The bytes are those of the loaded model, though the export saw none."""
    assert onnx_bf16.dit.device.type == "meta"
    check_weights(onnx_bf16._replace(dit=quantised_dit(torch.bfloat16)), "step")


@pytest.mark.parametrize("scheme", ["int4-weight", "nvfp4"])
def test_schemes_without_standard_operators_are_refused(small_dit, onnx_engine, tmp_path, scheme):
    dit = small_dit()
    quantise_layers(dit, "dit", scheme)
    with pytest.raises(
        InputError, match=rf"^double_blocks\.0\..*: ONNX has no standard operators for {scheme}; [^\n]*$"
    ):
        export_onnx(dit, onnx_engine.vae, tmp_path, ["step"])


def test_other_dtypes_are_refused(small_dit, onnx_engine, tmp_path):
    with pytest.raises(InputError, match=r"^ONNX graphs are in float32, .* torch.float64$"):
        export_onnx(small_dit(torch.float64), onnx_engine.vae, tmp_path, ["step"])


@pytest.fixture(scope="module")
def halfway(onnx_engine) -> tuple[Any, dict[str, Piece]]:
    with quiet():
        model = trace("decoder", traced("decoder", onnx_engine.vae))
    return model, opened(model)


def test_a_graph_is_the_same_every_time(halfway, onnx_engine):
    model, pieces = halfway
    fill(model, pieces, onnx_engine.folder / "vae.safetensors")
    again = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    assert again == (onnx_engine.folder / "decoder.onnx").read_bytes()


BIAS = "decoder.conv_in.bias"


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({}, f"lacks {BIAS}"),
        ({BIAS: torch.zeros(3)}, r"is F32 \[3\], the graph needs FLOAT \[8\]"),
        ({BIAS: torch.zeros(8, dtype=torch.float16)}, r"is F16 \[8\], the graph needs FLOAT \[8\]"),
    ],
)
def test_files_of_another_network_are_refused(halfway, onnx_engine, tmp_path, stored, said):
    tensors = {key: one for key, one in onnx_engine.vae.state_dict().items() if key != BIAS}
    save_file(tensors | stored, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match=rf"vae\.safetensors: .*{said}.*; build the engine again$"):
        fill(*halfway, tmp_path / "vae.safetensors")


def test_a_missing_package_is_named(onnx_engine, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(InputError, match=r"pip install 'step1x-engine\[onnx\]'$"):
        export_onnx(onnx_engine.dit, onnx_engine.vae, tmp_path, ["decoder"])
