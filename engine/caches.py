"""The folder for what can be made again. Some of it is code, some says what people wrote: it is theirs alone."""

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from step1x.engine.errors import InputError


def cache_folder() -> Path:
    """XDG_CACHE_HOME or ~/.cache, as the XDG base directory specification has it, and our name."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "step1x-engine"


def make_private(folder: Path) -> None:
    """Makes a folder that only its owner may enter. Raises OSError if it cannot be, or is one others may write to."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o022:
        raise PermissionError(0, "others may write to it")


def files(folder: Path) -> dict[Path, int]:
    """All files below a folder and their bytes; those that vanish meanwhile are left out."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            facts = path.lstat()
            if stat.S_ISREG(facts.st_mode):
                found[path] = facts.st_size
    return found


def remove(folder: Path) -> None:
    """Removes a folder and all below it, if it is there. Raises InputError for what may not be removed."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be removed: {(error.strerror or str(error)).lower()}") from error
