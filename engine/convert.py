"""Conversion of a model between the official and the diffusers layout.

One tensor is in memory at a time. Values and dtypes are kept bit by bit, so there and back gives the same
tensors, and the preset travels along: a converted model does what it did before.

A v1.0 model keeps `connector.scale_factor` in its diffusers folder, a key that the diffusers fork does not
have: our loader reads it back, theirs refuses the folder. Folding it into `connector.global_proj_out` would
please their loader, but then their pipeline would run v1.0 weights with v1.1's position ids, and quietly edit
wrongly (model.md §3.7); and in bf16 it rounds.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from step1x.engine import config_file, layouts, sizes
from step1x.engine.checkpoint import Checkpoint, tensor_files
from step1x.engine.dit import DiT
from step1x.engine.errors import InputError
from step1x.engine.folder import QWEN, ModelFolder, locate
from step1x.engine.layouts import KeyMap, Layout, Shapes, Target
from step1x.engine.save import SHARD_BYTES, Network, Parcel, appearing, check_room, write_diffusers, write_official
from step1x.engine.vae import VAE
from step1x.engine.weights import check, dit_targets, shapes, vae_targets

TEXT_FILES = ("config.json", "generation_config.json")  # the text model's own; the rest is its processor's


def convert(source: str | Path, target: str | Path, layout: Layout, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes the model at `source` (see `folder.locate`) into the new folder `target`, in `layout`.

    The folder appears when it is complete, or not at all. Files of the text model are linked where the disk
    allows it, else copied; what the source lacks, the target lacks too.
    Raises InputError for a bad model, a target that exists, or too little room.
    """
    path = Path(target)
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already; nothing is overwritten")
    folder = locate(source)
    parcel = Parcel(
        version=folder.version,
        settings={"variant": folder.variant().name, "overrides": folder.settings.get("overrides", {})},
        dit=_dit(folder, layout),
        vae=None if folder.vae is None else _vae(folder, folder.vae, layout),
    )
    checkpoints = [folder.dit] if folder.vae is None else [folder.dit, folder.vae]
    check_room(path, sum(entry.size for checkpoint in checkpoints for entry in checkpoint.values()))
    with appearing(path) as partial:
        if layout == "official":
            write_official(partial, parcel)
            for part in (folder.text, folder.processor):
                _link(part, partial / QWEN, _files(part))
        else:
            write_diffusers(partial, parcel, shard_bytes)
            model, rest = _divided(folder)
            _link(folder.text, partial / "text_encoder", model)
            _link(folder.processor, partial / "processor", rest)
    return path


def _dit(folder: ModelFolder, layout: Layout) -> Network:
    config = sizes.dit_config(folder.dit, folder.dit_configs)
    with torch.device("meta"):
        dit = DiT(config)
    check(dit_targets(dit, folder.dit), folder.dit)
    ways = (layouts.detect(folder.dit, folder.dit.where), layout)
    targets = _targets(shapes(dit), folder.dit, ways, layouts.dit_map(), config.hidden_size)
    written = config_file.dit_as_official if layout == "official" else config_file.dit_as_diffusers
    return _network(folder.dit, targets, written(config))


def _vae(folder: ModelFolder, checkpoint: Checkpoint, layout: Layout) -> Network:
    config = sizes.vae_config(checkpoint, folder.vae_configs)
    with torch.device("meta"):
        vae = VAE(config)
    check(vae_targets(vae, checkpoint), checkpoint)
    ways = (layouts.detect_vae(checkpoint, checkpoint.where), layout)
    targets = _targets(shapes(vae), checkpoint, ways, layouts.vae_map(len(config.channels)), width=0)
    written = config_file.vae_as_official if layout == "official" else config_file.vae_as_diffusers
    return _network(checkpoint, targets, written(config))


def _targets(
    official: Shapes, checkpoint: Checkpoint, ways: tuple[Layout, Layout], keys: KeyMap, width: int
) -> list[Target]:
    """How the tensors of the wanted layout are made of those in the files. `ways`: from, to."""
    if ways[0] == ways[1]:
        return layouts.from_official({key: entry.shape for key, entry in checkpoint.items()})
    make = layouts.to_diffusers if ways[1] == "diffusers" else layouts.from_diffusers
    return make(official, keys, width)


def _network(checkpoint: Checkpoint, targets: list[Target], config: dict[str, object]) -> Network:
    def dtype(target: Target) -> str:
        """Parts of one tensor must be stored alike: a cast here would not be undone on the way back."""
        dtypes = sorted({checkpoint[part.source].dtype for part in target.parts})
        if len(dtypes) > 1:
            raise InputError(f"{checkpoint.where}: the parts of {target.key} are {' and '.join(dtypes)}")
        return dtypes[0]

    return Network(targets=tuple(targets), read=checkpoint.tensor, dtype=dtype, config=config)


def _divided(folder: ModelFolder) -> tuple[list[Path], list[Path]]:
    """Files of the text model and of its processor, which the official layout keeps in one folder."""
    model, rest = _files(folder.text), _files(folder.processor)
    if folder.text is not None and folder.text == folder.processor:
        own = {*TEXT_FILES, *(file.name for file in tensor_files(folder.text))}
        model = [name for name in model if name.name in own or name.match("*.index.json")]
        rest = [name for name in rest if name not in model]
    return model, rest


def _files(folder: Path | None) -> list[Path]:
    """Every file below a folder, relative to it; hidden ones (.git, .cache, .gitattributes) are left out."""
    if folder is None:
        return []
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.parts)]


def _link(source: Path | None, target: Path, names: Iterable[Path]) -> None:
    """Links files of one folder into another, copies where the disk cannot; keeps what is there already."""
    if source is None:
        return
    target.mkdir(exist_ok=True)
    for name in names:
        file = target / name
        if file.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link((source / name).resolve(), file)  # resolved: the Hub's cache is full of symbolic links
        except OSError:
            shutil.copyfile(source / name, file)
