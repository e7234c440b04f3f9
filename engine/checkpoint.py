"""Tensors in safetensors files: headers, one lazily mapped tensor at a time, and a streaming writer.

A file is eight bytes (the header's length, little endian), a JSON header {key: {dtype, shape,
data_offsets}}, and the data. The header is parsed here, not by the library, so that a bad file can be named
together with its key and so that sizes are known without touching a byte of data.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from step1x.engine.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own bound
SAMPLES, SAMPLE_BYTES = 64, 4096  # of the data, in a digest
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    key: str
    dtype: str  # as the format spells it: BF16, F8_E4M3, …
    shape: tuple[int, ...]
    start: int  # first byte in the file
    size: int  # bytes

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a format's dtype name."""
    import torch

    names = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
        "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16", "F32": "float32",
        "I32": "int32", "U32": "uint32", "F64": "float64", "I64": "int64", "U64": "uint64",
    }  # fmt: skip
    return getattr(torch, names[name])


def refuse_pickle(path: Path) -> None:
    """Raises InputError when the name is that of a pickle: reading one can run any code in it."""
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{path}: a pickle ({path.suffix}) can run code when read; only .safetensors files are")


def dtype_name(dtype: "torch.dtype") -> str:
    """A torch dtype as the format spells it."""
    return next(name for name in ITEM_BYTES if torch_dtype(name) == dtype)


def _header(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the file's size."""
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            lead = file.read(9)
            length = int.from_bytes(lead[:8], "little")
            if lead[:2] in (b"PK", b"\x80\x02"):
                raise InputError(f"{path}: a pickle can run code when read; only .safetensors files are")
            if len(lead) < 9 or lead[8:] != b"{" or not 2 <= length <= HEADER_LIMIT:
                raise InputError(f"{path}: not a safetensors file ({size:,} bytes)")
            header = lead[8:] + file.read(length - 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(header) < length:
        raise InputError(f"{path}: truncated: its header needs {8 + length:,} bytes, the file has {size:,}")
    return header, size


def _entry(path: Path, key: str, value: Any, data: int) -> Entry:
    """Checks one header line. `data` is the first byte behind the header."""
    if not key.isprintable():
        raise InputError(f"{path}: not a key: {key!r}")
    try:
        dtype, shape, (begin, end) = str(value["dtype"]), tuple(value["shape"]), value["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: {key}: broken header line") from None
    if dtype not in ITEM_BYTES:
        raise InputError(f"{path}: {key}: dtype {dtype} is not supported")
    if not whole or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise InputError(f"{path}: {key}: shape {list(shape)} and data offsets {begin}, {end} do not agree")
    return Entry(path, key, dtype, shape, data + begin, end - begin)


def entries(path: Path) -> dict[str, Entry]:
    """Every tensor of one file, in the order of its header. Reads the header only.

    Raises InputError, naming file and key, for a pickle, a file that is no safetensors, or a truncated one.
    """
    header, size = _header(path)
    try:
        lines = json.loads(header)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not a safetensors file (its header is no JSON)") from None
    data = 8 + len(header)
    found = {key: _entry(path, key, value, data) for key, value in lines.items() if key != "__metadata__"}
    beyond = [entry for entry in found.values() if entry.start + entry.size > size]
    if beyond:
        first = min(beyond, key=lambda entry: entry.start)
        raise InputError(
            f"{path}: truncated: {first.key} ends at byte {first.start + first.size:,}, "
            f"the file has {size:,}; fetch it again"
        )
    return found


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of one component folder: the shards of its index, or all that lie there.

    Raises InputError when there are none, or when a shard of the index is missing.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _shards(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            refuse_pickle(path)
        raise InputError(f"{folder}: no .safetensors file here")
    return files


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map in this index")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index}: shard {name!r} is not a plain file name")
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name}: missing, but {index.name} lists it")
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError naming the file when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


class Checkpoint(Mapping[str, Entry]):
    """The tensors of one or more files, by key. Only headers are read until a tensor is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises InputError for an unreadable file, or a key that lies in two files."""
        self.files = tuple(files)
        self._entries: dict[str, Entry] = {}
        for path in self.files:
            for key, entry in entries(path).items():
                if key in self._entries:
                    raise InputError(f"{path}: {key} is also in {self._entries[key].file.name}")
                self._entries[key] = entry

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def where(self) -> Path:
        """What to call these files in a message: the one file, or the folder of the shards."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    def tensor(self, key: str) -> "Tensor":
        """One tensor, mapped from its file: no byte is read before it is used.

        The mapping covers this tensor only and ends with it, so that a model that is copied tensor by
        tensor never has more than one of them twice in memory. Treat it as read-only (writes would stay
        private to it).
        """
        import torch

        entry = self._entries[key]
        dtype = torch_dtype(entry.dtype)
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        page = entry.start % mmap.ALLOCATIONGRANULARITY
        with entry.file.open("rb") as file:
            window = mmap.mmap(file.fileno(), entry.size + page, access=mmap.ACCESS_COPY, offset=entry.start - page)
        if hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
            window.madvise(mmap.MADV_WILLNEED)
        raw = torch.frombuffer(window, dtype=torch.uint8, offset=page, count=entry.size)
        return raw.view(dtype).view(entry.shape)


def digest(files: Iterable[Path]) -> str:
    """A cheap id of weights: SHA-256 over the files' names, sizes, headers and SAMPLES evenly spaced blocks of data.

    Reads some 300 KB of each file, so forty gigabytes take no longer than the header; two trainings of one
    architecture differ in every block.
    """
    lines = []
    for path in files:
        header, size = _header(path)
        found = hashlib.sha256(header)
        with path.open("rb") as file:
            for index in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1) if size > SAMPLE_BYTES else 0)
                found.update(file.read(SAMPLE_BYTES))
        lines.append(f"{path.name} {size} {found.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that a file is going to hold, and how to get it when its turn comes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    tensor: "Callable[[], Tensor]"

    @property
    def size(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Sink(Protocol):
    """What bytes are written to: an open file, or what stands before one."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def write(path: Path, tensors: Iterable[Planned]) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    Order and header follow the safetensors library, so equal tensors give equal bytes. The caller makes it atomic.
    """
    with path.open("wb") as file:
        write_to(file, in_order(tensors))
        file.flush()
        os.fsync(file.fileno())


def in_order(tensors: Iterable[Planned]) -> list[Planned]:
    """As the safetensors library orders them: widest dtype first, then by key."""
    return sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.key))


def write_to(file: Sink, tensors: Sequence[Planned]) -> None:
    """Writes a safetensors file from its beginning, tensor by tensor in the order given.

    The writer of the safetensors library would start every tensor at a multiple of its item size; readers do not need
    it.
    """
    lines: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        lines[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(lines, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for planned in tensors:
        value = planned.tensor()
        if value.numel() * value.element_size() != planned.size:
            raise RuntimeError(f"{planned.key}: {tuple(value.shape)} was planned as {planned.shape}")
        file.write(value.contiguous().reshape(-1).view(_bytes()).numpy().data)


def _bytes() -> "torch.dtype":
    import torch

    return torch.uint8
