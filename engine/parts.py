"""The networks of an engine folder: which file holds which tensors, and from the files to a loaded model.

Quantised layers are stored as they are multiplied (quant/schemes.py), so loading copies and never computes.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import nn

from step1x.engine import layouts, store
from step1x.engine.checkpoint import Checkpoint
from step1x.engine.dit import DiT, is_modulation, is_of_block
from step1x.engine.engine_config import CONFIG, EngineConfig
from step1x.engine.errors import InputError
from step1x.engine.qwen import compute_frequencies, hollow_model
from step1x.engine.residency import RESIDENT, dit_at_host, text_at_host
from step1x.engine.store import PROCESSOR, TENSORS, Manifest
from step1x.engine.text import Conditioner, load_processor
from step1x.engine.vae import VAE
from step1x.engine.weights import Components, build, shapes
from step1x.kernels.launch import capability
from step1x.profiles import Profile, Residency
from step1x.quant.linear import swap

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLModel

Network = Literal["dit", "text", "vae"]
NETWORKS: tuple[Network, ...] = get_args(Network)
PROFILE, PLAN = "profile.json", "plan.json"
FORMAT = 1  # of engine folders
# Modules that decide what is stored. Who changes them between two releases gets new engines.
PROGRAMS = ("build", "checkpoint", "dit", "engine_config", "layouts", "parts", "qwen", "store", "vae", "weights")


class Part(NamedTuple):
    """A file of an engine, and the tensors of a network that it holds."""

    name: str
    network: Network
    holds: Callable[[str], bool]  # by key

    @property
    def file(self) -> str:
        return f"{self.name}{TENSORS}"


PARTS = (
    Part("vae", "vae", lambda _: True),
    Part("vision", "text", lambda key: key.startswith("visual.")),
    Part("text", "text", lambda key: not key.startswith("visual.")),
    Part("folded", "dit", is_modulation),
    Part("dit", "dit", lambda key: not is_modulation(key)),
)


class Networks(NamedTuple):
    """Modules, all three on one device."""

    dit: DiT
    text: "Qwen2_5_VLModel"
    vae: VAE

    def of(self, network: Network) -> nn.Module:
        module: nn.Module = getattr(self, network)
        return module


def plain_networks(config: EngineConfig, *, fp32_norms: bool = True) -> Networks:
    """The networks on the meta device, in float32."""
    with torch.device("meta"):
        return Networks(DiT(config.dit, fp32_norms), hollow_model(config.qwen(Path(CONFIG))), VAE(config.vae))


def networks(config: EngineConfig, profile: Profile, *, fp32_norms: bool = True) -> Networks:
    """The networks on the meta device as an engine stores them: in the profile's dtypes, with its quantised layers."""
    made, weights = plain_networks(config, fp32_norms=fp32_norms), profile.weights
    for network in (made.dit, made.text):
        network.to(getattr(torch, profile.dtype))
    made.vae.to(getattr(torch, profile.vae_dtype))
    swap(made.dit, "dit", weights.dit)
    swap(made.dit, "folded", weights.folded)
    swap(made.text, "text", weights.text)
    swap(made.text, "vision", weights.vision)
    return made


def versions() -> dict[str, str]:
    """What an engine's bytes and its compiled code depend on, besides model, profile and GPU."""
    quant = Path(__file__).parents[1] / "quant"
    sources = [Path(__file__).with_name(f"{name}.py") for name in PROGRAMS]
    sources += sorted((*quant.glob("*.py"), *quant.glob("*.toml")))
    programs = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    released = {name: importlib.metadata.version(name) for name in ("step1x-engine", "torch")}
    return {"format": str(FORMAT), **released, "programs": programs}


def architecture(device: str) -> str:
    """What code for a profile's device is compiled for: such as sm_90, cpu or mps; none: the GPU is not there."""
    kind, _, index = device.partition(":")
    there = torch.cuda.is_available()
    if kind == "auto":
        kind = "cuda" if there else "cpu"
    if kind != "cuda":
        return kind
    return f"sm_{capability(torch.device('cuda', int(index or 0)))}" if there else "none"


def load_profile_of(folder: Path) -> Profile:
    """The profile that an engine was built for."""
    return Profile.model_validate_json((folder / PROFILE).read_bytes())


def load_engine_folder(
    folder: str | Path,
    *,
    device: torch.device | str,
    variant: str | None = None,
    fix_quotes: bool = False,
    residency: Residency = RESIDENT,
    hollow: bool = False,
) -> Components:
    """Loads an engine: the tensors that quantising the model in memory gives, bit by bit, and none is computed.

    As `weights.load`; what does not stay on the device by `residency` is loaded to host memory. hollow: the blocks of
    the transformer have no weights but those of modulations.
    Raises InputError with one line if others may write to the folder, a file is missing or damaged (`store.opened`),
    or it was made by other versions or for another GPU.
    """
    path = Path(folder)
    manifest = store.opened(path)
    config, profile = EngineConfig.read(path / CONFIG), load_profile_of(path)
    _check_origin(path, manifest, profile)
    row = config.variant(variant)
    found = networks(config, profile, fp32_norms=row.dtype_flow != "pure")
    at_host: dict[Network, Callable[[str], bool]] = {
        "dit": dit_at_host(residency, config.dit.depth, config.dit.depth_single),
        "text": text_at_host(residency),
        "vae": lambda key: residency.vae != "resident",
    }
    for network in NETWORKS:
        module = found.of(network)
        checkpoint = Checkpoint([path / part.file for part in PARTS if part.network == network])
        targets = layouts.from_official(shapes(module))
        left = [target.key for target in targets if hollow and network == "dit" and is_of_block(target.key)]
        wanted = [target for target in targets if target.key not in left]
        build(module, wanted, checkpoint, device, None, left, at_host[network])
    compute_frequencies(found.text, device)
    tools = load_processor(path / PROCESSOR, config.qwen(path / CONFIG), path)
    conditioner = Conditioner(found.text.eval().requires_grad_(False), *tools, row, fix_quotes=fix_quotes)
    conditioner.device = torch.device(device)
    source = manifest.facts["source"]
    return Components(
        variant=row,
        dit=found.dit,
        vae=found.vae,
        conditioner=conditioner,
        name=source["name"],
        digest=source["digest"],
        text_digest=partial(_text_digest, manifest),
        compiled=path / store.COMPILED,
    )


def _check_origin(path: Path, manifest: Manifest, profile: Profile) -> None:
    """Raises InputError unless the engine was made by these versions, for this GPU or for none."""
    made, here = {**manifest.facts["versions"]}, versions()
    made["GPU"], here["GPU"] = manifest.facts["architecture"], architecture(profile.device)
    if made["GPU"] == "none":
        here["GPU"] = "none"  # nothing in it has been compiled
    for name, value in here.items():
        if made.get(name) != value:
            raise InputError(f"{path}: made with {name} {made.get(name)}, here is {value}; build the engine again")


def _text_digest(manifest: Manifest) -> str:
    """Digest of a text model: of its weights, its config, and its tokenizer and settings."""
    names = (name for name in sorted(manifest.files) if name in (CONFIG, "text.safetensors", "vision.safetensors"))
    used = [*names, *(name for name in sorted(manifest.files) if name.startswith(f"{PROCESSOR}/"))]
    return hashlib.sha256(store.canonical([[name, manifest.files[name].sha256] for name in used])).hexdigest()
