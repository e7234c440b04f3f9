"""A model and a profile -> an engine folder: every tensor read once, quantised layer by layer, one layer in memory.

What an engine was made of decides its key, and so its place in the cache: another source, profile, version or GPU is
another engine. `store` makes it appear whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from step1x.engine import released, store
from step1x.engine.backends import Backend
from step1x.engine.caches import make_private
from step1x.engine.checkpoint import (
    Checkpoint,
    Planned,
    Sink,
    digest,
    dtype_name,
    in_order,
    tensor_files,
    write_to,
)
from step1x.engine.convert import TEXT_FILES
from step1x.engine.engine_config import CONFIG, EngineConfig
from step1x.engine.errors import InputError
from step1x.engine.folder import ModelFolder, locate
from step1x.engine.layouts import Target
from step1x.engine.parts import (
    NETWORKS,
    PARTS,
    PLAN,
    PROFILE,
    Network,
    Part,
    architecture,
    networks,
    plain_networks,
    versions,
)
from step1x.engine.planner import Plan, plan
from step1x.engine.planner import check as check_plan
from step1x.engine.progress import Progress
from step1x.engine.qwen import model_key
from step1x.engine.save import check_room
from step1x.engine.store import MANIFEST, PROCESSOR, Draft, Manifest, Say, engines_folder, locked
from step1x.engine.text import Conditioner, load_processor
from step1x.engine.weights import assemble, check, check_fit, dit_targets, renamed, shapes, text_digest, vae_targets
from step1x.kernels.launch import EXCEPTIONS, nearest
from step1x.profiles import Profile
from step1x.quant.linear import QuantizedLinear, quantise
from step1x.quant.schemes import Scheme

Read = Callable[[Network, str, torch.dtype], Tensor]  # a tensor by its key in our module, on the CPU
CPU = torch.device("cpu")
RANDOM_STD = 0.02  # of trained weights, about
MB = 1_000_000


class Source(Protocol):
    """What an engine is made of."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str:
        """Of the weights."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def processor(self) -> Path:
        """The folder of the tokenizer and the picture processor."""

    def reader(self) -> Read:
        """What reads the tensors, once it is sure that all are there. Raises InputError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """A model's own weights."""

    folder: ModelFolder
    vae: Checkpoint
    text: Checkpoint
    config: EngineConfig

    @classmethod
    def of(cls, folder: ModelFolder, blocks: int | None) -> "FolderSource":
        vae, text = folder.needed_vae(), Checkpoint(tensor_files(folder.needed_text()[0]))
        check_fit(folder, vae, text)
        return cls(folder=folder, vae=vae, text=text, config=EngineConfig.of(folder).limited(blocks))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def digest(self) -> str:
        return digest([*self.folder.dit.files, *self.vae.files, *self.text.files])

    @property
    def processor(self) -> Path:
        return self.folder.needed_text()[1]

    def reader(self) -> Read:
        files: dict[Network, Checkpoint] = {"dit": self.folder.dit, "text": self.text, "vae": self.vae}
        hollow = plain_networks(EngineConfig.of(self.folder))
        text, unused = renamed(hollow.text, self.text, model_key)
        found: dict[Network, list[Target]] = {
            "dit": dit_targets(hollow.dit, self.folder.dit),
            "text": text,
            "vae": vae_targets(hollow.vae, self.vae),
        }
        for network, targets in found.items():
            check(targets, files[network], unused if network == "text" else ())
        targets_of = {network: {target.key: target for target in targets} for network, targets in found.items()}

        def read(network: Network, key: str, dtype: torch.dtype) -> Tensor:
            return assemble(targets_of[network][key], files[network].tensor, CPU, dtype)

        return read


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomSource:
    """Normal weights of the right shapes; each tensor has a seed of its own, so a resumed build gives the same."""

    name: str
    config: EngineConfig
    processor: Path
    digest: str = f"normal, std {RANDOM_STD}"

    def reader(self) -> Read:
        hollow = plain_networks(self.config)
        sizes_of = {network: shapes(hollow.of(network)) for network in NETWORKS}

        def read(network: Network, key: str, dtype: torch.dtype) -> Tensor:
            seed = int.from_bytes(hashlib.sha256(f"{network} {key}".encode()).digest()[:8], "little", signed=True)
            generator = torch.Generator().manual_seed(seed)
            return torch.empty(sizes_of[network][key], dtype=dtype).normal_(std=RANDOM_STD, generator=generator)

        return read


