"""Packages compiled ahead of time: the same numbers at every size, weights in place, and one line for what cannot run.

The fixture `built` is what takes time: two compilations in a process of their own.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from step1x.engine.dit import DiT
from step1x.engine.errors import InputError
from step1x.engine.vae import VAE, VAEConfig
from step1x.export import aoti
from step1x.export.aoti import AotiRunner, Compiled, compile_entry, export_entry, traced
from step1x.export.core import Inputs, RowsCore, RowsInputs, StepCore, rows_example, step_example
from step1x.quant.linear import QuantizedLinear, quantise_layers
from step1x.training.recipe import dit_config

BUILD = """
import sys
from pathlib import Path
import torch
from step1x.export.aoti import build
dit, vae = torch.load(sys.argv[1], weights_only=False)
build(Path(sys.argv[2]), dit, vae, ("step",))
build(Path(sys.argv[2]), dit, vae, ("rows",), kernels=True)
"""


class Built(NamedTuple):
    folder: Path
    printed: str
    left: list[str]  # temporary files


def transformer(depth: int = 1, single: int = 1) -> DiT:
    torch.manual_seed(0)
    made = DiT(replace(dit_config(64, 1, 1, 32), depth=depth, depth_single=single))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval().requires_grad_(False)


def autoencoder() -> VAE:
    torch.manual_seed(0)
    sizes = {"in_channels": 3, "channels": (4, 4, 8, 8), "res_blocks": 1, "z_channels": 4, "groups": 2}
    return VAE(VAEConfig(**sizes, scale_factor=0.5, shift_factor=0.1)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("aoti")
    for name in ("engine", "temporary"):
        (root / name).mkdir()
    torch.save((transformer(), autoencoder()), root / "networks.pt")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, root / "networks.pt", root / "engine"],
        env=os.environ | {"TMPDIR": str(root / "temporary")},
        cwd=root / "engine",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    left = [str(path) for path in (root / "temporary").rglob("*") if path.is_file()]
    return Built(root / "engine", done.stdout, left)


@pytest.fixture(scope="module")
def runner(built: Built) -> AotiRunner:
    return AotiRunner(built.folder, transformer(), autoencoder())


def filled(zeros: Any) -> Any:
    """Random numbers of the same shapes."""
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(one.shape, generator=generator) if one.is_floating_point() else one for one in zeros]
    return type(zeros)(*parts)


def error(found: Tensor, expected: Tensor) -> float:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_nothing_else_is_left_or_printed(built: Built) -> None:
    assert sorted(os.listdir(built.folder)) == ["rows.pt2", "step.pt2"]
    assert (built.printed, built.left) == ("", [])


def test_one_step_graph_serves_twenty_sizes(runner: AotiRunner) -> None:
    dit, choose = transformer(), random.Random(0)
    sizes = [(1, 1, 1, 0), (4, 2, 3, 1)]
    sizes += [(choose.choice((1, 2)), *(choose.randint(1, 90) for _ in range(3))) for _ in range(18)]
    for size in sizes:  # batch, text rows, target and reference tokens
        inputs: Inputs = filled(step_example(dit, *size))
        assert error(runner.step(inputs), StepCore(dit)(*inputs)) <= 1e-5, size


def test_strides_do_not_matter(runner: AotiRunner) -> None:
    inputs: Inputs = filled(step_example(transformer(), 2, 5, 8, 8))
    strided = inputs._replace(target=inputs.target.mT.contiguous().mT, cosine=inputs.cosine[:1].expand(2, -1, -1, -1))
    assert error(runner.step(strided), StepCore(transformer())(*strided)) <= 1e-5


def test_a_rows_graph_with_our_operations_inside(built: Built, runner: AotiRunner) -> None:
    dit, choose = transformer(), random.Random(1)
    with zipfile.ZipFile(built.folder / "rows.pt2") as package:
        assert any(b"step1x::qk_norm_rope_scatter" in package.read(name) for name in package.namelist())
    for _ in range(6):
        text, active, others = (choose.randint(1, 40) for _ in range(3))
        batch = choose.choice((1, 2))
        inputs: RowsInputs = filled(rows_example(dit, batch, text, active, text + active + others))
        rows = torch.stack([torch.randperm(active + others)[:active] for _ in range(batch)])
        inputs = inputs._replace(rows=rows)
        before = inputs.keys.clone()
        for found, expected in zip(runner.rows(inputs), RowsCore(dit)(*inputs), strict=True):
            assert error(found, expected) <= 1e-5
        assert torch.equal(inputs.keys, before)


def test_weights_are_read_where_they_are(built: Built) -> None:
    dit = transformer()
    runner, inputs = AotiRunner(built.folder, dit, autoencoder()), filled(step_example(dit))
    before = runner.step(inputs)
    for parameter in dit.parameters():
        parameter.mul_(1.1)
    after = runner.step(inputs)
    assert error(after, StepCore(dit)(*inputs)) <= 1e-5
    assert error(after, before) > 1e-2


@pytest.mark.parametrize("entry", ["encoder", "decoder"])
def test_one_autoencoder_graph_serves_all_sizes(entry: Any) -> None:
    given = traced(entry, transformer(), autoencoder())
    graph = export_entry(*given).module()
    for batch, height, width in ((1, 1, 1), (2, 3, 2), (1, 2, 5)):
        shape = given.example[0].shape
        cells = shape[2] // 2
        image = torch.randn(batch, shape[1], cells * height, cells * width)
        assert error(graph(image), given.module(image)) <= 1e-5


def test_quantised_layers_are_exported() -> None:
    dit = transformer()
    schemes = {
        "double_blocks.0.img_attn.qkv": "fp8",
        "double_blocks.0.txt_mlp.2": "int8",
        "double_blocks.0.img_mlp.0": "fp8-weight",
        "single_blocks.0.linear1": "int4-weight",
        "single_blocks.0.linear2": "int8-weight",
    }
    for name, scheme in schemes.items():
        dit.set_submodule(name, QuantizedLinear.of(scheme, dit.get_submodule(name)))
    given = traced("step", dit, autoencoder(), kernels=True)
    graph = export_entry(*given).module()
    inputs = filled(step_example(dit, 1, 4, 9, 3))
    assert error(graph(*inputs), given.module(*inputs)) <= 1e-5


def test_weights_that_need_a_table_are_refused() -> None:
    dit = transformer(1, 0)
    assert quantise_layers(dit, "dit", "nvfp4")
    with pytest.raises(InputError, match="nvfp4"):
        export_entry(*traced("step", dit, autoencoder(), kernels=True))


def changed(built: Built, folder: Path, **values: Any) -> Path:
    """The step's package, as if it had been made elsewhere."""
    source, path = zipfile.ZipFile(built.folder / "step.pt2"), folder / "step.pt2"
    with source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("wrapper_metadata.json"):
                metadata = json.loads(data)
                metadata[aoti.MADE] = json.dumps(json.loads(metadata[aoti.MADE]) | values)
                data = json.dumps(metadata).encode()
            copy.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"torch": "2.10.0"}, "compiled with torch 2.10.0, here is"),
        ({"architecture": "sm_90"}, "compiled for sm_90, the model is on cpu"),
        ({"processor": ["x86_64", "avx1024f"]}, "compiled for a processor with .*avx1024f"),
        ({"weights": "0"}, "compiled for another model"),
    ],
)
def test_code_made_elsewhere_is_refused(built: Built, tmp_path: Path, values: Any, line: str) -> None:
    path = changed(built, tmp_path, **values)
    with pytest.raises(InputError, match=rf"step\.pt2: {line}.*; build the engine again") as raised:
        AotiRunner(path.parent, transformer(), autoencoder())
    assert "\n" not in str(raised.value)


