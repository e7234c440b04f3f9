"""Engines built by TensorRT-RTX, where it is installed, and what is said where they cannot be."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from step1x.engine import sizes
from step1x.engine.dit import DiT
from step1x.engine.errors import InputError
from step1x.engine.folder import locate
from step1x.engine.image import Canvas, fit
from step1x.export import tensorrt
from step1x.export.tensorrt import build, most_tokens, profiles
from step1x.export.tensorrt_compile import kernels, restore_times
from step1x.export.tensorrt_library import TENSORRT, TENSORRT_RTX, Library, library_for, one_line
from step1x.quant.linear import quantise_layers

rtx = pytest.mark.skipif(not TENSORRT_RTX.installed, reason="needs pip install 'step1x-engine[tensorrt-rtx]'")
onnx = pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="needs pip install 'step1x-engine[onnx]'")
SIZES = profiles("step", levels=(64,), text=64)
LAYERS = """Layers:
Name: a, LayerType: gemm, Inputs: [ { Name: x, Datatype: FP8, Format: f }], Outputs: [ { Datatype: BFloat16 }]
Name: b, LayerType: gemm, Inputs: [ { Name: y, Datatype: FP8, Format: f }], Outputs: [ { Datatype: BFloat16 }]
Name: c, LayerType: kgen, Inputs: [ { Name: z, Datatype: BFloat16, Format: f }], Outputs: []
Name: _gemm_mha_v2_0, LayerType: kgen, Inputs: [ { Name: z, Datatype: BFloat16, Format: f }], Outputs: []
Name: d, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0

