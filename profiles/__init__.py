"""Named settings: what an engine runs on and at which precision. One TOML file each, here or anywhere."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["Profile", "default_profile", "load_profile", "profile_names"]

FOLDER = Path(__file__).parent
MAX_BYTES = 1 << 16  # a profile is a page; more is some other file


class Profile(BaseModel):
    """What is fixed when a model is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)  # the file's, without .toml
    description: str
    device: str = Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")  # auto: cuda if there is one
    dtype: Literal["float32", "bfloat16"]  # of the transformer, the connector and the text model
    vae_dtype: Literal["float32", "bfloat16"]
    kernels: Literal["auto", "on", "off"] = "auto"  # our own on a GPU: those measured to be faster, all, none
    attention: str = "auto"  # or a backend by name (kernels/attention_backends.py)
    compiled: bool = False  # compile the blocks when they first run
    host_modulation: bool = False  # keep the parameters of modulations in host memory, used once an edit
    strip_pixels: int = Field(default=1 << 21, ge=0)  # larger pictures: autoencoder in strips
    device_memory_gb: int = Field(default=0, ge=0)  # of the GPU that it is meant for; 0: any


def profile_names() -> list[str]:
    """The profiles that ship, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def default_profile(*, cuda: bool) -> str:
    """The profile to use when none is asked for."""
    return "bf16-80gb" if cuda else "cpu"


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by its name, or one in a TOML file by its path (which ends in .toml).

    Raises ValueError, one line, for an unknown name, an unreadable file, an unknown key or a bad value.
    """
    text = str(name_or_path)
    if text in profile_names():
        return _read(FOLDER / f"{text}.toml")
    if not text.endswith(".toml"):
        known = ", ".join(profile_names())
        raise ValueError(f"unknown profile {text!r}; known: {known}; or the path of a .toml file")
    return _read(Path(text))


def _read(path: Path) -> Profile:
    where = f"profile {str(path)!r}"
    try:
        if not path.is_file():
            raise ValueError(f"{where}: no such file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{where}: larger than {MAX_BYTES} bytes; is it a profile?")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: not TOML: {error}") from error
    try:
        return Profile.model_validate({"name": path.stem, **values})
    except ValidationError as error:
        # An unknown key first: it is most often the misspelt twin of a missing one.
        first = min(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(Profile.model_fields)}") from error
        raise ValueError(f"{where}: {key}: {first['msg'].lower()}") from error
