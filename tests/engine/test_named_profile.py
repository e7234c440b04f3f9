"""Names, files, and the machine's own; what is in a file is for tests/profiles."""

from pathlib import Path

import pytest
import torch

from step1x.engine.errors import InputError
from step1x.engine.named_profile import named_profile
from step1x.profiles import load_profile


def test_auto_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it: test_auto_profile.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named_profile("auto") == named_profile("auto", None, {"device": "cuda:1"}) == load_profile("cpu")


def test_by_name_or_file(tmp_path: Path) -> None:
    assert named_profile("fp8-18gb") == load_profile("fp8-18gb")
    own = tmp_path / "own.toml"
    own.write_text("description = ''\ndevice = 'cpu'\ndtype = 'float32'\nvae_dtype = 'float32'\n")
    assert named_profile(own).name == "own"
    for word, message in (("fp9", "unknown profile 'fp9'"), (tmp_path / "none.toml", "no such file")):
        with pytest.raises(InputError, match=message):
            named_profile(word)
