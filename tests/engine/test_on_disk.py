"""What a power cut may not undo: bytes reach the disk before they get their name, and a name before it is relied on."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from step1x.engine import checkpoint, store
from step1x.engine.embeddings import EmbeddingCache
from step1x.engine.picture import save_picture
from step1x.engine.store import MANIFEST, Draft, Manifest
from step1x.training import state


class Events:
    """What was synced and what was named, in order."""

    def __init__(self) -> None:
        self._found: list[tuple[str, int]] = []  # with the number of the file
        self._names: dict[int, str] = {}

    def sync(self, number: int) -> None:
        self._found.append(("sync", number))

    def name(self, number: int, name: str) -> None:
        self._names[number] = name
        self._found.append(("name", number))

    def of(self, *paths: Path) -> list[tuple[str, str]]:
        """With the last names of files; those that were not given one are among `paths`."""
        names = {path.stat().st_ino: path.name for path in paths} | self._names
        return [(what, names.get(number, "another file")) for what, number in self._found]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    found = Events()

    def sync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        real(descriptor)
        found.sync(os.fstat(descriptor).st_ino)

    def naming(real: Callable[..., None]) -> Callable[..., None]:
        def name(source: str | Path, target: str | Path, **options: bool) -> None:
            number = os.stat(source).st_ino
            real(source, target, **options)
            found.name(number, Path(target).name)

        return name

    monkeypatch.setattr(os, "fsync", sync)
    for call in ("replace", "rename", "link"):
        monkeypatch.setattr(os, call, naming(getattr(os, call)))
    return found


def test_an_engine(events: Events, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = {"source": {"name": "a"}}
    place = store.engines_folder() / Manifest(facts, {}).key
    place.parent.mkdir(parents=True, mode=0o700)
    draft = Draft(place, facts)
    draft.write("a.safetensors", lambda file: file.write(b"tensors"))
    draft.publish()
    # the draft's folder has the engine's name by now
    assert events.of(place / "a.safetensors", place, place.parent) == [
        ("sync", "a.safetensors"),
        ("sync", MANIFEST),
        ("name", MANIFEST),
        ("sync", place.name),
        ("name", place.name),
        ("sync", place.parent.name),
    ]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_picture(events: Events, tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "a.png"
    save_picture(Image.new("RGB", (8, 8)), path, overwrite=overwrite)
    assert events.of(path)[-2:] == [("sync", "a.png"), ("name", "a.png")]


def test_an_embedding(events: Events, tmp_path: Path) -> None:
    EmbeddingCache(tmp_path).put("key", {"tokens": torch.ones(2)})
    (path,) = tmp_path.iterdir()
    assert events.of(path) == [("sync", path.name), ("name", path.name)]


def test_a_state_of_training(events: Events, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    state.save(path, {"step": 1})
    assert events.of(path) == [("sync", "state.pt"), ("name", "state.pt")]


def test_a_file_of_tensors(events: Events, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, [checkpoint.Planned("one", "F32", (2,), lambda: torch.ones(2))])
    assert events.of(path) == [("sync", "a.safetensors")]
