"""The profile that a word stands for: a name, a .toml file, or "auto" for the one that suits model and device."""

from collections.abc import Mapping
from pathlib import Path

from step1x.engine.errors import InputError
from step1x.profiles import Profile, load_profile

AUTO = "auto"


def named_profile(
    word: str | Path, model: str | Path | None = None, changes: Mapping[str, object] | None = None
) -> Profile:
    """The profile. Raises InputError, one line, for one that is not there or not right, and if "auto" finds none.

    model, changes: what "auto" is planned for, and what will differ from the profile; of these `device` says for which
    device of this machine.
    """
    changes = changes or {}
    try:
        if word != AUTO:
            return load_profile(word)
        from step1x.engine.auto_profile import for_device

        return load_profile(for_device(str(changes.get("device", AUTO)), model, changes))
    except ValueError as error:
        raise InputError(str(error)) from error
