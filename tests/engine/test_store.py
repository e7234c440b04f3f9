import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from step1x.engine import store
from step1x.engine.checkpoint import Sink
from step1x.engine.errors import InputError
from step1x.engine.store import MANIFEST, Draft, Manifest

FACTS = {"source": {"name": "a"}, "profile": "cpu", "versions": {}}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of an engine in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.engines_folder().mkdir(parents=True, mode=0o700)
    return store.engines_folder() / Manifest(FACTS, {}).key


def putting(content: bytes) -> Callable[[Sink], object]:
    return lambda file: file.write(content)


def made(place: Path) -> Manifest:
    draft = Draft(place, FACTS)
    draft.write("a.safetensors", putting(b"tensors"))
    draft.write("processor/b.json", putting(b"{}"))
    draft.publish()
    return Manifest.read(place)


def test_an_engine_appears_with_its_hashes(place: Path) -> None:
    manifest = made(place)
    assert manifest.facts == FACTS
    assert manifest.key == place.name
    # printf tensors | sha256sum
    wanted = "26cc73f9fbf623d9a49bbf3f3d88f70195f2de68d7f25b5161f6700e6644cf44"
    assert manifest.files["a.safetensors"] == (7, wanted)
    assert store.opened(place) == manifest
    assert sorted(path.name for path in place.iterdir()) == ["a.safetensors", "compiled", MANIFEST, "processor"]
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (place, *place.rglob("*")))


def test_what_is_finished_stays(place: Path) -> None:
    first = Draft(place, FACTS)
    first.write("a.safetensors", putting(b"tensors"))

    def fails(file: Sink) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        first.write("c.safetensors", fails)
    folder = place.with_name(f".{place.name}.partial")
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", MANIFEST]
    (folder / "half").write_text("of a process that was killed")
    (folder / "processor").mkdir()
    (folder / "processor" / "half").write_text("")
    again = Draft(place, FACTS)
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", MANIFEST]
    assert "a.safetensors" in again
    assert "c.safetensors" not in again
    os.truncate(folder / "a.safetensors", 3)
    cut = Draft(place, FACTS)
    assert "a.safetensors" not in cut
    cut.write("a.safetensors", putting(b"tensors"))
    assert "a.safetensors" not in Draft(place, {**FACTS, "profile": "other"})
    assert [path.name for path in folder.iterdir()] == [MANIFEST]


def test_a_manifest_that_was_edited_is_seen(place: Path) -> None:
    made(place)
    path = place / MANIFEST
    whole = path.read_bytes()
    values = json.loads(whole)
    for part in ("facts", "files", "seal"):
        path.write_text(json.dumps({**values, part: {}}))
        with pytest.raises(InputError, match=r"manifest\.json: damaged or edited"):
            store.opened(place)
    for content in (b"", b"[]", whole[:-20], b"\xff" + whole):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"manifest\.json: not"):
            store.opened(place)
    path.unlink()
    with pytest.raises(InputError, match=r"no engine here: manifest\.json is missing"):
        store.opened(place)
    with pytest.raises(InputError, match="no engine here"):
        store.opened(place / "nowhere")


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../b"])
def test_a_manifest_names_nothing_outside(place: Path, name: str) -> None:
    files = made(place).files
    (place / MANIFEST).write_bytes(Manifest(FACTS, {name: files["a.safetensors"]}).text())
    with pytest.raises(InputError, match="no path below the engine's folder"):
        store.opened(place)
    (place / MANIFEST).write_bytes(Manifest({}, files).text().replace(b'"size"', b'"length"'))
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        store.opened(place)


def damages() -> dict[str, tuple[str, Callable[[Path], object], str]]:
    def linked(path: Path) -> None:
        path.rename(path.with_name("elsewhere"))
        path.symlink_to(path.with_name("elsewhere"))

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    return {
        "cut": ("a.safetensors", lambda path: os.truncate(path, 3), "damaged: 3 bytes instead of 7"),
        "grown": ("a.safetensors", lambda path: path.write_bytes(b"tensors!"), "damaged: 8 bytes instead of 7"),
        "gone": ("a.safetensors", Path.unlink, "missing"),
        "a link": ("a.safetensors", linked, "not a regular file"),
        "a folder": ("a.safetensors", folder, "not a regular file"),
        "another": ("processor/b.json", lambda path: path.write_bytes(b"[]"), "damaged: its SHA-256"),
        "one more": ("processor/c.json", lambda path: path.write_bytes(b"[]"), "not in the manifest"),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_named(place: Path, damage: str) -> None:
    manifest = made(place)
    name, spoil, words = damages()[damage]
    spoil(place / name)
    found = store.faults(place, manifest)
    assert list(found) == [name]
    assert words in found[name]
    with pytest.raises(InputError, match=rf"{name}: {words}.*; `step1x-engine build` makes it again"):
        store.opened(place)
    # What is left of it is taken up by the next build.
    store.set_aside(place, list(found))
    assert not place.exists()
    draft = Draft(place, FACTS)
    assert name not in draft
    assert ("a.safetensors" in draft) is (name != "a.safetensors")


def test_other_bytes_of_one_size_are_seen_by_hash(place: Path) -> None:
    manifest = made(place)
    (place / "a.safetensors").write_bytes(b"Tensors")
    assert not store.faults(place, manifest)
    assert list(store.faults(place, manifest, hashes=True)) == ["a.safetensors"]
    (place / "processor" / "b.json").write_bytes(b"[]")  # all but tensors are small, and always hashed
    assert list(store.faults(place, manifest)) == ["processor/b.json"]


@pytest.mark.parametrize("name", ["", "a.safetensors", MANIFEST, "processor", "processor/b.json", "compiled"])
def test_what_others_may_write_to_is_refused(place: Path, name: str) -> None:
    made(place)
    path = place / name
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(InputError, match=f"{path}: others may write to it; nothing is loaded from there"):
        store.opened(place)


def test_one_at_a_time(place: Path) -> None:
    said: list[str] = []
    with store.locked(place, said.append) as mine:
        assert mine
        with store.locked(place, None) as other:
            assert not other
    assert not said
    assert not list(place.parent.iterdir())


def test_engines_are_listed_and_pruned(place: Path) -> None:
    assert store.engines() == []
    made(place)
    other = place.with_name("0" * 64)
    other.mkdir(mode=0o700)
    old = time.time() - 10 * store.DAY
    os.utime(place / MANIFEST, (old, old))
    kept = store.engines()
    assert [(one.key, one.manifest is None) for one in kept] == [(place.name, False), (other.name, True)]
    assert kept[0].days == pytest.approx(10, abs=0.1)
    assert kept[0].size == sum(path.stat().st_size for path in place.rglob("*") if path.is_file())

    place.chmod(0o777)
    assert [one.manifest is None for one in store.engines()] == [True, True]
    place.chmod(0o700)

    draft = Draft(place.with_name("1" * 64), FACTS)  # of a process that died
    draft.write("a", putting(b"1234"))
    busy = place.with_name("2" * 64)
    Draft(busy, FACTS).write("a", putting(b"1234"))
    with store.locked(busy, None):
        store.prune(lambda _: False)
        names = {path.name for path in place.parent.iterdir()}
        assert names == {place.name, other.name, f".{busy.name}.partial", f".{busy.name}.lock"}
    assert store.prune(lambda one: one.days > 5) > 100
    assert [one.key for one in store.engines()] == [other.name]
    store.prune(lambda _: True)
    assert not list(place.parent.iterdir())
