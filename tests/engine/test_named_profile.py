"""Names, files, and the machine's own; what is in a file is for tests/profiles."""

from pathlib import Path

import pytest
import torch

from step1x.engine.errors import InputError
from step1x.engine.named_profile import named_profile
from step1x.profiles import load_profile


@pytest.mark.parametrize(
    ("card", "name"),
    [(None, "cpu"), ((85e9, 9, 0), "bf16-80gb"), ((24e9, 8, 6), "int8-24gb"), ((8e9, 8, 9), "int4-12gb")],
)
def test_auto_is_by_the_card(card: tuple[float, int, int] | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory, major, minor = card or (0, 0, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert named_profile("auto") == load_profile(name)


def test_by_name_or_file(tmp_path: Path) -> None:
    assert named_profile("fp8-18gb") == load_profile("fp8-18gb")
    own = tmp_path / "own.toml"
    own.write_text("description = ''\ndevice = 'cpu'\ndtype = 'float32'\nvae_dtype = 'float32'\n")
    assert named_profile(own).name == "own"
    for word, message in (("fp9", "unknown profile 'fp9'"), (tmp_path / "none.toml", "no such file")):
        with pytest.raises(InputError, match=message):
            named_profile(word)