I/O Tensors:
 Name: x, IOMode: Input, DataType: BFloat16
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A step of one double and one single block in bfloat16, its large layers plain or quantised."""
    from step1x.export.onnx import graph as traced

    made: dict[str, Path] = {}

    def export(scheme: str) -> Path:
        if scheme not in made:
            bundled, folder = locate(None), tmp_path_factory.mktemp(scheme)
            narrow = {"hidden_size": 64, "heads": 2, "mlp_hidden": 128, "rope_axes": (8, 12, 12)}
            config = replace(sizes.dit_config(bundled.dit, bundled.dit_configs), depth=1, depth_single=1, **narrow)
            torch.manual_seed(0)
            dit = DiT(config).to(torch.bfloat16).eval().requires_grad_(False)
            if scheme != "plain":
                quantise_layers(dit, "dit", scheme)
            save_file(dit.state_dict(), folder / "dit.safetensors")
            made[scheme] = folder / "step.onnx"
            made[scheme].write_bytes(traced("step", dit, folder / "dit.safetensors"))
        return made[scheme]

    return export


@rtx
@onnx
@pytest.mark.parametrize(
    ("scheme", "target", "quantised"),
    [
        ("plain", "sm_86", None),
        ("plain", "sm_89", None),
        ("plain", "sm_120", None),
        ("fp8", "sm_89", "FP8"),
        ("fp8", "sm_120", "FP8"),
    ],
)
def test_engines_are_built_for_gpus_that_are_not_here(graph, tmp_path, capfd, scheme, target, quantised):
    plan = tmp_path / "step.engine"
    report = build(graph(scheme), plan, target=target, profiles=SIZES)
    assert (report.library, report.target, report.bytes) == ("TensorRT-RTX", target, plan.stat().st_size)
    # Ten layers of the blocks, one of which is two products; both ends and the products of attention remain plain.
    products = {"BF16": 17} if quantised is None else {quantised: 11, "BF16": 6}
    assert report.products == products
    assert report.kernels["attention BFloat16"] == 2  # one kernel a block: logits never reach memory
    if quantised is not None:  # in the finished engine, too
        assert {kind.upper(): count for kind, count in report.kernels.items()}[f"GEMM {quantised}"] == 11
    assert report.activation_bytes > 0
    assert report.seconds > 0
    assert report.peak_bytes > 1e8
    assert capfd.readouterr() == ("", "")


@rtx
@onnx
def test_fp8_needs_a_gpu_that_has_it(graph, tmp_path, capfd):
    with pytest.raises(InputError, match=r"cannot build this for sm_86: .*fp8_e4m3") as error:
        build(graph("fp8"), tmp_path / "step.engine", target="sm_86", profiles=SIZES)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "step.engine").exists()
    assert capfd.readouterr() == ("", "")


@rtx
@onnx
def test_a_graph_with_other_axes_is_refused(graph, tmp_path):
    with pytest.raises(InputError, match=r"step\.onnx: free axis 'batch' of target is none"):
        build(graph("plain"), tmp_path / "step.engine", target="sm_86", profiles=[{"rows": (1, 2, 3)}])


@rtx
def test_a_target_that_the_library_does_not_know(tmp_path):
    (tmp_path / "step.onnx").write_bytes(write_graph("Relu"))
    with pytest.raises(InputError, match=r"builds for .*sm_80, sm_86, sm_89, sm_120.*, not for sm_90: .*tensorrt\]"):
        build(tmp_path / "step.onnx", tmp_path / "step.engine", target="sm_90", profiles=[])


@rtx
@onnx
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: write_graph("NoSuchOperator"), r"refused: node first \(NoSuchOperator\): "),
        (lambda: b"no graph at all", r"refused: "),
        (None, r"no such file"),
    ],
)
def test_a_graph_that_cannot_be_read(tmp_path, capfd, content, said):
    path = tmp_path / "step.onnx"
    if content is not None:
        path.write_bytes(content())
    with pytest.raises(InputError, match=rf"step\.onnx: {said}") as error:
        build(path, tmp_path / "step.engine", target="sm_86", profiles=[])
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@rtx
def test_a_compiler_that_ends_is_one_line(tmp_path):
    (tmp_path / "step.onnx").write_bytes(write_graph("Relu"))
    with pytest.raises(InputError, match=r"TensorRT-RTX stopped with code 1: FileNotFoundError: .*nowhere") as error:
        build(tmp_path / "step.onnx", tmp_path / "nowhere" / "step.engine", target="sm_86", profiles=[])
    assert "\n" not in str(error.value)


def write_graph(operator: str) -> bytes:
    """A graph of one node."""
    helper = pytest.importorskip("onnx.helper")
    ends = [helper.make_tensor_value_info(name, 1, [2, 3]) for name in "xy"]
    node = helper.make_node(operator, ["x"], ["y"], name="first")
    made = helper.make_graph([node], "graph", ends[:1], ends[1:])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11).SerializeToString()


def test_a_library_that_is_missing_is_named():
    missing = Library("TensorRT-RTX", ("no_such_module",), "tensorrt-rtx", timed=False)
    assert not missing.installed
    with pytest.raises(InputError, match=r"not installed: pip install .*\[tensorrt-rtx\]', .*--backend onnx"):
        missing.load()


def test_a_library_that_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import ctypes; ctypes.CDLL('libnothing.so.7')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"installed but does not load: libnothing\.so\.7"):
        Library("TensorRT", ("broken_library",), "tensorrt", timed=True).load()


@pytest.mark.parametrize(
    ("target", "here", "installed", "chosen"),
    [
        ("sm_90", "sm_90", {"TensorRT", "TensorRT-RTX"}, "TensorRT"),
        ("sm_89", "sm_90", {"TensorRT", "TensorRT-RTX"}, "TensorRT-RTX"),
        ("sm_89", "sm_89", {"TensorRT-RTX"}, "TensorRT-RTX"),
        ("sm_89", "none", {"TensorRT-RTX"}, "TensorRT-RTX"),
        ("sm_89", "none", set(), "TensorRT-RTX"),
    ],
)
def test_which_library_builds(monkeypatch, target, here, installed, chosen):
    monkeypatch.setattr(Library, "installed", property(lambda library: library.name in installed))
    assert library_for(target, here).name == chosen


def test_what_no_library_builds(monkeypatch):
    monkeypatch.setattr(Library, "installed", property(lambda library: library is TENSORRT))
    with pytest.raises(InputError, match=r"only for the GPU at hand \(none\); for sm_89, .*tensorrt-rtx"):
        library_for("sm_89", "none")
    with pytest.raises(InputError, match="'turing' is no GPU architecture"):
        library_for("turing", "none")


def test_profiles_hold_every_picture_up_to_the_largest_level():
    steps = profiles("step")
    for profile, level in zip(steps, tensorrt.LEVELS, strict=True):
        assert profile["target"][1] == Canvas(level, level).tokens
        for tenths in range(10, 41):
            for width, height in ((tenths, 10), (10, tenths)):
                assert Canvas(*fit(width, height, level)).tokens <= profile["target"][2]
    assert [one["target"][0] for one in steps] == [1, most_tokens(512) + 1, most_tokens(768) + 1]
    for size in (64, 333, 512, 640, 900, 1024):
        tokens = Canvas(*fit(4, 3, size)).tokens
        assert sum(one["target"][0] <= tokens <= one["target"][2] for one in steps) == 1


@pytest.mark.parametrize("entry", ["step", "rows", "encoder", "decoder"])
def test_sizes_agree_with_each_other(entry):
    for profile in profiles(entry):
        assert all(least <= usual <= largest for least, usual, largest in profile.values())
        for index in range(3):
            one = {name: own[index] for name, own in profile.items()}
            if entry in ("step", "rows"):
                assert one["rows"] == one["text"] + one["target"] + one["reference"]
                assert one["computed"] == one["text"] + one["active"]
                assert one["active"] <= one["target"] + max(one["reference"], 1)
            else:
                assert (one["height"], one["width"]) == (8 * one["latent_height"], 8 * one["latent_width"])


def test_kernel_times_of_earlier_builds_are_taken_where_there_are_any(tmp_path):
    class Config:
        given: tuple[bytes, bool]

        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
            self.given = cache, ignore_mismatch

    config, path = Config(), tmp_path / "tensorrt.times"
    for content in (b"", b"times"):
        assert restore_times(config, str(path)) == path
        assert config.given == (content, False)
        path.write_bytes(b"times")


def test_kernels_are_counted_by_kind_and_type():
    assert kernels(LAYERS) == {"gemm FP8": 2, "kgen BFloat16": 1, "attention BFloat16": 1, "shape_call": 1}
    assert kernels("") == {}


def test_a_message_is_one_line_without_places_in_sources():
    text = "IBuilder: Myelin ([pass.cpp:1500: run_passes] Cannot compile.\n In compileGraph at /_src/a.cpp:20)"
    assert one_line(text) == "IBuilder: Myelin (Cannot compile)"
    assert len(one_line("word " * 200)) == 300
