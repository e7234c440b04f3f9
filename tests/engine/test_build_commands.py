import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from step1x.engine import build, store
from step1x.engine.build import find_or_build
from step1x.engine.cli import program
from step1x.engine.store import MANIFEST, Manifest, engines_folder
from step1x.profiles import load_profile

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the program with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda *words: CliRunner().invoke(program, [str(word) for word in words])


def test_build_prints_the_folder_and_nothing_else(run: Run) -> None:
    done = run("build", "--profile", "cpu")
    assert done.exit_code == 0, done.stderr
    folder = Path(done.stdout.removesuffix("\n"))
    assert folder.parent == engines_folder()
    assert done.stderr.startswith("building the engine of step1x-tiny for cpu in")
    again = run("build", "--profile", "cpu", "--json")
    manifest = Manifest.read(folder)
    size = sum(file.size for file in manifest.files.values())
    assert json.loads(again.stdout) == {"folder": str(folder), "key": manifest.key, "bytes": size}
    assert again.stderr == ""

    (folder / "config.json").unlink()
    assert run("build", "--profile", "cpu", "-q").stderr == ""
    content = (folder / "vae.safetensors").read_bytes()
    (folder / "vae.safetensors").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert run("build", "--profile", "cpu").stderr == ""
    assert "vae.safetensors: damaged" in run("build", "--profile", "cpu", "--verify").stderr
    assert (folder / "vae.safetensors").read_bytes() == content


def test_build_of_random_weights_in_a_folder(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    done = run("build", "--profile", "fp8-24gb", "--random-weights", "--blocks", 1, "-o", target)
    assert (done.exit_code, done.stdout) == (0, f"{target}\n"), done.stderr
    assert "at most 1 double and 1 single blocks" in done.stderr
    facts = Manifest.read(target).facts
    assert (facts["profile"], facts["blocks"], facts["source"]["name"]) == ("fp8-24gb", 1, "random-step1x-tiny")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--profile", "nope"], "error: unknown profile 'nope'"),
        (["--profile", "cpu", "--model", "v1.1"], "error: v1.1: name the folder"),
        (["--profile", "cpu", "--model", "/nowhere"], "error: /nowhere: no such folder"),
        (["--profile", "cpu", "--blocks", "0"], "error: invalid value for '--blocks'"),
        (["--profile", "cpu", "-o", "/sys/engine"], "error: /sys/.engine.lock: the engine cannot be written"),
    ],
)
def test_what_is_wrong_is_one_line(run: Run, words: list[str], line: str) -> None:
    done = run("build", *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_engines_are_listed_verified_and_pruned(run: Run, tmp_path: Path) -> None:
    assert (run("engines", "list").stdout, run("engines", "verify").exit_code) == ("", 0)
    folder = Path(run("build", "--profile", "cpu").stdout.strip())
    (row,) = json.loads(run("engines", "list", "--json").stdout)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert row.pop("folder") == str(folder)
    assert row == {"key": folder.name, "profile": "cpu", "source": "step1x-tiny", "bytes": size, "days": 0.0}
    assert run("engines", "list").stdout == f"{folder.name[:12]}  cpu  step1x-tiny  0.04 GB  0.0 days\n"
    for word in ([], [folder.name[:8]], [folder]):
        assert run("engines", "verify", *word).stdout == f"{folder}: whole\n"
    assert run("engines", "verify", "nope").exit_code == 2

    content = (folder / "dit.safetensors").read_bytes()
    (folder / "dit.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = run("engines", "verify")
    assert (done.exit_code, done.stdout) == (1, f"{folder / 'dit.safetensors'}: {DAMAGED}\n")
    assert "build --verify" in done.stderr
    assert run("engines", "prune", "--older-than", "1").stderr == "removed 0.0 MB\n"
    (folder / MANIFEST).write_text("{}")
    assert "damaged or edited" in run("engines", "verify").stdout
    assert run("engines", "list").stdout == f"{folder.name[:12]}  damaged  damaged  0.04 GB  0.0 days\n"
    assert run("engines", "prune").stderr == "removed 38.8 MB\n"
    assert not list(engines_folder().iterdir())


DAMAGED = "damaged: its SHA-256 is not the manifest's"


def test_prune_removes_what_nothing_loads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(build, "versions", lambda: {"torch": "1"})
        old = find_or_build(None, load_profile("cpu"), say=lambda _: None)
    kept = find_or_build(None, load_profile("cpu"), say=lambda _: None)
    run("engines", "prune")
    assert [one.folder for one in store.engines()] == [kept] != [old]
    os.utime(kept / MANIFEST, (0, 0))
    run("engines", "prune", "--older-than", "30")
    assert not store.engines()
    find_or_build(None, load_profile("cpu"), say=lambda _: None)
    run("engines", "prune", "--all")
    assert not list(engines_folder().iterdir())
