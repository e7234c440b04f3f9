"""Which backend an engine is for, and which may be loaded."""

import shutil
from pathlib import Path
from typing import get_args

import pytest

from step1x.engine import Engine, backends, build, options, store
from step1x.engine.backends import FACT, Backend, backend_at, backend_of
from step1x.engine.build import find_or_build
from step1x.engine.errors import InputError
from step1x.engine.loading import wanted_profile
from step1x.engine.store import Manifest, engines_folder
from step1x.profiles import BackendName, load_profile

CPU = load_profile("cpu")
ONNX = CPU.changed({"backend": "onnx"})


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture
def onnx(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Exporting writes a few bytes; the folders whose tensors it was given."""
    seen: list[Path] = []

    def files(self: Backend, config: object, profile: object, folder: Path):  # type: ignore[no-untyped-def]
        if self.name != "torch":
            seen.append(folder)
            assert (folder / "dit.safetensors").is_file()
            yield "step.onnx", lambda file: file.write(b"a graph")

    monkeypatch.setattr(Backend, "files", files)
    return seen


def test_names_are_the_same_everywhere() -> None:
    assert options.BACKENDS == backends.BACKENDS == get_args(BackendName)


def test_torch_needs_nothing() -> None:
    assert Backend.of(CPU) == Backend()
    assert Backend().facts == {}
    assert backend_of({}) == Backend()


def test_what_cannot_be_together() -> None:
    with pytest.raises(InputError, match="profile cpu streams the transformer's blocks, which backend torch alone"):
        Backend.of(ONNX.changed({"residency": {"dit": "stream", "stream_blocks": 3}}))
    with pytest.raises(InputError, match="no GPU here to build for; name one, such as --target sm_89"):
        Backend.of(CPU.changed({"backend": "tensorrt"}))
    assert Backend.of(CPU.changed({"backend": "tensorrt", "target": "sm_89"})) == Backend(
        "tensorrt", "sm_89", "TensorRT-RTX"
    )
    with pytest.raises(InputError, match="target is for backend tensorrt; onnx builds for the machine at hand"):
        wanted_profile("cpu", {"backend": "onnx", "target": "sm_89"})
    with pytest.raises(InputError, match=r"target: .*pattern"):
        wanted_profile("cpu", {"backend": "tensorrt", "target": "H100"})
    with pytest.raises(InputError, match="attention, compiled: of backend torch alone; aoti runs what was exported"):
        wanted_profile("cpu", {"backend": "aoti", "compiled": True, "attention": "sdpa", "kernels": None})
    with pytest.raises(InputError, match="backend"):
        wanted_profile("cpu", {"backend": "mlx"})


def test_an_engine_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Backend("onnx").facts
    assert backend_of(facts) == Backend("onnx")
    own = facts[FACT]
    with pytest.raises(InputError, match="exported by another version of this program; build the engine again"):
        backend_of({FACT: {**own, "programs": "0"}})


def test_tensors_are_those_of_the_engine_without_it(onnx: list[Path]) -> None:
    built = find_or_build(None, ONNX, say=lambda _: None)
    plain = find_or_build(None, CPU, say=lambda _: None)
    assert built != plain
    files = Manifest.read(built).files
    assert {name: file for name, file in files.items() if name.endswith(".safetensors")} == {
        name: file for name, file in Manifest.read(plain).files.items() if name.endswith(".safetensors")
    }
    for name in (name for name in files if name.endswith(".safetensors")):
        assert (built / name).samefile(plain / name)
    assert (built / "step.onnx").read_bytes() == b"a graph"
    assert find_or_build(None, ONNX, say=lambda _: None) == built
    assert len(onnx) == 1


def test_tensors_that_cannot_be_shared_are_written(onnx: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    built, plain = (find_or_build(None, profile, say=lambda _: None) for profile in (ONNX, CPU))
    assert (built / "dit.safetensors").read_bytes() == (plain / "dit.safetensors").read_bytes()
    assert not (built / "dit.safetensors").samefile(plain / "dit.safetensors")


def test_a_tensor_file_that_has_changed_is_not_taken(onnx: list[Path]) -> None:
    plain = find_or_build(None, CPU, say=lambda _: None)
    size = (plain / "vae.safetensors").stat().st_size
    draft = store.Draft(plain.with_name("other"), {})
    assert not draft.adopt("vae.safetensors", plain / "vae.safetensors", store.File(size + 1, ""))
    assert not (draft.folder / "vae.safetensors").exists()


def test_foreign_engines_are_trusted_by_word_alone(onnx: list[Path], tmp_path: Path) -> None:
    built = find_or_build(None, ONNX, say=lambda _: None)
    assert backend_at(built, "onnx", trusted=False) == Backend("onnx")
    assert built.is_relative_to(engines_folder())
    away = Path(shutil.copytree(built, tmp_path / "away"))
    with pytest.raises(InputError, match=f"{away}: exported engines are code that would run here.*--trust-engine"):
        backend_at(away, "onnx", trusted=False)
    with pytest.raises(InputError, match="--trust-engine"):
        Engine.load(away)
    assert backend_at(away, "onnx", trusted=True) == Backend("onnx")
    assert backend_at(away, "torch", trusted=False) == Backend()  # tensors are no code
    with pytest.raises(InputError, match="an engine for backend onnx; build one with --backend aoti"):
        backend_at(away, "aoti", trusted=True)
    (away / "step.onnx").write_bytes(b"a grapH")
    with pytest.raises(InputError, match=r"step\.onnx: damaged: its SHA-256 is not the manifest's"):
        Engine.load(away, trust_engine=True)


def test_a_preset_that_rounds_otherwise_is_not_what_was_exported(onnx: list[Path]) -> None:
    built = find_or_build(None, ONNX, say=lambda _: None)
    with pytest.raises(
        InputError, match=r"exported for diffusers-v1\.1, official-v1\.1 rounds otherwise; use --backend"
    ):
        Engine.load(built, variant="official-v1.1")


def test_keys_differ_by_backend_and_target() -> None:
    source = build.find_source(None)
    changes = (
        {},
        {"backend": "onnx"},
        {"backend": "aoti"},
        *({"backend": "tensorrt", "target": t} for t in ("sm_86", "sm_89")),
    )
    assert len({build.Order.of(source, CPU.changed(change), None).key for change in changes}) == 5
