import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from step1x.engine.checkpoint import ITEM_BYTES, Checkpoint, Planned, digest, tensor_files, torch_dtype, write
from step1x.engine.errors import InputError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    values = torch.arange(-3, 3, dtype=torch.float32).reshape(2, 3)
    made = {name: values.abs().to(dtype) for name, dtype in DTYPES.items()}
    return {**made, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "ключ": torch.ones(1)}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(wanted)
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key].double(), value.double()), key


def read(path: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint([path])
    return {key: checkpoint.tensor(key) for key in checkpoint}


def planned(values: dict[str, Tensor]) -> list[Planned]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return [Planned(key, names[v.dtype], tuple(v.shape), lambda v=v: v) for key, v in values.items()]  # type: ignore[misc]


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path, metadata={"note": "metadata is no tensor"})
    assert_same(read(path), tensors())


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, planned(tensors()))
    assert_same(load_file(path), tensors())
    assert_same(read(path), tensors())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_writes_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    values = {key: value for key, value in tensors().items() if value.dtype in (torch.float32, torch.bfloat16)}
    save_file(values, tmp_path / "library.safetensors", metadata={"format": "pt"})
    write(tmp_path / "ours.safetensors", planned(values))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_non_contiguous_tensors_are_written_in_order(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3).T
    write(tmp_path / "a.safetensors", planned({"a": value}))
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], value)


def test_every_dtype_of_the_table_exists() -> None:
    assert {name: torch_dtype(name).itemsize for name in ITEM_BYTES} == ITEM_BYTES


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    value = torch.tensor([1.5, -2.0], dtype=torch.float64)
    header = json.dumps({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}).encode()
    header += b" " * ((3 - len(header)) % 8)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + value.numpy().tobytes())
    assert torch.equal(Checkpoint([path]).tensor("a"), value)


def test_a_tensor_outlives_its_checkpoint_and_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    value = Checkpoint([path]).tensor("a")
    value.add_(1)
    assert value.tolist() == [2, 2, 2]
    assert load_file(path)["a"].tolist() == [1, 1, 1]


def with_header(lines: Any, data: bytes = b"") -> bytes:
    header = (lines if isinstance(lines, str) else json.dumps(lines)).encode()
    return len(header).to_bytes(8, "little") + header + data


def line(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"the.key": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "text": (b"<!DOCTYPE html> not found, sorry", "not a safetensors file"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
    "zip": (b"PK\x03\x04" + b"\0" * 40, "pickle"),
    "old pickle": (b"\x80\x02}q\x00X" + b"\0" * 40, "pickle"),
    "huge header": ((1 << 40).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "cut header": (with_header(line(), b"\0" * 8)[:30], "truncated: its header needs"),
    "cut data": (with_header(line(), b"\0" * 7), r"truncated: the\.key ends at byte"),
    "no json": (with_header("{nonsense}"), "not a safetensors file"),
    "deep json": (with_header('{"a":' * 50_000), "not a safetensors file"),
    "no object": (with_header('{"the.key": 3}'), r"the\.key: broken header line"),
    "no shape": (with_header({"the.key": {"dtype": "F32", "data_offsets": [0, 8]}}), r"the\.key: broken"),
    "dtype": (with_header(line(dtype="F4")), r"the\.key: dtype F4 is not supported"),
    "strange dtype": (with_header(line(dtype=[1])), r"the\.key: dtype \[1\] is not supported"),
    "odd key": (with_header({"a\nb": {}}), r"not a key: .a\\nb"),
    "negative": (with_header(line(shape=(-2,)), b"\0" * 8), r"the\.key: shape"),
    "backwards": (with_header(line(offsets=(8, 0)), b"\0" * 8), r"the\.key: shape"),
    "float shape": (with_header(line(shape=(2.0,)), b"\0" * 8), r"the\.key: shape"),
    "other size": (with_header(line(shape=(3,)), b"\0" * 8), r"the\.key: shape"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_file_is_one_line_with_its_name_and_key(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint([path])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PT"])
def test_pickles_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match=rf"model{suffix}: a pickle .* only \.safetensors"):
        Checkpoint([path])


def test_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Checkpoint([tmp_path / "none.safetensors"])
    with pytest.raises(InputError, match="Is a directory"):
        Checkpoint([tmp_path])


def test_a_key_in_two_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_file({"same.key": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"b\.safetensors: same\.key is also in a\.safetensors"):
        Checkpoint(paths)


def index(root: Path, content: object) -> None:
    (root / "model.safetensors.index.json").write_text(json.dumps(content))


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    for name in "abc":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    assert [path.name for path in tensor_files(tmp_path)] == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
    ]
    index(tmp_path, {"weight_map": {"c": "c.safetensors", "a": "a.safetensors"}})
    assert [path.name for path in tensor_files(tmp_path)] == ["a.safetensors", "c.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"weight_map": {"a": "gone.safetensors"}},
            r"gone\.safetensors: missing, but .*index\.json lists it",
        ),
        ({"weight_map": {"a": "../a.safetensors"}}, "not a plain file name"),
        ({"weight_map": {}}, "no weight_map"),
        ({}, "no weight_map"),
        ([1], "not a JSON object"),
    ],
)
def test_a_bad_index(tmp_path: Path, content: object, message: str) -> None:
    index(tmp_path, content)
    with pytest.raises(InputError, match=message):
        tensor_files(tmp_path)


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        tensor_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="a pickle"):
        tensor_files(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: save_file({"a": torch.ones(2)}, path),
        lambda path: save_file({"b": torch.ones(1)}, path),
        lambda path: path.rename(path.with_name("other.safetensors")),
        lambda path: save_file({"a": torch.zeros(1)}, path),
    ],
)
def test_digest_changes_with_name_header_and_data(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "z.safetensors"
    save_file({"a": torch.ones(1)}, path)
    save_file({"z": torch.ones(1)}, other)
    first = digest([path, other])
    assert digest([other, path]) == first
    assert len(first) == 64
    change(path)
    assert digest(sorted(tmp_path.glob("*.safetensors"))) != first