def find_source(model: str | Path | None, *, random: bool = False, blocks: int | None = None) -> Source:
    """What `model` names (`folder.locate`), or random weights of its shapes; those there are of released versions, too.

    blocks: only the first so many double and single blocks. The tokenizer of a version is the bundled model's.
    Raises InputError.
    """
    if model in released.VERSIONS and not Path(str(model)).exists():
        if not random:
            raise InputError(f"{model}: name the folder or the Hub id of its weights, or give --random-weights")
        processor = locate(None).needed_text()[1]
        config = EngineConfig.released(str(model), processor).limited(blocks)
        return RandomSource(name=f"random-{model}", config=config, processor=processor)
    found = FolderSource.of(locate(model), blocks)
    if random:
        return RandomSource(name=f"random-{found.name}", config=found.config, processor=found.processor)
    return found


def find_or_build(
    model: str | Path | None,
    profile: Profile,
    *,
    say: Say,
    into: str | Path | None = None,
    random: bool = False,
    blocks: int | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The folder of a model's engine for a profile: built first if the cache has none, and again where it is damaged.

    model, random, blocks: as `find_source`. say: takes a line about what takes time or is wrong. into: a folder to
    build it in instead of the cache. verify: compare the hashes of all files, not only their sizes.
    Raises InputError, one line, for a bad model, a folder that others may write to, or one that cannot be written.
    """
    source = find_source(model, random=random, blocks=blocks)
    order = Order.of(source, profile, blocks)
    place = engines_folder() / order.key if into is None else Path(into).absolute()
    with _explained(place):
        if _whole(place, order, verify):
            store.drop_stale_lock(place)
            return place
    base = None
    if order.backend.name != "torch":  # its tensors are those of the engine without it
        plain = profile.changed({"backend": "torch", "target": ""})
        base = find_or_build(model, plain, say=say, random=random, blocks=blocks, progress=progress)
    with _explained(place):
        if into is None:
            make_private(place.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place, say):
            if not _whole(place, order, verify):
                _make_way(place, order, verify=verify, ours=into is None, say=say)
                say(f"building the engine of {source.name} for {profile.name} in {place}")
                if blocks is not None:
                    say(f"it has at most {blocks} double and {blocks} single blocks: to be measured, not to edit with")
                _build(place, order, source, progress or Progress(None), base)
    return place


def find(model: str | Path | None, profile: Profile) -> Path | None:
    """The folder of a model's engine for a profile, if the cache has a whole one. Raises InputError for a bad model."""
    if not engines_folder().is_dir():
        return None
    order = Order.of(find_source(model), profile, None)
    place = engines_folder() / order.key
    return place if _whole(place, order, verify=False) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What an engine shall be."""

    profile: Profile
    backend: Backend
    settings: Mapping[str, bytes]  # files that say so, by name
    facts: Mapping[str, Any]  # of its manifest

    @classmethod
    def of(cls, source: Source, profile: Profile, blocks: int | None) -> "Order":
        settings = {
            CONFIG: store.canonical(source.config.as_json()),
            # Who multiplies is chosen at each load: the engine is the same.
            PROFILE: profile.model_dump_json(indent=1, exclude={"products"}).encode(),
        }
        chip, backend = architecture(profile.device), Backend.of(profile)
        facts = {
            "source": {"name": source.name, "digest": source.digest, "processor": text_digest([], source.processor)},
            "profile": profile.name,
            "settings": {name: hashlib.sha256(content).hexdigest() for name, content in settings.items()},
            "blocks": blocks,
            "versions": versions(),
            "architecture": chip,
            "compilation": _compilation(profile, chip),
            "kernels": {"use": profile.kernels, "attention": profile.attention, "exceptions": _exceptions(chip)},
            **backend.facts,
        }
        return cls(profile=profile, backend=backend, settings=settings, facts=facts)

    @property
    def key(self) -> str:
        return Manifest(self.facts, {}).key


def _compilation(profile: Profile, chip: str) -> str:
    if not profile.compiled:
        return "off"
    return "waits for a GPU" if chip == "none" else "at the first edit of each size"


def _exceptions(chip: str) -> list[str]:
    """Our kernels that are not used by default on a GPU such as sm_90."""
    return sorted(EXCEPTIONS.get(nearest(int(chip[3:])), ())) if chip.startswith("sm_") else []


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Makes one line of what the disk refuses."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{error.filename or place}: the engine cannot be written: {reason}") from error


def _whole(place: Path, order: Order, verify: bool) -> bool:
    """Whether the engine is there. Raises InputError if others may write to it."""
    if not (place / MANIFEST).exists():
        return False
    store.check_private(place)
    try:
        manifest = Manifest.read(place)
    except InputError:
        return False
    return manifest.facts == order.facts and not store.faults(place, manifest, hashes=verify)


def _make_way(place: Path, order: Order, *, verify: bool, ours: bool, say: Say) -> None:
    """Sets aside what is in the place of an engine, if anything, and what is good of it for the build.

    ours: it is in the cache; elsewhere, InputError is raised for what is not this engine.
    """
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    try:
        manifest = Manifest.read(place)
        if manifest.facts != order.facts:
            raise InputError(f"{place}: another engine is here")
    except InputError as error:
        if not ours:
            raise InputError(f"{error}; remove it or choose another folder") from None
        say(f"{error}; it is built again")
        store.set_aside(place, [MANIFEST])
        return
    damaged = store.faults(place, manifest, hashes=verify)
    for name, fault in damaged.items():
        say(f"{place / name}: {fault}; it is built again")
    store.set_aside(place, list(damaged))


def _build(place: Path, order: Order, source: Source, progress: Progress, base: Path | None) -> None:
    """base: an engine with the same tensors."""
    draft = Draft(place, order.facts)
    if base is not None:
        made = Manifest.read(base).files
        for name in (part.file for part in PARTS if part.file not in draft):
            draft.adopt(name, base / name, made[name])
    progress.stage("Looking at the model")
    modules, read = networks(source.config, order.profile), source.reader()
    tools = load_processor(source.processor, source.config.qwen(Path(CONFIG)), source.processor)
    Conditioner(modules.text, *tools, source.config.variant())  # a tokenizer that does not fit is an error before work
    todo = {part: planned(part, modules.of(part.network), read) for part in PARTS if part.file not in draft}
    check_room(place, sum(tensor.size for tensors in todo.values() for tensor in tensors))
    small = {**order.settings}
    if order.profile.budget_gb:
        small[PLAN] = json.dumps(fitting(source, order.profile).as_json(), indent=1).encode()
    small |= {f"{PROCESSOR}/{path.name}": path.read_bytes() for path in processor_files(source.processor)}
    for name, content in small.items():
        if name not in draft:
            draft.write(name, partial(_put, content))
    for part, tensors in todo.items():
        progress.stage(f"Writing {part.file} (MB)")
        draft.write(part.file, partial(_stream, tensors, progress))
    for name, fill in order.backend.files(source.config, order.profile, draft.folder):
        if name not in draft:
            progress.stage(f"Exporting {name}")
            draft.write(name, fill)
    draft.publish()


def fitting(source: Source, profile: Profile) -> Plan:
    """The byte plan of the largest edit that a profile is for. Raises InputError if it does not fit the budget."""
    made = plan(source.config.sizes(source.name), profile)
    check_plan(made)
    return made


def processor_files(folder: Path) -> list[Path]:
    """Files of a tokenizer and a picture processor, which the official layout keeps beside their text model's."""
    found = sorted((*folder.glob("*.json"), *folder.glob("*.txt")))
    return [path for path in found if path.name not in TEXT_FILES and not path.match("*.index.json")]


def planned(part: Part, module: nn.Module, read: Read) -> list[Planned]:
    """The tensors of a part: layer by layer those that are quantised, then the others.

    module: the part's network as `parts.networks` makes it.
    """
    made = []
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear) and part.holds(f"{name}.weight"):
            weight = partial(read, part.network, f"{name}.weight", layer.dtype)
            made += _layer(name, layer, Quantised(layer.scheme, weight))
    quantised = {tensor.key for tensor in made}
    plain = [
        Planned(key, dtype_name(value.dtype), tuple(value.shape), partial(read, part.network, key, value.dtype))
        for key, value in module.state_dict().items()
        if part.holds(key) and key not in quantised
    ]
    return [*made, *in_order(plain)]


