"""Cache folders of our own, so that what lies in the user's changes nothing that is measured."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from step1x.engine.caches import cache_folder, make_private
from step1x.engine.errors import InputError

CHANGED = ("XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR")  # the last by executor.keep_compiled


@contextmanager
def own_cache(*, engines: bool = False) -> Iterator[Path]:
    """XDG_CACHE_HOME is a temporary folder, for this process and those that it starts.

    engines: the user's built engines are used, and kept there if they are built now. What was fetched from the Hub is
    the user's choice of a model, no cache of ours: it stays where it is. Raises InputError if the user's folder of
    engines cannot be used.
    """
    before = {name: os.environ.get(name) for name in CHANGED}
    users = cache_folder()
    with TemporaryDirectory(prefix="step1x-cache-") as folder:
        if engines:
            _link(users / "engines", Path(folder) / users.name / "engines")
        os.environ.setdefault("HF_HOME", str(users.parent / "huggingface"))
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _link(users: Path, ours: Path) -> None:
    try:
        make_private(users)
    except OSError as error:
        raise InputError(f"{users}: no engine can be kept there: {(error.strerror or str(error)).lower()}") from error
    make_private(ours.parent)
    ours.symlink_to(users, target_is_directory=True)
