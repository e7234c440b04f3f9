"""Who computes the steps of an engine, and the halves of its autoencoder: PyTorch, or what export/ made of them.

The one file of engine/ that knows export/, which builds on all the rest of engine/; it is imported where it is needed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, get_args

from step1x.engine.errors import InputError
from step1x.engine.store import Manifest, engines_folder
from step1x.profiles import BackendName, Profile

if TYPE_CHECKING:
    from torch import Tensor

    from step1x.engine.denoise import Runner
    from step1x.engine.engine_config import EngineConfig
    from step1x.engine.weights import Components
    from step1x.export.core import Inputs, RowsInputs, RowsOutputs
    from step1x.export.exported import Fill

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
HOLLOW = ("onnx", "tensorrt")  # their engines hold the blocks' weights or read them themselves
PROGRAMS = ("dit", "fused", "kept", "vae")  # modules of engine/ that decide what a graph is
FACT = "backend"  # of a manifest


class Exported(Protocol):
    """Entries of an exported engine (export/core.py), as functions of tensors on one device."""

    def step(self, inputs: "Inputs") -> "Tensor": ...
    def rows(self, inputs: "RowsInputs") -> "RowsOutputs": ...
    def encode(self, pixels: "Tensor") -> "Tensor": ...
    def decode(self, latents: "Tensor") -> "Tensor": ...


@dataclass(frozen=True, slots=True)
class Backend:
    """One of BACKENDS. target: the GPU that TensorRT builds for, such as sm_89; library: by which of its libraries."""

    name: BackendName = "torch"
    target: str = ""
    library: str = ""

    @classmethod
    def of(cls, profile: Profile) -> Self:
        """What a profile asks for. Raises InputError for what cannot be together."""
        name = profile.backend
        if name == "torch":
            return cls()
        if profile.residency.dit != "resident":
            raise InputError(
                f"profile {profile.name} streams the transformer's blocks, which backend torch alone can; "
                "take a profile that keeps them on the device"
            )
        if name != "tensorrt":
            return cls(name)
        from step1x.engine.parts import architecture
        from step1x.export.tensorrt_library import library_for

        here = architecture("cuda")
        target = profile.target or here
        if target == "none":
            raise InputError("there is no GPU here to build for; name one, such as --target sm_89")
        return cls(name, target, library_for(target, here).name)

    @property
    def facts(self) -> dict[str, Any]:
        """For a manifest. Empty for PyTorch, whose engines are weights alone."""
        if self.name == "torch":
            return {}
        root = Path(__file__).parents[1]
        sources = [*(root / "engine" / f"{name}.py" for name in PROGRAMS), *sorted((root / "export").glob("*.py"))]
        programs = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        return {FACT: {"name": self.name, "target": self.target, "library": self.library, "programs": programs}}

    def files(self, config: "EngineConfig", profile: Profile, folder: Path) -> "Iterator[tuple[str, Fill]]":
        """Name and content of what an exported engine holds besides the tensors, which are in `folder` already."""
        if self.name == "torch":
            return
        from step1x.export.exported import files

        yield from files(self, config, profile, folder)


def backend_at(folder: Path, wanted: BackendName, *, trusted: bool) -> Backend:
    """What is to run the engine in a folder. trusted: it may be of another place than the user's cache.

    Raises InputError for one that was not exported so, by other versions, or in a place that is not trusted.
    """
    if wanted == "torch":
        return Backend()
    try:
        made = backend_of(Manifest.read(folder).facts)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    if made.name != wanted:
        raise InputError(f"{folder}: an engine for backend {made.name}; build one with --backend {wanted}")
    if not trusted and not folder.resolve().is_relative_to(engines_folder().resolve()):
        raise InputError(
            f"{folder}: exported engines are code that would run here, and this one is not in your cache; "
            "--trust-engine loads it"
        )
    return made


def with_exported(components: "Components", backend: Backend, folder: Path) -> "Components":
    """A model that runs as it was exported to its folder. Raises InputError for what this machine cannot run."""
    if backend.name == "torch":
        return components
    from step1x.engine.engine_config import CONFIG, EngineConfig
    from step1x.export.exported import opened, take_halves

    own, wanted = EngineConfig.read(folder / CONFIG).variant(), components.variant
    if (own.dtype_flow == "pure") != (wanted.dtype_flow == "pure"):
        raise InputError(f"{folder}: exported for {own.name}, {wanted.name} rounds otherwise; use --backend torch")
    found = opened(backend, folder, components.dit, components.vae)
    take_halves(found, components.vae)
    return replace(components, exported=found)


def exported_runner(exported: Exported, plain: "Runner | None") -> "Runner":
    """Steps as they were exported. plain: for text to image."""
    from step1x.export.exported import runner_of

    return runner_of(exported, plain)


def backend_of(facts: Mapping[str, Any]) -> Backend:
    """What the engine of a manifest was exported for. Raises InputError if another version of this program did it."""
    made = facts.get(FACT)
    if made is None:
        return Backend()
    found = Backend(made["name"], made["target"], made["library"])
    if found.facts != {FACT: made}:
        raise InputError("exported by another version of this program; build the engine again")
    return found
