"""Builds of the bundled model that are killed, and builds that race. Run by test_build.py with few, by hand with many:

    python tests/engine/disturbed_builds.py kills 200
    python tests/engine/disturbed_builds.py races 50

Processes are forked from one that has imported everything and runs one thread, so each takes a second or less.
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from step1x.engine import Engine
from step1x.engine.build import find_or_build
from step1x.engine.parts import load_engine_folder
from step1x.engine.store import Hashing, Manifest, engines_folder, faults
from step1x.profiles import load_profile

EVENTS = ("open", "fcntl.flock", "os.mkdir", "os.remove", "os.rename", "os.rmdir")
PROFILE = load_profile("cpu")


def build(say: Callable[[str], None] = lambda _: None) -> Path:
    return find_or_build(None, PROFILE, say=say)


def edited(folder: Path) -> str:
    """Digest of a picture that the engine edits."""
    source = Image.new("RGB", (64, 48), (200, 90, 30))
    done = Engine(load_engine_folder(folder, device="cpu")).edit(source, "make it darker", seed=1, steps=1, size=64)
    return hashlib.sha256(done.image.tobytes()).hexdigest()


class Moments:
    """Counts what a build does to files, a write as two halves, and dies at a moment."""

    def __init__(self, last: int | None) -> None:
        self.count, self._last = 0, last
        sys.addaudithook(self._hear)
        whole = Hashing.write

        def write(hashing: Hashing, data: bytes | memoryview, /) -> None:
            half = len(data) // 2
            self._pass()
            whole(hashing, data[:half])
            hashing._file.flush()
            self._pass()
            whole(hashing, data[half:])

        Hashing.write = write  # type: ignore[method-assign]

    def _hear(self, event: str, words: tuple[object, ...]) -> None:
        if event in EVENTS and (event == "fcntl.flock" or str(engines_folder()) in str(words[0])):
            self._pass()

    def _pass(self) -> None:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], int]) -> int:
    """A child that works and exits with the number that comes of it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def moments(damage: Callable[[], None]) -> int:
    """How many there are in a build."""
    damage()
    read, write = os.pipe()

    def count() -> int:
        found = Moments(None)
        build()
        os.write(write, str(found.count).encode())
        return 0

    os.waitpid(forked(count), 0)
    return int(os.read(read, 20))


def nothing() -> None:
    """No engine, and nothing of one."""
    shutil.rmtree(engines_folder(), ignore_errors=True)


def damaged() -> None:
    """An engine with one file cut and one gone."""
    nothing()
    folder = build()
    os.truncate(folder / "folded.safetensors", 1000)
    (folder / "config.json").unlink()


def killed_at(moment: int) -> bool:
    def work() -> int:
        Moments(moment)
        build()
        return 0

    _, status = os.waitpid(forked(work), 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def strays() -> list[str]:
    """What the engines' folder holds besides engines."""
    return [path.name for path in engines_folder().iterdir() if path.name.startswith(".")]


def kills(count: int) -> None:
    nothing()
    folder = build()
    whole, picture = Manifest.read(folder).files, edited(folder)
    done = 0
    for start, share in ((nothing, 0.75), (damaged, 0.25)):
        total, wanted = moments(start), round(count * share)
        points = [1 + index * total // wanted for index in range(wanted)]
        if wanted > 50:
            points = random.Random(0).sample(range(1, total + 1), wanted)
        for point in points:
            start()
            assert killed_at(point), point
            left = engines_folder() / folder.name
            if left.exists() and start is nothing:
                assert not faults(left, Manifest.read(left), hashes=True), point
            assert build() == folder
            assert Manifest.read(folder).files == whole, point
            assert not strays(), (point, strays())
            assert edited(folder) == picture, point
            done += 1
        print(f"{wanted} of {total} moments, from {start.__name__}", flush=True)
    print(f"{done} builds killed, each followed by a build of the same files and a picture of the same bytes")


def race() -> list[str]:
    """What two processes say that build one engine."""
    read, write = os.pipe()

    def work() -> int:
        def say(line: str) -> None:
            os.write(write, line.encode() + b"\n")

        return 0 if build(say).is_dir() else 1

    children = [forked(work), forked(work)]
    os.close(write)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    with os.fdopen(read) as file:
        return file.read().splitlines()


def races(count: int) -> None:
    build()  # imports what is imported late
    for _ in range(count):
        nothing()
        engines_folder().mkdir(parents=True, mode=0o700)
        said = [line.split()[0] for line in race()]
        assert said.count("building") == 1, said
        assert set(said) <= {"building", "another"}, said
        assert not strays(), strays()
        assert len(list(engines_folder().iterdir())) == 1
    print(f"{count} races of two processes, each made one engine")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="step1x-disturbed-") as caches:
        os.environ["XDG_CACHE_HOME"] = caches
        began = time.monotonic()
        {"kills": kills, "races": races}[sys.argv[1]](int(sys.argv[2]))
        print(f"{time.monotonic() - began:.0f} s")
