"""What a model is and what it needs, from the headers of its files alone."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from step1x.engine import sizes
from step1x.engine.checkpoint import Checkpoint, tensor_files
from step1x.engine.dit import DiT
from step1x.engine.folder import ModelFolder, locate
from step1x.engine.vae import VAE
from step1x.engine.variants import Variant
from step1x.engine.weights import check, dit_targets, shapes, vae_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentInfo:
    """One network of a model. A text model's head is on disk, but never loaded."""

    name: str
    parameters: int  # as loaded
    parts: Mapping[str, int]  # parameters of parts worth knowing; they do not add up to the whole
    dtypes: Mapping[str, int]  # values on disk, by dtype
    disk_bytes: int
    memory_bytes: int  # loaded in bf16; an autoencoder that its preset keeps in float32, in that


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What `step1x-engine info` prints. `asdict` of it is JSON."""

    name: str
    layout: str
    version: str
    preset: str
    sizes: Mapping[str, Any]  # "dit" and "vae": the fields of their configs
    components: tuple[ComponentInfo, ...]
    absent: tuple[str, ...]  # components that the folder lacks
    memory_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return asdict(self)


def describe(model: str | Path | None) -> ModelInfo:
    """Describes a model (see `folder.locate`) without reading a tensor.

    Raises InputError when there is none, or when keys or shapes of its DiT or autoencoder are not right. An
    autoencoder or a text model that is not there is reported in `absent`.
    """
    folder = locate(model)
    row = folder.variant()
    components, found = [_dit(folder)], {"dit": asdict(sizes.dit_config(folder.dit, folder.dit_configs))}
    absent = []
    if folder.vae is None:
        absent.append("vae")
    else:
        components.append(_vae(folder, folder.vae, row))
        found["vae"] = asdict(sizes.vae_config(folder.vae, folder.vae_configs))
    if folder.text is None:
        absent.append("text_encoder")
    else:
        components.append(_text(Checkpoint(tensor_files(folder.text))))
    return ModelInfo(
        name=folder.name,
        layout=folder.layout,
        version=folder.version,
        preset=row.name,
        sizes=found,
        components=tuple(components),
        absent=tuple(absent),
        memory_bytes=sum(component.memory_bytes for component in components),
    )


def _component(
    name: str,
    checkpoint: Checkpoint,
    module: nn.Module,
    parts: Mapping[str, Callable[[str], bool]],
    width: int = 2,
) -> ComponentInfo:
    """Counts a module's parameters; `parts` select keys, `width` is bytes of a parameter in memory."""
    counts = {key: prod(shape) for key, shape in shapes(module).items()}
    total = sum(counts.values())
    return ComponentInfo(
        name=name,
        parameters=total,
        parts={part: sum(n for key, n in counts.items() if chosen(key)) for part, chosen in parts.items()},
        dtypes=_dtypes(checkpoint),
        disk_bytes=sum(entry.size for entry in checkpoint.values()),
        memory_bytes=width * total,
    )


def _dtypes(checkpoint: Checkpoint) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in checkpoint.values():
        counts[entry.dtype] += entry.numel
    return dict(counts)


def _dit(folder: ModelFolder) -> ComponentInfo:
    with torch.device("meta"):
        dit = DiT(sizes.dit_config(folder.dit, folder.dit_configs))
    check(dit_targets(dit, folder.dit), folder.dit)

    def connector(key: str) -> bool:
        return key.startswith("connector.")

    def modulation(key: str) -> bool:
        return not connector(key) and any(part in key for part in ("_mod.", ".modulation.", ".adaLN_modulation."))

    return _component("dit", folder.dit, dit, {"connector": connector, "modulation": modulation})


def _vae(folder: ModelFolder, checkpoint: Checkpoint, row: Variant) -> ComponentInfo:
    with torch.device("meta"):
        vae = VAE(sizes.vae_config(checkpoint, folder.vae_configs))
    check(vae_targets(vae, checkpoint), checkpoint)
    width = 2 if row.dtype_flow == "pure" else 4  # as `weights.load` does
    return _component("vae", checkpoint, vae, {"encoder": lambda key: key.startswith("encoder.")}, width)


def _text(checkpoint: Checkpoint) -> ComponentInfo:
    """The text model is not built here: its keys alone tell vision tower and head from the rest."""
    vision = sum(entry.numel for key, entry in checkpoint.items() if "visual." in key)
    head = sum(entry.numel for key, entry in checkpoint.items() if key.startswith("lm_head."))
    loaded = sum(entry.numel for entry in checkpoint.values()) - head
    return ComponentInfo(
        name="text_encoder",
        parameters=loaded,
        parts={"text_model": loaded - vision, "vision_tower": vision, "head (never loaded)": head},
        dtypes=_dtypes(checkpoint),
        disk_bytes=sum(entry.size for entry in checkpoint.values()),
        memory_bytes=2 * loaded,
    )
