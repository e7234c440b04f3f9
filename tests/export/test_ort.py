"""onnxruntime against torch at many sizes, and one line for everything that may be wrong with a folder."""

import random
import shutil
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from step1x.engine.errors import InputError
from step1x.export.core import Decoder, Encoder, Inputs, RowsCore, RowsInputs, StepCore, rows_example, step_example
from step1x.export.onnx import export_onnx
from step1x.export.ort import OrtRunner
from step1x.quant.linear import QuantizedLinear

TOLERANCE = 1e-5  # of the largest value
SIZES = [(1, 1, 1, 1), (2, 16, 0, 9)]
SIZES += [(1 + seed % 2, *random.Random(seed).choices(range(1, 40), k=3)) for seed in range(18)]


def filled(like: tuple[Tensor, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(one.shape, generator=generator).to(one.dtype) for one in like]


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert (out.dtype, out.shape) == (expected.dtype, expected.shape)
    assert (out - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture(scope="module")
def runner(onnx_engine) -> OrtRunner:
    return OrtRunner(onnx_engine.folder)


@pytest.mark.parametrize(("batch", "target", "reference", "text"), SIZES)
def test_step_is_torchs(runner, onnx_engine, batch, target, reference, text):
    inputs = Inputs(*filled(step_example(onnx_engine.dit, batch, text, target, reference)))
    assert_close(runner.step(inputs), StepCore(onnx_engine.dit)(*inputs))


@pytest.mark.parametrize(("batch", "active", "others", "text"), SIZES)
def test_rows_are_torchs(runner, onnx_engine, batch, active, others, text):
    image = active + others
    inputs = RowsInputs(*filled(rows_example(onnx_engine.dit, batch, text, active, text + image)))
    chosen = torch.stack([torch.randperm(image, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    inputs = inputs._replace(rows=chosen[:, :active])
    before = [one.clone() for one in inputs]
    for out, expected in zip(runner.rows(inputs), RowsCore(onnx_engine.dit)(*inputs), strict=True):
        assert_close(out, expected)
    assert all(torch.equal(one, was) for one, was in zip(inputs, before, strict=True))


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 48), (2, 32, 16)])
def test_both_halves_of_the_autoencoder_are_torchs(runner, onnx_engine, batch, height, width):
    pixels, latents = filled((torch.empty(batch, 3, height, width), torch.empty(batch, 4, height // 2, width // 2)))
    assert_close(runner.encode(pixels), Encoder(onnx_engine.vae)(pixels))
    assert_close(runner.decode(latents), Decoder(onnx_engine.vae)(latents))


def test_quantised_rows_and_weights_are_those_of_torch(quantised_dit, onnx_engine, save, tmp_path, capfd):
    """fp8 and int8, each row by its own scale, as the engine's layers. Exporting prints nothing."""
    dit = quantised_dit(torch.float32)
    inputs = Inputs(*filled(step_example(dit, 2, 3, 7, 5)))
    save(tmp_path, dit, onnx_engine.vae)
    export_onnx(dit, onnx_engine.vae, tmp_path, ["step"])
    assert capfd.readouterr() == ("", "")
    out, expected = OrtRunner(tmp_path).step(inputs), StepCore(dit)(*inputs)
    # A value that lies between two of its 8 bits may be rounded to either, as the sums before it were rounded.
    assert (out - expected).norm() <= 5e-3 * expected.norm()
    for layer in dit.modules():
        if isinstance(layer, QuantizedLinear):
            layer.scheme = f"{layer.scheme}-weight"  # the same weights, with rows as they are
    assert (out - StepCore(dit)(*inputs)).norm() > 2e-2 * expected.norm()


def test_as_many_threads_as_torch_has(onnx_engine, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    [session] = OrtRunner(onnx_engine.folder, which=["decoder"])._sessions.values()
    assert session.get_session_options().intra_op_num_threads == 3


def test_only_what_was_exported_runs(onnx_engine, tmp_path):
    with pytest.raises(InputError, match=r"holds no ONNX graph of step, rows, encoder, decoder; build it with"):
        OrtRunner(tmp_path)
    some = OrtRunner(onnx_engine.folder, which=["decoder"])
    assert some.entries == ("decoder",)
    with pytest.raises(InputError, match=r"^encoder was not exported to ONNX; there are decoder$"):
        some.encode(torch.zeros(1, 3, 16, 16))


def test_bfloat16_on_a_cpu_is_one_line(onnx_bf16, capfd):
    with pytest.raises(
        InputError, match=r"^[^\n]*no bfloat16 products on a CPU; build with dtype float32, or use [^\n]*$"
    ):
        OrtRunner(onnx_bf16.folder)
    assert capfd.readouterr() == ("", "")


def test_wrong_types_are_one_line(runner, onnx_engine):
    inputs = Inputs(*filled(step_example(onnx_engine.dit)))
    with pytest.raises(InputError, match=r"^step\.onnx: onnxruntime failed: Unexpected input data type[^\n]*$"):
        runner.step(inputs._replace(text=inputs.text.double()))


@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda", "does not run on cuda; onnxruntime-gpu runs on CUDA"), ("mps", "there are cpu and cuda")],
)  # fmt: skip
def test_devices_without_a_provider_are_one_line(onnx_engine, device, said):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it may have one here")
    with pytest.raises(InputError, match=rf"^this onnxruntime [^\n]*{said}$"):
        OrtRunner(onnx_engine.folder, device)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(onnx_engine, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'step1x-engine\[onnx\]'$"):
        OrtRunner(onnx_engine.folder)


def edited(change):
    """What changes a graph by its parsed model."""

    def edit(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())

    return edit


FAILURES = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "damaged"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "damaged, no ONNX graph"),
    "empty": (lambda path: path.write_bytes(b""), "IR version 0 with opset none, this version reads 10 with 23"),
    "opset": (edited(lambda model: setattr(model.opset_import[0], "version", 99)), "with opset 99"),
    "IR": (edited(lambda model: setattr(model, "ir_version", 99)), "IR version 99"),
    "operator": (
        edited(lambda model: setattr(model.graph.node[0], "op_type", "Nonsense")),
        "cannot open it: .*Nonsense",
    ),
    "node": (edited(lambda model: model.graph.node.pop(0)), "cannot open it: "),
    "no weights": (
        lambda path: path.with_name("vae.safetensors").unlink(),
        "needs vae.safetensors beside it, which is",
    ),
    "few weights": (
        lambda path: path.with_name("vae.safetensors").write_bytes(bytes(9)),
        r"needs [\d,]+ bytes of vae.safetensors, which is shorter",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_damaged_folder_is_one_line(onnx_engine, tmp_path, capfd, failure):
    damage, said = FAILURES[failure]
    for name in ("decoder.onnx", "vae.safetensors"):
        shutil.copy(onnx_engine.folder / name, tmp_path)
    assert OrtRunner(tmp_path).entries == ("decoder",)
    damage(tmp_path / "decoder.onnx")
    with pytest.raises(InputError, match=rf"^[^\n]*decoder\.onnx: [^\n]*{said}[^\n]*; build the engine again[^\n]*$"):
        OrtRunner(tmp_path)
    assert capfd.readouterr() == ("", "")