def test_code_of_an_equal_machine_runs(built: Built, tmp_path: Path) -> None:
    changed(built, tmp_path, processor=["x86_64"] if sys.platform == "linux" else [])
    AotiRunner(tmp_path, transformer(), autoencoder())


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_package_is_not_loaded(built: Built, tmp_path: Path, damage: str) -> None:
    path = Path(shutil.copy(built.folder / "step.pt2", tmp_path))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    with pytest.raises(InputError, match=r"step\.pt2: damaged; build the engine again"):
        AotiRunner(tmp_path, transformer(), autoencoder())


def test_a_missing_package_is_named(built: Built, runner: AotiRunner, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step\.pt2: there is no such package; build the engine again"):
        AotiRunner(tmp_path, transformer(), autoencoder())
    with pytest.raises(InputError, match=r"there is no decoder\.pt2; build the engine again"):
        runner.decode(torch.zeros(1, 4, 2, 2))


def test_weights_that_come_and_go_are_refused(built: Built) -> None:
    dit = transformer()
    dit.present = lambda block: torch.no_grad()
    with pytest.raises(InputError, match="all weights of the transformer on the device"):
        AotiRunner(built.folder, dit, autoencoder())


def test_without_a_compiler(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import config

    program = export_entry(*traced("step", transformer(0, 0), autoencoder(), kernels=True))
    missing = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(InputError, match=r"step\.pt2 cannot be compiled; .* C\+\+ compiler") as raised:
        compile_entry(program, tmp_path / "step.pt2")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_no_number_of_the_weights_is_in_the_code(tmp_path: Path) -> None:
    """Not even of small tensors, which the compiler likes to write out."""
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).requires_grad_(False)
    rows = torch.randn(2, 4)
    compile_entry(export_entry(module, (rows,), ({0: torch.export.Dim("batch", max=4)},)), tmp_path / "small.pt2")
    for parameter in module.parameters():
        parameter.normal_()
    [found] = Compiled(tmp_path / "small.pt2", module)([rows])
    torch.testing.assert_close(found, module(rows))
