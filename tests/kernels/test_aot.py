"""Every kernel of ours compiles for every chip, without a spill and within the chip's shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from step1x.kernels import attention_fp8
from step1x.kernels.aot import main, modules
from step1x.kernels.launch import CHIPS

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

PLANTED = "import planted; from step1x.kernels import aot; aot.modules = lambda: [planted]; aot.main()"


def compiler(*words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Python in a process of its own, since this one may interpret kernels; `folder` holds Triton's cache."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = inherited | {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": path}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)


def figures(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "found.json").read_text())


def test_every_kernel_fits_every_chip(tmp_path):
    done = compiler("-m", "step1x.kernels.aot", "--json", str(tmp_path / "found.json"), folder=tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = figures(tmp_path)
    expected = sum(len(list(module.compilations(chip))) for module in modules() for chip in CHIPS)
    assert len(found) == expected
    for one in found:
        assert one["spilled_bytes"] == 0, one
        assert one["shared_bytes"] <= CHIPS[one["chip"]].shared_bytes, one


def test_every_module_is_compiled_for_every_chip():
    for module in modules():
        for chip, limits in CHIPS.items():
            runs = limits.fp8 or module is not attention_fp8
            assert bool(list(module.compilations(chip))) == runs, f"{module.__name__} on sm_{chip}"


def test_a_spill_and_a_kernel_too_large_are_faults(tmp_path):
    done = compiler("-c", PLANTED, "--chip", "90", "--json", str(tmp_path / "found.json"), folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "Error: 2 of 3 must not be launched\n"
    large, sound, spilling = figures(tmp_path)
    assert sound["registers"] > 0
    assert (sound["spilled_bytes"], sound["constants"]) == (0, {"BLOCK": 4096})
    assert (spilling["spilled_bytes"] > 0, spilling["constants"]) == (True, {"BLOCK": 16384})
    # Only with aligned pointers do its 16 stages become asynchronous copies into shared memory.
    assert (large["spilled_bytes"], large["shared_bytes"]) == (0, 16 * 2 * 64 * 64 * 2)
    shown = done.stdout.splitlines()[1:]
    assert [line.partition("FAULT: ")[2] for line in shown] == [
        "shared memory above 232448 bytes",
        "",
        f"spills {spilling['spilled_bytes']} bytes",
    ]


APART = """
import planted
from dataclasses import replace
from step1x.kernels import aot
one = next(planted.compilations(90))
try:
    aot.compile_ahead(replace(one, aligned=frozenset()), 90)
except ValueError as error:
    print(error)
"""


def test_an_argument_that_a_launch_compiles_anew_for_is_refused(tmp_path):
    """A count of rows would make one kernel of 1, one of multiples of 16 and one of the rest, two never seen."""
    done = compiler("-c", APART, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("_scale_rows_kernel: a launch compiles width anew for 1 and multiples of 16")


def test_the_interpreter_cannot_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = CliRunner().invoke(main)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "TRITON_INTERPRET" in result.output
