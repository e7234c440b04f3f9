"""Compiled blocks, the arguments of a CUDA graph, and the cache of compiled code."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from step1x.engine.caches import cache_folder
from step1x.engine.dit import DiT
from step1x.engine.executor import Replay, assembled, compile_blocks, keep_compiled, leaves
from step1x.engine.fused import Fused
from step1x.quant.linear import quantise_layers
from step1x.quant.schemes import Scheme

COUNT = 12  # image rows of `step_arguments`
Build = Callable[..., DiT]
Arguments = Callable[..., tuple]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def test_blocks_of_a_kind_share_a_graph(small_dit: Build, step_arguments: Arguments) -> None:
    dit = small_dit(4, 5)
    fused = Fused(dit)
    compile_blocks(fused, backend="aot_eager")
    given = step_arguments(dit)
    assert error(fused.velocity(*given, COUNT // 2), dit.velocity(*given, COUNT // 2)) < 1e-12
    assert sum(counters["graph_break"].values()) == 0
    # Entry of image, text and single blocks; double blocks and the last of them; single blocks; the last; the end.
    assert counters["stats"]["unique_graphs"] <= 8
    made = counters["stats"]["unique_graphs"]
    fused.velocity(*given, COUNT // 2)
    assert counters["stats"]["unique_graphs"] == made
    wide = step_arguments(dit, batch=1)
    assert error(fused.velocity(*wide), dit.velocity(*wide)) < 1e-12


def test_leaves_and_back(small_dit: Build, step_arguments: Arguments) -> None:
    for bias in (True, False):
        img, step, rope = step_arguments(small_dit(2, 3), bias=bias)
        again = assembled(leaves(img, step, rope), step)
        assert [id(one) for one in leaves(*again)] == [id(one) for one in leaves(img, step, rope)]
        assert again[1].text is step.text
        assert again[1].mods.final is step.mods.final
        assert (again[1].bias is None) is not bias


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replayed_graphs(small_dit: Build, step_arguments: Arguments) -> None:
    dit = small_dit(dtype=torch.float32).cuda()
    img, step, rope = step_arguments(dit.cpu())
    given = [one.cuda() for one in leaves(img, step, rope)]
    dit.cuda()
    run = Replay(Fused(dit).velocity)
    first = assembled(given, step)
    again = assembled([one + 0.1 for one in given], step)
    outs = [run(*first, COUNT), run(*again, COUNT), run(*first, COUNT)]
    assert torch.equal(outs[0], outs[2])
    assert error(outs[0], dit.velocity(*first, COUNT)) < 1e-5
    assert error(outs[1], dit.velocity(*again, COUNT)) < 1e-5


def test_a_cache_folder_of_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "step1x-engine"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path.home() / ".cache" / "step1x-engine"


def test_a_cache_that_others_could_have_written_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    folder = cache_folder() / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o770)
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()
    assert "others may write to" in caplog.text
    folder.rmdir()
    folder.write_text("no folder")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()
    assert "compiled code is not kept" in caplog.text.splitlines()[-1]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


COMPILE = """
import torch
from torch._dynamo.utils import counters
from step1x.engine.executor import keep_compiled
keep_compiled()
torch.compile(lambda x: (x * 2).sin() + 1, fullgraph=True, dynamic=False)(torch.ones(64))
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0)
"""


def test_the_second_process_starts_warm(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    folder, said, libraries = tmp_path / "step1x-engine" / "compiled", [], []
    for _ in range(2):
        words = [sys.executable, "-c", COMPILE]
        done = subprocess.run(
            words, env={**environment, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        said.append(done.stdout.strip())
        libraries.append({file: file.stat().st_mtime_ns for file in folder.rglob("*.so")})
    assert said == ["False", "True"]
    assert libraries[0]
    assert libraries[1] == libraries[0]  # nothing went through the C++ compiler again
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_blocks_with_quantised_layers_compile(small_dit: Build, step_arguments: Arguments, scheme: Scheme) -> None:
    dit = small_dit(dtype=torch.float32)
    quantise_layers(dit, "dit", scheme)
    given, fused = step_arguments(dit), Fused(dit)
    wanted = fused.velocity(*given, COUNT // 2)
    compile_blocks(fused, backend="eager")
    assert error(fused.velocity(*given, COUNT // 2), wanted) < 1e-5
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] <= 8
