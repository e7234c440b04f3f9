"""Named settings: what an engine runs on and at which precision. One TOML file each, here or anywhere."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

__all__ = [
    "BackendName",
    "Branches",
    "Profile",
    "Residency",
    "Scheme",
    "Speed",
    "Weights",
    "load_profile",
    "profile_names",
]

FOLDER = Path(__file__).parent
MAX_BYTES = 1 << 16  # a profile is a page; more is some other file


# How weights are kept and multiplied (quant/schemes.py): in the profile's dtype, or quantised by a scheme.
Scheme = Literal["plain", "fp8", "fp8-weight", "int8", "int8-weight", "int4-weight", "nvfp4"]

Dtype = Literal["float32", "bfloat16", "float64"]  # float64: to prove something by
BackendName = Literal["torch", "aoti", "onnx", "tensorrt"]  # who computes the steps (engine/backends.py)
Branches = Literal["batched", "sequential"]  # the two forwards of guidance: at once, or one after the other
Speed = Literal["exact", "balanced", "fast", "turbo"]  # how much is left out (engine/presets.py)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Weights(_Table):
    """The scheme of each component."""

    dit: Scheme = "plain"  # what a denoise step reads: 8.66 of the released 12.4 billion parameters
    folded: Scheme = "plain"  # modulations: read once an edit
    text: Scheme = "plain"  # language model
    vision: Scheme = "plain"  # vision tower


class Residency(_Table):
    """Where weights are while they are not used. Streamed blocks arrive while the one before them runs."""

    dit: Literal["resident", "stream"] = "resident"  # stream: `stream_blocks` of its blocks, evenly spaced
    folded: Literal["resident", "host"] = "resident"  # host: copied once an edit, layer by layer
    text: Literal["resident", "evict", "stream"] = "resident"  # evict: brought as a whole, dropped after use
    vision: Literal["resident", "evict", "stream"] = "resident"
    vae: Literal["resident", "evict"] = "resident"
    stream_blocks: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _blocks_stream(self) -> Self:
        if (self.dit == "stream") != (self.stream_blocks > 0):
            raise ValueError("stream_blocks above 0 goes with dit = 'stream', and only with it")
        return self


class Profile(_Table):
    """What is fixed when a model is loaded. GB are 1e9 bytes."""

    name: str = Field(min_length=1)  # the file's, without .toml
    description: str
    device: str = Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")  # auto: cuda if there is one
    budget_gb: float = Field(default=0, ge=0, allow_inf_nan=False)  # of GPU memory, enforced; 0: no limit
    host_memory_gb: float = Field(default=0, ge=0, allow_inf_nan=False)  # of host memory; 0: no limit
    size: int = Field(default=1024, ge=16, le=8192)  # largest size level that the budget is planned for
    batch: int = Field(default=1, ge=1)  # largest batch, likewise
    capability: float = Field(default=0, ge=0, allow_inf_nan=False)  # least compute capability; 0: any
    dtype: Dtype  # of arithmetic, and of weights that are not quantised
    vae_dtype: Dtype
    weights: Weights = Weights()
    residency: Residency = Residency()
    kernels: Literal["auto", "on", "off"] = "auto"  # our own on a GPU: all but what loses on its chip, all, none
    attention: str = "auto"  # or a backend by name (kernels/attention_backends.py)
    fp8_attention: tuple[float, float] | None = None  # shares of the steps between which attention is 8-bit
    products: Literal["auto", "torch", "torchao"] = "auto"  # who multiplies quantised rows (quant/choice.py)
    branches: Branches | None = None  # None: the model's own choice
    kv_dtype: Literal["bfloat16", "float8"] = "bfloat16"  # of keys and values kept between steps
    speed: Speed = "exact"
    backend: BackendName = "torch"
    target: str = Field(default="", pattern=r"^(sm_\d{2,3})?$")  # GPU that TensorRT builds for; "": the one at hand
    compiled: bool = False  # compile the blocks when they first run
    strip_pixels: int = Field(default=1 << 21, ge=0)  # larger pictures: autoencoder in strips

    @property
    def quantises(self) -> bool:
        """Whether any weights are quantised."""
        return any(scheme != "plain" for scheme in self.weights.model_dump().values())

    def changed(self, values: Mapping[str, object]) -> Self:
        """With other values of some fields. Raises ValueError, one line, for an unknown field or a bad value."""
        try:
            return self.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            raise ValueError(f"profile {self.name!r}: {_first(error)}") from error

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.target and self.backend != "tensorrt":
            raise ValueError(f"target is for backend tensorrt; {self.backend} builds for the machine at hand")
        return self

    @field_validator("fp8_attention", mode="before")
    @classmethod
    def _as_pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples

    @field_validator("fp8_attention")
    @classmethod
    def _is_stretch(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < value[1] <= 1:
            raise ValueError("must be two shares of the steps, 0 <= first < last <= 1")
        return value


def profile_names() -> list[str]:
    """The profiles that ship, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


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
        raise ValueError(f"{where}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    """What is wrong first; an unknown key before all: it is most often the misspelt twin of a missing one."""
    first = min(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg'].lower()}"
    tables: dict[str, type[BaseModel]] = {"weights": Weights, "residency": Residency}
    known = tables.get(str(first["loc"][0]), Profile).model_fields
    return f"unknown key {key!r}; known: {', '.join(known)}"
