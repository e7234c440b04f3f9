import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from step1x.engine import save as writers
from step1x.engine.checkpoint import Checkpoint
from step1x.engine.convert import convert
from step1x.engine.errors import InputError
from step1x.engine.folder import locate
from step1x.engine.weights import build_dit, build_vae

Make = Callable[..., Path]
QWEN = "Qwen2.5-VL-7B-Instruct"
FILES = {
    "v1.0": "step1x-edit-i1258.safetensors",
    "v1.1": "step1x-edit-v1p1-official.safetensors",
    "v1.2": "step1x-edit-v1p2-official.safetensors",
}


def tensors(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder under part/key, read by the library."""
    found = {}
    for path in sorted(root.rglob("*.safetensors")):
        part = "vae" if "vae" in path.as_posix().removeprefix(root.as_posix()) else "dit"
        found.update({f"{part}/{key}": value for key, value in load_file(path).items()})
    return found


def bits(values: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    def raw(value: torch.Tensor) -> bytes:
        return bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy())

    return {key: (value.dtype, tuple(value.shape), raw(value)) for key, value in values.items()}


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def with_dtypes(path: Path, name: str) -> None:
    """Casts a file to fp8, but norms to bf16, as community files are."""
    if name == "float32":
        return
    cast = {
        key: value.to(torch.bfloat16 if "norm" in key or name == "bfloat16" else torch.float8_e4m3fn)
        for key, value in load_file(path).items()
    }
    save_file(cast, path)


@pytest.mark.parametrize(("version", "dtype"), [("v1.0", "fp8"), ("v1.1", "float32"), ("v1.2", "bfloat16")])
def test_there_and_back_is_byte_identical(official: Make, tmp_path: Path, version: str, dtype: str) -> None:
    root = official(version)
    with_dtypes(root / FILES[version], dtype)
    there = convert(root, tmp_path / "there", "diffusers", shard_bytes=100_000)
    back = convert(there, tmp_path / "back", "official")
    assert bits(tensors(back)) == bits(tensors(root))
    again = convert(back, tmp_path / "again", "diffusers", shard_bytes=100_000)
    assert contents(again) == contents(there)
    assert contents(convert(again, tmp_path / "last", "official")) == contents(back)
    assert locate(there).version == locate(back).version == version


@pytest.mark.golden
def test_golden_files_convert_into_each_other(official: Make, diffusers: Make, tmp_path: Path) -> None:
    """The golden diffusers weights were converted by other code from the same official ones."""
    one, other = official(), diffusers()
    assert bits(tensors(convert(one, tmp_path / "one", "diffusers"))) == bits(tensors(other))
    assert bits(tensors(convert(other, tmp_path / "other", "official"))) == bits(tensors(one))


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_converted_model_loads_as_the_same_model(official: Make, tmp_path: Path, layout: str) -> None:
    root = official("v1.0")
    folders = [locate(root), locate(convert(root, tmp_path / "new", layout))]  # type: ignore[arg-type]
    dits = [build_dit(folder, fp32_norms=True, device="cpu", dtype=torch.float32) for folder in folders]
    vaes = [build_vae(folder, device="cpu", dtype=torch.float32) for folder in folders]
    for one, other in (dits, vaes):
        assert one.config == other.config
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert folders[0].variant() == folders[1].variant()


def test_the_preset_and_its_overrides_travel_along(diffusers: Make, tmp_path: Path) -> None:
    root = diffusers(settings={"variant": "diffusers-v1.1", "overrides": {"text_tokens": 64}})
    there = convert(root, tmp_path / "there", "official")
    assert locate(there).variant() == locate(root).variant()
    assert locate(there).variant().text_tokens == 64
    assert locate(convert(there, tmp_path / "back", "diffusers")).variant() == locate(root).variant()


def test_shards_and_their_index(official: Make, tmp_path: Path) -> None:
    folder = convert(official(), tmp_path / "new", "diffusers", shard_bytes=200_000) / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert 2 < len(shards) <= 6  # 773 KB in all
    held = {key: path.name for path in shards for key in Checkpoint([path])}
    assert held == index["weight_map"]
    sizes = [sum(entry.size for entry in Checkpoint([path]).values()) for path in shards]
    assert max(sizes) <= 200_000
    assert sum(sizes) == index["metadata"]["total_size"]


def test_a_small_network_is_one_file(official: Make, tmp_path: Path) -> None:
    root = convert(official(), tmp_path / "new", "diffusers")
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def snapshot(folder: Path) -> None:
    """A folder with the files of a Qwen snapshot, as `hf download` leaves them."""
    names = ("config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json", "extra/notes.txt")
    for name in (*names, ".cache/huggingface/x.lock", ".gitattributes"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for shard in (1, 2):
        save_file({f"{shard}": torch.ones(shard)}, folder / f"model-{shard}.safetensors")
    weight_map = {"weight_map": {"1": "model-1.safetensors", "2": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))


def test_the_text_model_is_divided_linked_and_joined_again(official: Make, tmp_path: Path) -> None:
    root = official()
    snapshot(root / QWEN)
    there = convert(root, tmp_path / "there", "diffusers")
    assert sorted(contents(there / "text_encoder")) == [
        "config.json",
        "generation_config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(contents(there / "processor")) == ["extra/notes.txt", "preprocessor_config.json", "tokenizer.json"]
    assert os.path.samefile(there / "text_encoder" / "model-1.safetensors", root / QWEN / "model-1.safetensors")
    back = contents(convert(there, tmp_path / "back", "official") / QWEN)
    assert back == {key: value for key, value in contents(root / QWEN).items() if not key.startswith(".")}


def test_links_of_the_hub_cache_are_followed(official: Make, tmp_path: Path) -> None:
    root = official()
    snapshot(root / "blobs")
    (root / QWEN).mkdir()
    for name in ("config.json", "model-1.safetensors", "tokenizer.json"):
        (root / QWEN / name).symlink_to(root / "blobs" / name)
    there = convert(root, tmp_path / "there", "diffusers")
    assert not (there / "text_encoder" / "config.json").is_symlink()
    assert (there / "processor" / "tokenizer.json").read_text() == "tokenizer.json"


def test_files_are_copied_where_they_cannot_be_linked(
    official: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another disk")

    root = official()
    snapshot(root / QWEN)
    monkeypatch.setattr(os, "link", refuse)
    there = convert(root, tmp_path / "there", "diffusers")
    assert (there / "processor" / "tokenizer.json").read_text() == "tokenizer.json"
    assert not os.path.samefile(there / "processor" / "tokenizer.json", root / QWEN / "tokenizer.json")


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_nothing_is_overwritten(official: Make, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="target: exists already; nothing is overwritten"):
        convert(official(), target, "diffusers")


def test_a_failure_leaves_nothing_behind(official: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    root = official()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(writers, "_write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(root, tmp_path / "target", "diffusers")
    assert sorted(tmp_path.iterdir()) == before


def test_a_bad_model_leaves_nothing_behind(official: Make, tmp_path: Path) -> None:
    root = official()
    save_file({**load_file(root / FILES["v1.1"]), "stray": torch.ones(1)}, root / FILES["v1.1"])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="unexpected stray"):
        convert(root, tmp_path / "target", "diffusers")
    assert sorted(tmp_path.iterdir()) == before


def test_parts_in_different_dtypes_cannot_be_fused(diffusers: Make, tmp_path: Path) -> None:
    root = diffusers()
    path = root / "transformer" / "diffusion_pytorch_model.safetensors"
    key = "transformer_blocks.0.attn.to_q.weight"
    values = load_file(path)
    save_file({**values, key: values[key].half()}, path)
    with pytest.raises(InputError, match=r"the parts of double_blocks\.0\.img_attn\.qkv\.weight are F16 and F32"):
        convert(root, tmp_path / "target", "official")
    assert not (tmp_path / "target").exists()


def test_a_full_disk_is_noticed_before_writing(official: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(InputError, match=r"target: needs 0\.0 GB, the disk has 0\.0 GB left"):
        convert(official(), tmp_path / "target", "diffusers")


def test_a_target_that_cannot_be_made(official: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        convert(official(), tmp_path / "file" / "target", "diffusers")
    convert(official(name="second"), tmp_path / "new" / "parents" / "target", "official")
    assert (tmp_path / "new" / "parents" / "target" / "vae.safetensors").is_file()