def _layer(name: str, layer: QuantizedLinear, tensors: "Quantised") -> list[Planned]:
    shapes = {piece: getattr(layer, piece) for piece in layer.parts}
    return in_order(
        Planned(f"{name}.{piece}", dtype_name(value.dtype), tuple(value.shape), partial(tensors.take, piece))
        for piece, value in shapes.items()
    )


class Quantised:
    """A layer's tensors: made when the first is taken, gone with the last."""

    def __init__(self, scheme: Scheme, weight: Callable[[], Tensor]) -> None:
        self._scheme = scheme
        self._weight = weight
        self._made: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        if not self._made:
            self._made = quantise(self._scheme, self._weight())
        return self._made.pop(name)


def _put(content: bytes, file: Sink) -> None:
    file.write(content)


def _stream(tensors: list[Planned], progress: Progress, file: Sink) -> None:
    write_to(Shown(file, progress, sum(tensor.size for tensor in tensors)), tensors)


class Shown:
    """Writes to a file and shows how far it is."""

    def __init__(self, file: Sink, progress: Progress, size: int) -> None:
        """size: bytes to come, about."""
        self._file = file
        self._progress = progress
        self._size = size
        self._done = 0

    def write(self, data: bytes | memoryview, /) -> None:
        self._file.write(data)
        self._done += len(data)
        self._progress.step(self._done // MB, self._size // MB)
