"""Engine folders on disk: when one is whole, and how it appears whole or not at all.

`manifest.json` says what an engine was made of and by what (`facts`, whose digest is its key), and lists each file with
size and SHA-256. It ends with a seal, the SHA-256 of all that stands before it, so an edited one is seen at once.

An engine is made in a folder beside its place whose manifest lists what is finished, and which takes that place when
everything is. A process that dies leaves no engine or a whole one, and the next goes on where it ended. A file lock
keeps a second process waiting meanwhile; the kernel frees it when its owner dies.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Self

from step1x.engine.caches import cache_folder, files, make_private, remove
from step1x.engine.checkpoint import Sink, read_json
from step1x.engine.errors import InputError

Say = Callable[[str], None]

MANIFEST = "manifest.json"
SEAL = "seal"
COMPILED = "compiled"  # a folder for the compiler's cache: it fills while the engine runs, so no manifest lists it
PROCESSOR = "processor"  # a folder that libraries read by looking what is in it
TENSORS = ".safetensors"
POLL_SECONDS = 0.1
DAY = 86400.0  # seconds


class File(NamedTuple):
    """What a manifest says of a file."""

    size: int  # bytes
    sha256: str


def canonical(value: object) -> bytes:
    """JSON of which equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything an engine's bytes depend on, and the files it consists of, by path below its folder."""

    facts: Mapping[str, Any]
    files: Mapping[str, File]

    @property
    def key(self) -> str:
        """The engine's name in the cache: 64 hexadecimal digits."""
        return hashlib.sha256(canonical(self.facts)).hexdigest()

    def text(self) -> bytes:
        """The file's content."""
        values: dict[str, Any] = {
            "facts": dict(self.facts),
            "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in self.files.items()},
        }
        return json.dumps({**values, SEAL: _seal(values)}, indent=1).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of an engine folder. Raises InputError if there is none, or one that its seal does not fit."""
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(f"{folder}: no engine here: {MANIFEST} is missing")
        values = read_json(path)
        if values.pop(SEAL, None) != _seal(values):
            raise InputError(f"{path}: damaged or edited: its seal does not fit")
        try:
            found = {name: File(int(facts["size"]), str(facts["sha256"])) for name, facts in values["files"].items()}
            made = cls(dict(values["facts"]), found)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: not the manifest of an engine") from None
        for name in made.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise InputError(f"{path}: {name!r} is no path below the engine's folder")
        return made


def _seal(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(values)).hexdigest()


def engines_folder() -> Path:
    """Where engines are kept, each in a folder named by its key."""
    return cache_folder() / "engines"


def opened(folder: Path) -> Manifest:
    """The manifest of an engine that may be loaded: nobody else can have written it, and no file is missing or damaged
    (`faults`).

    Raises InputError, one line that names the first fault.
    """
    folder = folder.resolve()
    if folder.is_dir():
        check_private(folder)
    manifest = Manifest.read(folder)
    for name, fault in faults(folder, manifest).items():
        raise InputError(f"{folder / name}: {fault}; `step1x-engine build` makes it again")
    return manifest


def check_private(folder: Path) -> None:
    """Raises InputError if anybody but the user and root can write to an engine folder or to its files."""
    for path in (folder, *folder.glob("*"), *(folder / PROCESSOR).glob("*")):
        try:
            facts = path.lstat()
        except FileNotFoundError:  # another process makes it again
            continue
        loose = stat.S_IMODE(facts.st_mode) & 0o022 and not stat.S_ISLNK(facts.st_mode)
        if facts.st_uid not in (0, os.getuid()) or loose:
            raise InputError(f"{path}: others may write to it; nothing is loaded from there")


def faults(folder: Path, manifest: Manifest, *, hashes: bool = False) -> dict[str, str]:
    """What is wrong with the files of an engine, by name; nothing if it is whole.

    Sizes are always compared, hashes of all but the tensors too; hashes: of those as well.
    """
    found = {}
    for name, wanted in manifest.files.items():
        fault = _fault(folder / name, wanted, hashes or not name.endswith(TENSORS))
        if fault:
            found[name] = fault
    for path in sorted((folder / PROCESSOR).glob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files:
            found[name] = "not in the manifest"
    return found


def _fault(path: Path, wanted: File, hashed: bool) -> str:
    try:
        facts = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    if not stat.S_ISREG(facts.st_mode):
        return "not a regular file"
    if facts.st_size != wanted.size:
        return f"damaged: {facts.st_size:,} bytes instead of {wanted.size:,}"
    if hashed:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted.sha256:
                return "damaged: its SHA-256 is not the manifest's"
    return ""


def set_aside(place: Path, damaged: Sequence[str]) -> None:
    """Takes the damaged files out of an engine and makes it unfinished again. Raises OSError."""
    draft = _draft(place)
    remove(draft)
    for name in damaged:
        _remove(place / name)
    place.rename(draft)


def _remove(path: Path) -> None:
    """A file, a link, or a folder and all below it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        remove(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _draft(place: Path) -> Path:
    return place.with_name(f".{place.name}.partial")


def _lock(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


@contextmanager
def locked(place: Path, say: Say | None) -> Iterator[bool]:
    """One process at a time works at the engine at `place`: True where this is it.

    `say` is told when another must be waited for; without it nothing is waited for, and False says so.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(_lock(place))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if say is None:
            yield False
            return
        say(f"another process is making {place}: waiting for it")
        lock.acquire(poll_interval=POLL_SECONDS)
    try:
        yield True
    finally:
        _lock(place).unlink(missing_ok=True)  # while it is held: who waits sees that it is gone, and makes another
        lock.release()


def drop_stale_lock(place: Path) -> None:
    """Removes the lock file of a process that died when its engine was whole, if it can be."""
    if _lock(place).exists():
        with suppress(OSError), locked(place, None):
            pass


class Hashing:
    """Writes to a file and digests what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview, /) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._size += len(data)

    def written(self) -> File:
        return File(self._size, self._sha256.hexdigest())


class Draft:
    """An engine in the making, by the process that holds its lock."""

    def __init__(self, place: Path, facts: Mapping[str, Any]) -> None:
        """Takes up what others have finished of the same engine, and removes the rest they left. Raises OSError."""
        self._place = place
        self._folder = _draft(place)
        self._facts = facts
        make_private(self._folder)
        self._finished = self._taken_up()
        self._sweep()

    def _taken_up(self) -> dict[str, File]:
        try:
            manifest = Manifest.read(self._folder)
        except InputError:
            return {}
        if manifest.facts != self._facts:
            return {}
        bad = faults(self._folder, manifest)
        return {name: file for name, file in manifest.files.items() if name not in bad}

    def _sweep(self) -> None:
        """Removes what is not finished."""
        for path in sorted(self._folder.rglob("*"), reverse=True):  # what is in a folder, before the folder
            name = path.relative_to(self._folder).as_posix()
            folder = path.is_dir() and not path.is_symlink()
            if folder and not any(path.iterdir()):
                path.rmdir()
            elif not folder and name not in (*self._finished, MANIFEST):
                path.unlink()

    def __contains__(self, name: str) -> bool:
        """Whether a file is finished."""
        return name in self._finished

    def write(self, name: str, fill: Callable[[Sink], object]) -> None:
        """Makes a file of what `fill` writes. It is finished when its hash is in the manifest."""
        path = self._folder / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            self._finished[name] = _written(path, fill)
        except BaseException:
            path.unlink(missing_ok=True)  # a full disk gets its room back
            raise
        self._note()

    def adopt(self, name: str, source: Path, file: File) -> bool:
        """Makes a file of another engine one of this, without copying; False: it cannot be on this disk, or is gone."""
        path = self._folder / name
        try:
            path.hardlink_to(source)
        except OSError:
            return False
        if path.stat().st_size != file.size:
            path.unlink()
            return False
        self._finished[name] = file
        self._note()
        return True

    @property
    def folder(self) -> Path:
        """Where the files are that are finished."""
        return self._folder

    def _note(self) -> None:
        content = Manifest(self._facts, self._finished).text()
        path = self._folder / MANIFEST
        temporary = path.with_name(f".{MANIFEST}")
        _written(temporary, lambda file: file.write(content))
        os.replace(temporary, path)
        _sync(self._folder)

    def publish(self) -> None:
        """The engine appears in its place, which is free or an empty folder."""
        (self._folder / COMPILED).mkdir(mode=0o700, exist_ok=True)
        self._folder.rename(self._place)
        _sync(self._place.parent)


def _written(path: Path, fill: Callable[[Sink], object]) -> File:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        hashing = Hashing(file)
        fill(hashing)
        file.flush()
        os.fsync(file.fileno())
    return hashing.written()


def _sync(folder: Path) -> None:
    """Lets names in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """An engine in the cache."""

    folder: Path
    size: int  # bytes, with what the compiler keeps there
    built: float  # seconds since 1970
    manifest: Manifest | None  # None: damaged, missing, or others may write to it

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def days(self) -> float:
        """Since it was built."""
        return max(time.time() - self.built, 0) / DAY


def engines() -> list[Kept]:
    """The engines in the cache, the oldest first."""
    root, found = engines_folder(), []
    for folder in _folders(root):
        if folder.name.startswith("."):
            continue
        manifest = None
        with suppress(InputError):
            check_private(folder)
            manifest = Manifest.read(folder)
        built = (folder / MANIFEST if manifest else folder).stat().st_mtime
        found.append(Kept(folder=folder, size=sum(files(folder).values()), built=built, manifest=manifest))
    return sorted(found, key=lambda one: one.built)


def _folders(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []


def prune(unwanted: Callable[[Kept], bool]) -> int:
    """Removes engines, and what unfinished builds have left; what a process is making stays. Returns bytes removed.

    Raises InputError for what may not be removed.
    """
    root, gone = engines_folder(), 0
    for one in engines():
        if unwanted(one):
            with locked(one.folder, None) as free:
                if free:
                    set_aside(one.folder, ())
    hidden = {path.name for path in root.glob(".*")} if root.is_dir() else set()
    for name in sorted({name[1:].removesuffix(".partial").removesuffix(".lock") for name in hidden}):
        with locked(root / name, None) as free:
            if free:
                gone += sum(files(_draft(root / name)).values())
                remove(_draft(root / name))
    return gone
