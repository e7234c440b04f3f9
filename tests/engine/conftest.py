"""Small models on disk, in both layouts, from the golden weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "golden"
OFFICIAL_FILES = {
    "v1.0": "step1x-edit-i1258",
    "v1.1": "step1x-edit-v1p1-official",
    "v1.2": "step1x-edit-v1p2-official",
}


@pytest.fixture
def official(tmp_path: Path) -> Callable[..., Path]:
    """Makes an official folder (without a text model) of a version."""

    def make(version: str = "v1.1", name: str = "official") -> Path:
        root = tmp_path / name
        root.mkdir()
        tensors = load_file(GOLDEN / "dit_official.safetensors")
        if version != "v1.0":
            del tensors["connector.scale_factor"]
        if version == "v1.2":
            tensors |= load_file(GOLDEN / "dit_diffusers_v1p2_extra.safetensors")
        save_file(tensors, root / f"{OFFICIAL_FILES[version]}.safetensors")
        shutil.copy(GOLDEN / "dit_official.json", root / f"{OFFICIAL_FILES[version]}.json")
        shutil.copy(GOLDEN / "vae_official.safetensors", root / "vae.safetensors")
        shutil.copy(GOLDEN / "vae_official.json", root / "vae.json")
        return root

    return make


@pytest.fixture
def diffusers(tmp_path: Path) -> Callable[..., Path]:
    """Makes a diffusers folder (without a text model) of v1.1; `settings` go under step1x_engine."""

    def make(name: str = "diffusers", settings: dict[str, Any] | None = None) -> Path:
        root = tmp_path / name
        for part, golden in (("transformer", "dit_diffusers_v1p1"), ("vae", "vae_diffusers")):
            (root / part).mkdir(parents=True)
            shutil.copy(GOLDEN / f"{golden}.safetensors", root / part / "diffusion_pytorch_model.safetensors")
            shutil.copy(GOLDEN / f"{golden}.json", root / part / "config.json")
        index = {"_class_name": "Step1XEditPipeline"}
        if settings is not None:
            index["step1x_engine"] = settings  # type: ignore[assignment]
        (root / "model_index.json").write_text(json.dumps(index))
        return root

    return make
