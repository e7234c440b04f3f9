"""The profile that a word stands for: a name, a .toml file, or "auto" for the one that suits this machine."""

from pathlib import Path

from step1x.engine.errors import InputError
from step1x.profiles import Profile, default_profile, load_profile, profile_for

AUTO = "auto"


def named_profile(word: str | Path) -> Profile:
    """The profile. Raises InputError, one line, for one that is not there or not right."""
    try:
        return load_profile(_for_this_machine() if word == AUTO else word)
    except ValueError as error:
        raise InputError(str(error)) from error


def _for_this_machine() -> str:
    """The profile for the first GPU, or for none."""
    import torch

    if not torch.cuda.is_available():
        return default_profile(cuda=False)
    card = torch.cuda.get_device_properties(0)
    return profile_for(card.total_memory / 1e9, float(f"{card.major}.{card.minor}"))
