"""Small models on disk, in both layouts, from the golden weights; a small random transformer and a step of it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from step1x.engine.dit import DiT, Rope, Step, Text
from step1x.engine.image import image_ids
from step1x.engine.text import Conditioner
from step1x.engine.variants import Variant
from step1x.training.recipe import dit_config
from step1x.training.tokenizer import count_template_tokens, small_text_model, train_tokenizer

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


@pytest.fixture
def small_dit() -> Callable[..., DiT]:
    """Makes a random transformer of width 32."""

    def make(depth: int = 2, single: int = 2, *, fp32_norms: bool = True, dtype: torch.dtype = torch.float64) -> DiT:
        torch.manual_seed(0)
        model = DiT(replace(dit_config(32, 2, 2, 24), depth=depth, depth_single=single), fp32_norms)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
        return model.to(dtype).requires_grad_(False)

    return make


@pytest.fixture
def step_arguments() -> Callable[..., tuple[Tensor, Step, Rope]]:
    """Makes what `DiT.velocity` takes: 12 image tokens, 5 text rows."""

    def make(dit: DiT, batch: int = 2, *, bias: bool = True) -> tuple[Tensor, Step, Rope]:
        generator, texts, grid = torch.Generator().manual_seed(1), 5, (2, 3)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dit.dtype)

        text = Text(
            random(batch, texts, dit.config.connector.in_channels),
            torch.ones(batch, texts, dtype=torch.long),
            bias=random(batch, texts) if bias else None,
        )
        step = dit.condition(dit.prepare(text), torch.full((batch,), 0.4, dtype=dit.dtype))
        rope = dit.rope(torch.zeros(1, texts, 3), image_ids(grid, (1, 1, 1)))
        return random(batch, 2 * grid[0] * grid[1], dit.config.in_channels), step, rope

    return make


@pytest.fixture
def small_conditioner() -> Callable[[Variant], Conditioner]:
    """Makes a random text model of width 32 in float64 for a variant, with a vocabulary of a few words."""

    def make(row: Variant) -> Conditioner:
        tokenizer = train_tokenizer(["make it snow", "remove the red circle", row.prefix] * 4, 400)
        torch.manual_seed(0)
        sizes = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 48}
        vision = {"vision_hidden": 16, "vision_depth": 2, "vision_heads": 2, "vision_intermediate": 24}
        model = small_text_model(tokenizer, **sizes, **vision).eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
        row = replace(
            row,
            template_tokens=count_template_tokens(tokenizer, row.prefix),
            text_tokens=80,
            min_pixels=4 * 28**2,
            max_pixels=24 * 28**2,
        )
        pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 1, "longest_edge": 1})
        return Conditioner(model.double(), tokenizer, pictures, row)

    return make
