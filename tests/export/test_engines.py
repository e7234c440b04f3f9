"""Engines of the bundled checkpoint, and of blocks of the released one, exported as a user does it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from step1x.engine import Engine, released
from step1x.engine.errors import InputError
from step1x.engine.hollow import hollow_dit
from step1x.engine.store import Manifest
from step1x.export.tensorrt_library import TENSORRT_RTX
from step1x.quant.linear import swap

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "coffee.jpg"
rtx = pytest.mark.skipif(not TENSORRT_RTX.installed, reason="TensorRT-RTX is not installed")


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "exported-caches"))


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.square(np.asarray(one, float) - np.asarray(other, float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def test_onnx_edits_as_torch() -> None:
    said: list[str] = []
    ours = Engine.load(backend="onnx", cache=False, say=said.append)
    theirs = Engine.load(backend="torch", cache=False)
    assert sum("building the engine" in line for line in said) == 2  # of its tensors, and of the graphs
    for options in ({}, {"steps": 8, "guidance": 2.0, "speed": "fast"}, {"steps": 3, "guidance": 2.0, "size": 128}):
        one, other = (engine.edit(PICTURE, "make it darker", seed=1, **options) for engine in (ours, theirs))
        assert psnr(one.image, other.image) >= 45
        assert one.metadata == other.metadata
    assert all(parameter.is_meta for parameter in ours.dit.double_blocks[0].img_attn.qkv.parameters())
    with pytest.raises(InputError, match="use --backend torch"):
        ours.generate("a red circle", steps=1, size=64)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "step1x.engine", *words], capture_output=True, text=True, check=False, timeout=600
    )


@rtx
def test_tensorrt_builds_without_a_gpu(tmp_path: Path) -> None:
    profile = tmp_path / "laptop.toml"
    lines = [
        'description = "of this test"',
        'device = "cpu"',
        'dtype = "bfloat16"',
        'vae_dtype = "bfloat16"',
        "size = 64",
    ]
    profile.write_text("\n".join(lines))
    done = command("build", "--profile", str(profile), "--backend", "tensorrt", "--target", "sm_89", "--json")
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["folder"])
    manifest = Manifest.read(folder)
    assert {f"{entry}.sm_89.engine" for entry in ("step", "rows", "encoder", "decoder")} < set(manifest.files)
    assert manifest.facts["backend"]["library"] == "TensorRT-RTX"
    assert (folder / "step.sm_89.engine").stat().st_size > 10_000_000  # with the blocks' weights
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"^[^\n]*GPU[^\n]*$"):
            Engine.load(folder)


@pytest.fixture(scope="session")
def full_shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The step of a double and a single block of v1.1 in bfloat16; weights of zeros, which take no room on the disk."""
    from dataclasses import replace

    from step1x.export.onnx import graph

    made: dict[str, Path] = {}

    def export(scheme: str) -> Path:
        if scheme not in made:
            folder = tmp_path_factory.mktemp(f"full-{scheme}")
            dit = hollow_dit(replace(released.dit_config("v1.1"), depth=1, depth_single=1)).to(torch.bfloat16)
            swap(dit, "dit", scheme)
            hollow_file(folder / "dit.safetensors", dit.state_dict())
            made[scheme] = folder / "step.onnx"
            made[scheme].write_bytes(graph("step", dit, folder / "dit.safetensors"))
        return made[scheme]

    return export


def hollow_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file of zeros, but for scales, which must be above 0."""
    head, end = {}, 0
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    for key, tensor in tensors.items():
        head[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(head).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for key, facts in head.items():
            if key.endswith("_scale"):
                file.seek(8 + len(text) + facts["data_offsets"][0])
                file.write(torch.ones(tensors[key].shape).numpy().tobytes())


@rtx
@pytest.mark.parametrize(
    ("scheme", "target"),
    [("plain", "sm_86"), ("plain", "sm_89"), ("plain", "sm_120"), ("fp8", "sm_89"), ("fp8", "sm_120")],
)
def test_blocks_of_the_released_shape(
    full_shape: Callable[[str], Path], tmp_path: Path, scheme: str, target: str
) -> None:
    from step1x.export.tensorrt import build, profiles

    report = build(full_shape(scheme), tmp_path / "plan", target=target, profiles=profiles("step", levels=[1024]))
    assert (report.target, report.library) == (target, "TensorRT-RTX")
    eight_bit = sum(count for kind, count in report.products.items() if "FP8" in kind)
    assert eight_bit == (11 if scheme == "fp8" else 0)
    assert any("gemm FP8" in kind for kind in report.kernels) == (scheme == "fp8")
    assert report.bytes > 100e6  # equal weights, and zeros are, are in it once
