"""Where a model's files are: a folder of either layout, a single file, or a repository of the Hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from step1x.engine import layouts
from step1x.engine.checkpoint import Checkpoint, read_json, refuse_pickle, tensor_files
from step1x.engine.errors import InputError
from step1x.engine.layouts import Layout
from step1x.engine.variants import DEFAULTS, DIFFUSERS_V11, Variant, variant

BUNDLED = Path(__file__).parent / "bundled" / "step1x-tiny"
QWEN = "Qwen2.5-VL-7B-Instruct"
INDEX = "model_index.json"
SETTINGS = "step1x_engine"  # our key in model_index.json: preset and overridden fields
OFFICIAL_FILES = {
    "v1.0": "step1x-edit-i1258.safetensors",
    "v1.1": "step1x-edit-v1p1-official.safetensors",
    "v1.2": "step1x-edit-v1p2-official.safetensors",  # not released in this layout; ours, by analogy
}
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt")  # no pickles, no pictures

Version = Literal["v1.0", "v1.1", "v1.2"]


def version_of(keys: Mapping[str, Any]) -> Version:
    """The release that the transformer's keys belong to (§0)."""
    if "connector.scale_factor" in keys:
        return "v1.0"
    return "v1.2" if "text_token_mapping.weight" in keys else "v1.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """A located model. Headers of the transformer are read, nothing else; other parts may be absent
    (None)."""

    name: str
    root: Path
    layout: Layout
    dit: Checkpoint
    dit_configs: tuple[Path, ...]  # files that may state its sizes
    vae: Checkpoint | None
    vae_configs: tuple[Path, ...]
    text: Path | None  # folder of the text model
    processor: Path | None  # folder of its tokenizer and image processor
    settings: Mapping[str, Any] = field(default_factory=dict)  # what model_index.json says under step1x_engine

    @property
    def version(self) -> Version:
        return version_of(self.dit)

    def variant(self, name: str | None = None) -> Variant:
        """The preset to run with: `name`, else the folder's own, else the one its layout and version imply.

        Fields that the folder overrides (a small model's sizes) are replaced in it. Raises InputError for an
        unknown preset, one of another version than the weights, or an override that does not fit.
        """
        chosen = name or self.settings.get("variant") or self._default().name
        try:
            row = variant(str(chosen))
        except ValueError as error:
            raise InputError(f"{self.root}: {error}") from None
        if row.version != self.version:
            raise InputError(
                f"{self.dit.where}: {self.version} weights, but preset {row.name} is for {row.version}; "
                f"use {self._default().name}"
            )
        overrides = self.settings.get("overrides", {})
        if not isinstance(overrides, dict):
            raise InputError(f"{self.root}: overrides under {SETTINGS} must be an object")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
        try:
            return row.override(values)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.root}: overrides under {SETTINGS}: {error}") from None

    def _default(self) -> Variant:
        if self.layout == "diffusers" and self.version == "v1.1":
            return DIFFUSERS_V11
        return DEFAULTS[self.version]

    def needed_vae(self) -> Checkpoint:
        """The autoencoder's files. Raises InputError when there are none."""
        if self.vae is None:
            wanted = "vae.safetensors" if self.layout == "official" else "vae/"
            for path in sorted(self.root.glob("vae.*")):
                refuse_pickle(path)
            raise InputError(f"{self.root}: no autoencoder here; looked for {wanted}")
        return self.vae

    def needed_text(self) -> tuple[Path, Path]:
        """The folders of the text model and of its processor. Raises InputError when one is missing."""
        if self.text is None or self.processor is None:
            wanted = f"{QWEN}/" if self.layout == "official" else "text_encoder/ and processor/"
            raise InputError(f"{self.root}: no text model here; looked for {wanted}")
        return self.text, self.processor


def locate(model: str | Path | None, *, variant: str | None = None) -> ModelFolder:
    """Finds a model: None is the bundled one, else a folder, a transformer file, or `ORG/NAME[@REVISION]`.

    `variant` only chooses between two official files in one folder. Raises InputError when nothing is there.
    """
    path, name = _resolve(model)
    if path.is_file():
        return _official(path.parent, path.stem, path)
    if (path / INDEX).is_file():
        return _diffusers(path, name)
    return _official(path, name, _official_file(path, variant))


def _resolve(model: str | Path | None) -> tuple[Path, str]:
    """The local path of a model, and what to call it."""
    if model is None:
        if not BUNDLED.is_dir():
            raise InputError(f"{BUNDLED}: the bundled model is not in this installation; name another with --model")
        return BUNDLED, BUNDLED.name
    path = Path(model).expanduser()
    if path.exists():
        refuse_pickle(path)
        return path, path.resolve().name
    match = HUB_ID.fullmatch(str(model))
    if match is None or str(model).startswith("."):
        raise InputError(f"{model}: no such folder, and not a Hub id (ORG/NAME or ORG/NAME@REVISION)")
    return _snapshot(match["repository"], match["revision"])


def _snapshot(repository: str, revision: str | None) -> tuple[Path, str]:
    """A local copy of a Hub repository, and its name with the commit that this is.

    A revision is resolved to its commit first, so all files are of one state. Without network (or with the
    Hub's own offline switch) the cached copy is used.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = repository if revision is None else f"{repository}@{revision}"
    try:
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise InputError(f"{asked}: no such folder, and not a Hub id: {error}") from None
    except RevisionNotFoundError:
        raise InputError(f"{asked}: the Hub has no such revision") from None
    except RepositoryNotFoundError:
        raise InputError(f"{asked}: no such folder, and no such repository on the Hub (or no access)") from None
    except LocalEntryNotFoundError:
        raise InputError(f"{asked}: no such folder, not in the Hub cache, and the Hub cannot be reached") from None
    except Exception as error:  # the Hub's own, the disk's, or the transport's: httpx in its version 1, httpx2 in 2
        raise InputError(f"{asked}: cannot be fetched from the Hub: {_first_line(error)}") from None
    return path, f"{repository}@{path.name}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _component(folder: Path) -> Checkpoint | None:
    return Checkpoint(tensor_files(folder)) if folder.is_dir() else None


def _diffusers(root: Path, name: str) -> ModelFolder:
    settings = read_json(root / INDEX).get(SETTINGS, {})
    dit = _component(root / "transformer")
    if dit is None:
        raise InputError(f"{root}: no transformer/ beside {INDEX}")
    layouts.detect(dit, dit.where)
    text, processor = root / "text_encoder", root / "processor"
    return ModelFolder(
        name=name,
        root=root,
        layout="diffusers",
        dit=dit,
        dit_configs=(root / "transformer" / "config.json",),
        vae=_component(root / "vae"),
        vae_configs=(root / "vae" / "config.json",),
        text=text if text.is_dir() else None,
        processor=processor if processor.is_dir() else None,
        settings=_object(settings, root / INDEX),
    )


def _object(settings: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(settings, dict):
        raise InputError(f"{path}: {SETTINGS} must be an object")
    return settings


def _official_file(root: Path, variant_name: str | None) -> Path:
    """The transformer file of an official folder: the one there is, or the one of the wanted version."""
    found = [path for path in sorted(root.glob("step1x-edit*.safetensors")) if "img_in.weight" in Checkpoint([path])]
    if len(found) > 1 and variant_name is not None:
        wanted = variant(variant_name).version
        found = [path for path in found if version_of(Checkpoint([path])) == wanted] or found
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{root}: several models here ({names}); name the file instead of the folder")
    if not found:
        for path in sorted(root.iterdir()):
            if path.name.startswith("step1x-edit"):
                refuse_pickle(path)
        names = " or ".join(OFFICIAL_FILES[version] for version in ("v1.0", "v1.1"))
        raise InputError(f"{root}: no model here; looked for {INDEX} (diffusers) and {names} (official)")
    return found[0]


def _official(root: Path, name: str, file: Path) -> ModelFolder:
    dit = Checkpoint([file])
    if layouts.detect(dit, file) != "official":
        raise InputError(f"{file}: a part of a diffusers model; name its folder, the one with {INDEX}")
    vae, text = root / "vae.safetensors", root / QWEN
    beside, shared = file.with_suffix(".json"), root / "config.json"
    settings = read_json(beside).get(SETTINGS, {}) if beside.is_file() else {}
    return ModelFolder(
        name=name,
        root=root,
        layout="official",
        dit=dit,
        dit_configs=(beside, shared),
        vae=Checkpoint([vae]) if vae.is_file() else None,
        vae_configs=(vae.with_suffix(".json"), shared),
        text=text if text.is_dir() else None,
        processor=text if text.is_dir() else None,
        settings=_object(settings, beside),
    )
