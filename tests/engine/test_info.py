import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from step1x.engine import layouts, released
from step1x.engine.dit import DiT
from step1x.engine.errors import InputError
from step1x.engine.info import ComponentInfo, describe
from step1x.engine.vae import VAE
from step1x.engine.weights import shapes

Make = Callable[..., Path]
Shapes = Mapping[str, tuple[int, ...]]
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def sparse(path: Path, sizes: Shapes, dtype: str = "BF16") -> None:
    """A safetensors file of these tensors that takes no room on disk: its data is a hole."""
    lines, end = {}, 0
    for key, shape in sizes.items():
        size = BYTES[dtype] * torch.Size(shape).numel()
        lines[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(lines).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def full_dit(version: str) -> Shapes:
    """Shapes of the released transformer (§3.1, §2)."""
    with torch.device("meta"):
        return shapes(DiT(released.dit_config(version)))


def full_vae() -> Shapes:
    with torch.device("meta"):
        return shapes(VAE(released.VAE))


FILES = {
    "v1.0": "step1x-edit-i1258.safetensors",
    "v1.1": "step1x-edit-v1p1-official.safetensors",
    "v1.2": "step1x-edit-v1p2-official.safetensors",
}


def by_name(components: tuple[ComponentInfo, ...]) -> dict[str, ComponentInfo]:
    return {component.name: component for component in components}


@pytest.mark.parametrize(
    ("version", "parameters"), [("v1.0", 12_427_800_385), ("v1.1", 12_427_800_384), ("v1.2", 12_442_484_544)]
)
def test_a_released_official_folder(tmp_path: Path, version: str, parameters: int) -> None:
    """§3.12, §4. No config lies beside the weights."""
    sparse(tmp_path / FILES[version], full_dit(version))
    sparse(tmp_path / "vae.safetensors", full_vae(), "F32")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = describe(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB: headers only
    assert (found.layout, found.version, found.absent) == ("official", version, ("text_encoder",))
    dit, vae = by_name(found.components)["dit"], by_name(found.components)["vae"]
    assert dit.parameters == parameters
    assert dit.parts["connector"] == 536_621_824 + (version == "v1.0")
    assert dit.parts["modulation"] == 19 * 2 * 18432 * 3073 + 38 * 9216 * 3073 + 6144 * 3073
    assert dit.dtypes == {"BF16": parameters}
    assert dit.disk_bytes == dit.memory_bytes == 2 * parameters
    assert (vae.parameters, vae.parts["encoder"]) == (83_819_683, 34_274_208)
    assert found.sizes["dit"]["heads"] == 24
    assert found.sizes["dit"]["rope_axes"] == (16, 56, 56)
    assert found.sizes["dit"]["connector"]["heads"] == 32
    assert found.sizes["vae"]["groups"] == 32
    assert vae.memory_bytes == vae.disk_bytes * (0.5 if version == "v1.2" else 1)
    assert found.memory_bytes == dit.memory_bytes + vae.memory_bytes


def test_a_released_diffusers_folder(tmp_path: Path) -> None:
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    targets = layouts.to_diffusers(full_dit("v1.1"), layouts.dit_map(), 3072)
    sparse(tmp_path / "transformer" / "a.safetensors", {t.key: t.shape for t in targets[:600]}, "F8_E4M3")
    sparse(tmp_path / "transformer" / "b.safetensors", {t.key: t.shape for t in targets[600:]})
    targets = layouts.to_diffusers(full_vae(), layouts.vae_map(4), 0)
    sparse(tmp_path / "vae" / "a.safetensors", {t.key: t.shape for t in targets})
    text = {"model.embed_tokens.weight": (100, 8), "visual.patch_embed.proj.weight": (6, 5), "lm_head.weight": (9, 9)}
    sparse(tmp_path / "text_encoder" / "a.safetensors", text)
    found = describe(tmp_path)
    assert (found.preset, found.absent) == ("diffusers-v1.1", ())
    components = by_name(found.components)
    dit = components["dit"]
    assert dit.parameters == 12_427_800_384
    assert sum(dit.dtypes.values()) == dit.parameters
    assert dit.disk_bytes == dit.dtypes["F8_E4M3"] + 2 * dit.dtypes["BF16"]
    assert components["vae"].memory_bytes == 2 * 83_819_683
    assert components["text_encoder"].parameters == 830
    assert components["text_encoder"].parts == {"text_model": 800, "vision_tower": 30, "head (never loaded)": 81}
    assert components["text_encoder"].memory_bytes == 1660


def test_it_is_json(official: Make) -> None:
    found = describe(official())
    assert json.loads(json.dumps(found.as_json()))["components"][0]["name"] == "dit"


def test_a_folder_with_the_transformer_alone(official: Make) -> None:
    root = official()
    (root / "vae.safetensors").unlink()
    assert describe(root).absent == ("vae", "text_encoder")


def test_what_is_wrong_with_the_files_is_said(official: Make) -> None:
    root = official()
    path = root / FILES["v1.1"]
    save_file({**load_file(path), "stray": torch.ones(1)}, path)
    with pytest.raises(InputError, match="unexpected stray"):
        describe(root)
