"""Weights: files of either layout -> modules on their device.

A module is made on the meta device; its tensors are mapped from the files and copied one by one straight to
their device and dtype, fused tensors (qkv, linear1) part by part into their rows. So the host never holds
more than the module and one tensor.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from step1x.engine import layouts, sizes
from step1x.engine.backends import Exported
from step1x.engine.checkpoint import Checkpoint, digest, tensor_files
from step1x.engine.dit import DiT
from step1x.engine.errors import InputError
from step1x.engine.folder import ModelFolder, locate
from step1x.engine.layouts import Part, Target
from step1x.engine.residency import RESIDENT, dit_at_host, text_at_host
from step1x.engine.vae import VAE
from step1x.engine.variants import Variant
from step1x.profiles import Residency

if TYPE_CHECKING:
    from step1x.engine.text import Conditioner


@dataclass(frozen=True, slots=True)
class Components:
    """A loaded model."""

    variant: Variant
    dit: DiT
    vae: VAE
    conditioner: "Conditioner"
    name: str  # of the folder, or ORG/NAME@COMMIT
    digest: str  # of the files' names, sizes, headers and samples of their data
    text_digest: Callable[[], str] | None = None  # of the text model's files, with tokenizer and settings
    compiled: Path | None = None  # where an engine keeps compiled code
    exported: Exported | None = None  # what runs the steps instead of the transformer's blocks (backends.py)


def load(
    model: str | Path | None,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None = None,
    variant: str | None = None,
    fix_quotes: bool = False,
    residency: Residency = RESIDENT,
) -> Components:
    """Loads a model: a folder of either layout, a transformer file, a Hub id, or None for the bundled one.

    `variant` names a parity preset other than the folder's; `fix_quotes` repairs unbalanced apostrophes (text.py).
    The autoencoder is in `vae_dtype`; by default that is `dtype`, but float32 for an official preset in half
    precision, as its own code keeps it (§4). Parameters do not require gradients. What does not stay on the device
    by `residency` is loaded to host memory (residency.py).
    Raises InputError with one line for anything that is wrong with the files.
    """
    from step1x.engine.text import load_conditioner

    folder = locate(model, variant=variant)
    row = folder.variant(variant)
    vae_files, (text, processor) = folder.needed_vae(), folder.needed_text()
    text_files = tensor_files(text)
    check_fit(folder, vae_files, Checkpoint(text_files))
    official = row.dtype_flow != "pure"
    if vae_dtype is None:
        vae_dtype = torch.float32 if official and dtype.itemsize < 4 else dtype
    return Components(
        variant=row,
        dit=build_dit(folder, fp32_norms=official, device=device, dtype=dtype, residency=residency),
        vae=build_vae(folder, device=device if residency.vae == "resident" else "cpu", dtype=vae_dtype),
        conditioner=load_conditioner(
            text, processor, row, device, dtype, fix_quotes=fix_quotes, at_host=text_at_host(residency)
        ),
        name=folder.name,
        digest=digest([*folder.dit.files, *vae_files.files, *text_files]),
        text_digest=partial(text_digest, text_files, text, processor),
    )


def text_digest(files: Sequence[Path], *folders: Path) -> str:
    """Digest of a text model: of its weights, as `digest` has it, and of configs and vocabularies in its folders."""
    found = hashlib.sha256(digest(files).encode())
    for folder in folders:
        for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.txt")):
            found.update(f"{file.name} {file.stat().st_size} ".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


def check_fit(folder: ModelFolder, vae: Checkpoint, text: Checkpoint) -> None:
    """Raises InputError when the three networks are not of one model: their widths must meet."""
    dit = sizes.dit_config(folder.dit, folder.dit_configs)
    cells = sizes.vae_config(vae, folder.vae_configs).z_channels * 4  # a token is 2 × 2 latent cells (§3.8)
    if cells != dit.in_channels:
        raise InputError(f"{vae.where}: makes {cells} channels a token, {folder.dit.where} takes {dit.in_channels}")
    wanted = dit.connector.in_channels
    widths = {entry.shape[-1] for key, entry in text.items() if key.endswith("embed_tokens.weight")}
    if widths and widths != {wanted}:
        raise InputError(f"{text.where}: text width {min(widths)}, {folder.dit.where} takes {wanted}")


def build_dit(
    folder: ModelFolder,
    *,
    fp32_norms: bool,
    device: torch.device | str,
    dtype: torch.dtype,
    residency: Residency = RESIDENT,
) -> DiT:
    """The transformer of a located model."""
    config = sizes.dit_config(folder.dit, folder.dit_configs)
    with torch.device("meta"):
        dit = DiT(config, fp32_norms)
    at_host = dit_at_host(residency, config.depth, config.depth_single)
    build(dit, dit_targets(dit, folder.dit), folder.dit, device, dtype, at_host=at_host)
    return dit


def build_vae(folder: ModelFolder, *, device: torch.device | str, dtype: torch.dtype) -> VAE:
    """The autoencoder of a located model."""
    checkpoint = folder.needed_vae()
    with torch.device("meta"):
        vae = VAE(sizes.vae_config(checkpoint, folder.vae_configs))
    build(vae, vae_targets(vae, checkpoint), checkpoint, device, dtype)
    return vae


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a module's parameters and persistent buffers."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def dit_targets(dit: DiT, checkpoint: Checkpoint) -> list[Target]:
    """How the tensors of `dit` are made of those in the files, whichever layout these are in."""
    layout = layouts.detect(checkpoint, checkpoint.where)
    return layouts.targets(shapes(dit), layout, layouts.dit_map(), dit.config.hidden_size)


def vae_targets(vae: VAE, checkpoint: Checkpoint) -> list[Target]:
    """How the tensors of `vae` are made of those in the files, whichever layout these are in."""
    layout = layouts.detect_vae(checkpoint, checkpoint.where)
    return layouts.targets(shapes(vae), layout, layouts.vae_map(len(vae.config.channels)), width=0)


def stream(
    module: nn.Module,
    files: Sequence[Path],
    rename: Callable[[str], str | None],
    device: torch.device | str,
    dtype: torch.dtype | None,
    at_host: Callable[[str], bool] | None = None,
) -> None:
    """Fills a meta module from safetensors files whose keys `rename` maps to the module's (None: not needed).

    Floating tensors are cast to `dtype` (plain fp8 values too; None keeps each as stored). Buffers that are
    not in the state dict stay as they are. Raises InputError naming file and key: missing, unexpected,
    misshapen, truncated.
    """
    checkpoint = Checkpoint(files)
    targets, skipped = renamed(module, checkpoint, rename)
    build(module, targets, checkpoint, device, dtype, skipped, at_host)


def renamed(
    module: nn.Module, checkpoint: Checkpoint, rename: Callable[[str], str | None]
) -> tuple[list[Target], list[str]]:
    """How the tensors of `module` are those in the files, whose keys `rename` maps, and the keys it maps to None."""
    names = {key: rename(key) for key in checkpoint}
    sources = {new: key for key, new in names.items() if new is not None}
    targets = [Target(key, shape, (Part(sources.get(key, key), shape),)) for key, shape in shapes(module).items()]
    return targets, [key for key, new in names.items() if new is None]


def build(
    module: nn.Module,
    targets: Sequence[Target],
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype | None,
    skipped: Iterable[str] = (),
    at_host: Callable[[str], bool] | None = None,
) -> None:
    """Fills a meta module with `targets`, made of the tensors of `checkpoint`, on `device` and in `dtype`.

    Those whose key `at_host` picks stay in host memory. `skipped` are keys of the files that are not needed. Integer
    tensors keep their dtype. Parameters do not require gradients.
    Raises InputError unless the files hold exactly what the targets are made of.
    """
    check(targets, checkpoint, skipped)
    for target in targets:
        stays = at_host is not None and at_host(target.key)
        _put(module, target.key, assemble(target, checkpoint.tensor, torch.device("cpu" if stays else device), dtype))


def check(targets: Iterable[Target], checkpoint: Checkpoint, skipped: Iterable[str] = ()) -> None:
    """Raises InputError unless the files hold exactly the source tensors that the targets are made of."""
    expected = {part.source: part.shape for target in targets for part in target.parts}
    missing = [key for key in expected if key not in checkpoint]
    if missing:
        raise InputError(f"{checkpoint.where}: missing {_listed(missing)}")
    known = {*expected, *skipped}
    unexpected = [key for key in checkpoint if key not in known]
    if unexpected:
        raise InputError(f"{checkpoint[unexpected[0]].file}: unexpected {_listed(unexpected)}")
    wrong = [key for key, shape in expected.items() if checkpoint[key].shape != shape]
    if wrong:
        lines = [f"{key} is {list(checkpoint[key].shape)}, not {list(expected[key])}" for key in wrong]
        raise InputError(f"{checkpoint[wrong[0]].file}: misshapen {_listed(lines)}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more ({len(names)} in all)"


def assemble(target: Target, read: Callable[[str], Tensor], device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """One target on its device, copied part by part from what `read` gives; `dtype` None keeps the stored one."""
    if not target.shape:
        source = read(target.parts[0].source)
        return source.to(device, _kept(source, dtype), copy=True)
    value, row = torch.empty(0), 0
    for part in target.parts:
        source = read(part.source)
        if not row:
            value = torch.empty(target.shape, dtype=_kept(source, dtype), device=device)
        rows = source.shape[0] if part.rows is None else part.rows
        place = value[row : row + rows]
        place.copy_(source[part.start : part.start + rows].reshape(place.shape))
        row += rows
    return value


def _kept(source: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return source.dtype if dtype is None or not source.is_floating_point() else dtype


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    """Replaces the parameter or buffer `key` of `module`."""
    owner, _, name = key.rpartition(".")
    holder = module.get_submodule(owner)
    if name in holder._parameters:
        setattr(holder, name, nn.Parameter(value, requires_grad=False))
    else:
        setattr(holder, name, value)
