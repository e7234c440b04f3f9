"""Networks -> files of either layout: sharded safetensors, the configs beside them, the pipeline's index."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step1x.engine import config_file, layouts
from step1x.engine.checkpoint import Planned, write
from step1x.engine.dit import DiT
from step1x.engine.errors import InputError
from step1x.engine.folder import INDEX, OFFICIAL_FILES, SETTINGS, Version, version_of
from step1x.engine.layouts import Target
from step1x.engine.vae import VAE
from step1x.engine.weights import assemble, shapes

SHARD_BYTES = 5_000_000_000
STEM = "diffusion_pytorch_model"
# What the diffusers fork's converter copies from FLUX.1-dev (§3.11).
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
PIPELINE = {
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "transformer": ["diffusers", "Step1XEditTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A transformer or an autoencoder to be written: its tensors, what they are made of, its config file."""

    targets: tuple[Target, ...]
    read: Callable[[str], Tensor]  # a source tensor of the targets
    dtype: Callable[[Target], str]  # what a target is stored in, as the format spells it
    config: Mapping[str, Any]

    def planned(self) -> list[Planned]:
        """The tensors for `checkpoint.write`."""
        return [self._planned(target) for target in self.targets]

    def _planned(self, target: Target) -> Planned:
        def tensor() -> Tensor:
            return assemble(target, self.read, torch.device("cpu"), None)

        return Planned(target.key, self.dtype(target), target.shape, tensor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """What belongs into one model folder besides its text model."""

    version: Version
    settings: Mapping[str, Any]  # preset and overridden fields, see `folder.ModelFolder`
    dit: Network
    vae: Network | None


def save(dit: DiT, vae: VAE, root: Path, *, preset: str, overrides: Mapping[str, Any]) -> None:
    """Writes two networks into `root`, in bf16 and the diffusers layout, as a trainer does.

    transformer/, vae/, scheduler/ and model_index.json; text_encoder/ and processor/ are written by others.
    `preset` names the row of `variants` and `overrides` the fields of it that this model replaces.
    """
    state, targets = _diffusers(dit, layouts.dit_map(), dit.config.hidden_size)
    transformer = _trained(state, targets, config_file.dit_as_diffusers(dit.config))
    vae_state, vae_targets = _diffusers(vae, layouts.vae_map(len(vae.config.channels)), 0)
    autoencoder = _trained(vae_state, vae_targets, config_file.vae_as_diffusers(vae.config))
    parcel = Parcel(
        version=version_of(state),
        settings={"variant": preset, "overrides": dict(overrides)},
        dit=transformer,
        vae=autoencoder,
    )
    root.mkdir(parents=True, exist_ok=True)
    write_diffusers(root, parcel)


def _diffusers(module: DiT | VAE, keys: layouts.KeyMap, width: int) -> tuple[dict[str, Tensor], tuple[Target, ...]]:
    return module.state_dict(), tuple(layouts.to_diffusers(shapes(module), keys, width))


def _trained(state: Mapping[str, Tensor], targets: tuple[Target, ...], config: Mapping[str, Any]) -> Network:
    def read(key: str) -> Tensor:
        return state[key].detach().to("cpu", torch.bfloat16)

    return Network(targets=targets, read=read, dtype=lambda _: "BF16", config=config)


def write_official(root: Path, parcel: Parcel) -> None:
    """The transformer and autoencoder files of the official layout, each with a config of the same name."""
    file = root / OFFICIAL_FILES[parcel.version]
    write(file, parcel.dit.planned())
    _write_json(file.with_suffix(".json"), {**parcel.dit.config, SETTINGS: parcel.settings})
    if parcel.vae is not None:
        write(root / "vae.safetensors", parcel.vae.planned())
        _write_json(root / "vae.json", parcel.vae.config)


def write_diffusers(root: Path, parcel: Parcel, shard_bytes: int = SHARD_BYTES) -> None:
    """transformer/, vae/, scheduler/ and model_index.json."""
    for name, network in (("transformer", parcel.dit), ("vae", parcel.vae)):
        if network is not None:
            (root / name).mkdir(exist_ok=True)
            _write_sharded(root / name, network.planned(), shard_bytes)
            _write_json(root / name / "config.json", network.config)
    (root / "scheduler").mkdir(exist_ok=True)
    _write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
    pipeline = "Step1XEditPipelineV1P2" if parcel.version == "v1.2" else "Step1XEditPipeline"
    _write_json(root / INDEX, {"_class_name": pipeline, **PIPELINE, SETTINGS: parcel.settings})


def _write_sharded(folder: Path, tensors: list[Planned], shard_bytes: int) -> None:
    """Files of at most `shard_bytes` (unless one tensor is larger), with an index when there are several."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    if len(shards) == 1:
        write(folder / f"{STEM}.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{STEM}-{number:05}-of-{len(shards):05}.safetensors"
        write(folder / name, shard)
        weight_map.update({tensor.key: name for tensor in shard})
    total = sum(tensor.size for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / f"{STEM}.safetensors.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_room(path: Path, needed: int) -> None:
    """Raises InputError when the disk of `path`, which need not exist, has fewer than `needed` bytes left."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{path}: needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A folder beside `path` that becomes `path` at the end, or vanishes when something fails."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
