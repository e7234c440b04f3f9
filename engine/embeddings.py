"""What the text model made of pictures and instructions, kept in memory and on disk, so that it is made once.

Entries are of two kinds: an instruction about a picture (its text rows, so no forward runs at all), and a picture (the
vision tower's output, keys and values of template and picture, so a new instruction reads its own few tokens). A key
is a digest of all that an entry depends on, and strings are always read in the same pieces (prefix.py), so results
are the same bits with and without the cache.

A file is the SHA-256 of the rest, then safetensors. It appears whole or not at all, only its owner may read it, and one
that does not fit its digest is removed and made again.
"""

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from step1x.engine.caches import cache_folder, make_private
from step1x.engine.dit import Text
from step1x.engine.prefix import Reading
from step1x.engine.text import Conditioner, Conditioning, Seen, black_picture, digest_of, padded
from step1x.engine.text_ids import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

MEMORY_BYTES = 256_000_000
DISK_BYTES = 4_000_000_000  # some hundred pictures of the released models, at 31 MB each
SUFFIX = ".embedding"
DIGEST_BYTES = 32
Entry = Mapping[str, Tensor]


class EmbeddingCache:
    """Entries by key: the ones used last in memory, all of them in files, the oldest dropped beyond a size.

    Threads and processes may share a folder. A disk that cannot be read or written costs the warmth, not the edit.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        memory_bytes: int = MEMORY_BYTES,
        disk_bytes: int = DISK_BYTES,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        """folder: default the user's. disk_bytes 0: nothing is read from or written to disk. say: takes warnings."""
        self.folder = cache_folder() / "embeddings" if folder is None else folder
        self._memory: OrderedDict[str, Entry] = OrderedDict()
        self._limits = (memory_bytes, disk_bytes)
        self.say = say
        self._lock = threading.Lock()
        self._usable = disk_bytes > 0
        self._checked = False

    def get(self, key: str) -> Entry | None:
        """The entry of a key, on the CPU; None if there is none, or if its file is damaged."""
        with self._lock:
            found = self._memory.get(key)
            if found is not None:
                self._memory.move_to_end(key)
                return found
        found = self._read(key) if self._on_disk() else None
        if found is not None:
            self._remember(key, found)
        return found

    def __contains__(self, key: str) -> bool:
        return key in self._memory or (self._on_disk() and (self.folder / f"{key}{SUFFIX}").exists())

    def put(self, key: str, entry: Entry) -> None:
        entry = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in entry.items()}
        self._remember(key, entry)
        if self._on_disk():
            self._write(key, entry)

    def files(self) -> list[Path]:
        """Of the entries on disk."""
        return sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder.is_dir() else []

    def _on_disk(self) -> bool:
        """Whether files may be used: a folder that others may write to is not."""
        if self._usable and not self._checked:
            self._checked = True
            try:
                make_private(self.folder)
            except OSError as error:
                self._give_up("used", error)
        return self._usable

    def _remember(self, key: str, entry: Entry) -> None:
        with self._lock:
            self._memory[key] = entry
            self._memory.move_to_end(key)
            total = sum(size(one.values()) for one in self._memory.values())
            while total > self._limits[0] and len(self._memory) > 1:
                total -= size(self._memory.popitem(last=False)[1].values())

    def _read(self, key: str) -> Entry | None:
        file = self.folder / f"{key}{SUFFIX}"
        try:
            content = file.read_bytes()
            with suppress(OSError):
                os.utime(file)  # it was used now
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up("read", error)
            return None
        try:
            if hashlib.sha256(content[DIGEST_BYTES:]).digest() == content[:DIGEST_BYTES]:
                return from_bytes(content[DIGEST_BYTES:])
        except SafetensorError:
            pass
        self.say(f"{file} is damaged: its embedding is computed again")
        with suppress(OSError):
            file.unlink()
        return None

    def _write(self, key: str, entry: Entry) -> None:
        content = to_bytes(dict(entry))
        temporary = self.folder / f".{os.getpid()}.{threading.get_ident()}.{key}"
        try:
            make_private(self.folder)  # it may have been removed since
            self._sweep()
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{key}{SUFFIX}")
            self._trim()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self._give_up("written", error)

    def _give_up(self, what: str, error: OSError) -> None:
        """Says once that the disk is of no use, and goes on without it."""
        self._usable = False
        self.say(f"embeddings are not kept: {self.folder} cannot be {what}: {(error.strerror or str(error)).lower()}")

    def _sweep(self) -> None:
        """Removes what processes that were killed while they wrote have left."""
        for file in self.folder.glob(".*.*.*"):
            process = file.name.split(".")[1]
            if process.isdecimal() and not alive(int(process)):
                file.unlink(missing_ok=True)

    def _trim(self) -> None:
        """Removes the files that were used longest ago, until the rest are within the limit."""
        facts = []
        for file in self.files():
            try:
                found = file.stat()
            except FileNotFoundError:  # another process was faster
                continue
            facts.append((found.st_mtime_ns, found.st_size, file))
        total = sum(count for _, count, _ in facts)
        for _, count, file in sorted(facts)[:-1]:
            if total <= self._limits[1]:
                break
            file.unlink(missing_ok=True)
            total -= count


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def alive(process: int) -> bool:
    """Whether a process of that number runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of entries; `of` is everything about the text model that an embedding depends on."""

    of: str

    @classmethod
    def make(cls, conditioner: Conditioner, made_by: str) -> "Keys":
        """made_by: a digest of the text model's files and of the programs."""
        model, device = conditioner.model, conditioner.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        parts = [made_by, conditioner.settings, str(model.dtype), gpu]
        return cls(hashlib.sha256("\0".join(parts).encode()).hexdigest())

    def picture(self, digest: bytes) -> str:
        return hashlib.sha256(f"picture {self.of} ".encode() + digest).hexdigest()

    def instruction(self, digest: bytes, words: str) -> str:
        return hashlib.sha256(f"instruction {self.of} ".encode() + digest + words.encode()).hexdigest()


def programs() -> str:
    """Digest of what makes an embedding: versions, and our modules, for those who change them between two releases."""
    found = hashlib.sha256(" ".join(version(name) for name in ("step1x-engine", "torch", "transformers")).encode())
    for name in ("embeddings", "prefix", "quotes", "qwen", "text", "text_ids", "tokens", "vision_size"):
        found.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return found.hexdigest()


class CachedConditioner:
    """Stands in for a `Conditioner`: encodes what the cache does not have."""

    def __init__(self, conditioner: Conditioner, cache: EmbeddingCache, digest: Callable[[], str]) -> None:
        """digest: `Components.text_digest`."""
        self.conditioner = conditioner
        self.cache = cache
        self._digest = digest

    @cached_property
    def _made_by(self) -> str:
        """Found when it is first needed, since it reads files; "" if they are gone."""
        try:
            return f"{self._digest()} {programs()}"
        except OSError as error:
            self.cache.say(f"embeddings are not kept: {error.filename}: {(error.strerror or str(error)).lower()}")
            return ""

    def encode(self, image: "Image | None", prompts: Sequence[str], *, share: bool = True) -> list[Conditioning]:
        """As `Conditioner.encode`. With share False the cache is neither read nor written."""
        inner = self.conditioner
        if not share or not self._made_by:
            return inner.encode(image, prompts, share=share)
        shown = black_picture() if image is None else image
        digest, keys = digest_of(shown), Keys.make(inner, self._made_by)
        names = [keys.instruction(digest, prompt) for prompt in prompts]
        found = {name: self.cache.get(name) for name in dict.fromkeys(names)}
        missing = {name: prompt for name, prompt in zip(names, prompts, strict=True) if found[name] is None}
        made: dict[str, Conditioning] = {}
        if missing:
            known = self._recall(digest, keys)
            encoded = inner.encode(shown, list(missing.values()))
            made = dict(zip(missing, encoded, strict=True))
            for name, one in made.items():
                self.cache.put(name, packed(one))
            if not known:
                self._keep(keys)
        return [made[name] if name in made else self._unpacked(found[name]) for name in names]

    def _unpacked(self, entry: Entry | None) -> Conditioning:
        assert entry is not None
        return unpacked(entry, self.conditioner)

    def _recall(self, digest: bytes, keys: Keys) -> bool:
        """Gives the conditioner what the cache knows of a picture; whether it knows anything."""
        key = keys.picture(digest)
        seen, _ = self.conditioner.known
        if seen is not None and seen.digest == digest:
            return key in self.cache
        entry = self.cache.get(key)
        if entry is not None:
            self.conditioner.recall(*recalled(entry, digest, self.conditioner))
        return entry is not None

    def _keep(self, keys: Keys) -> None:
        """Keeps what the conditioner knows. If another thread has shown it a picture since, the key is of that one."""
        seen, readings = self.conditioner.known
        if seen is not None and readings and readings[-1].picture in (b"", seen.digest):
            self.cache.put(keys.picture(seen.digest), remembered(seen, readings))


def packed(one: Conditioning) -> Entry:
    """A conditioning without its padding."""
    text, rows = one.text, slice(0, one.valid)
    parts = {"tokens": text.tokens, "mask": text.mask, "embeds": text.embeds, "quoted": text.quoted, "ids": one.ids}
    return {name: part[:, rows] for name, part in parts.items() if part is not None}


def unpacked(entry: Entry, conditioner: Conditioner) -> Conditioning:
    """The conditioning of an entry, on the model's device, padded as `Conditioner.encode` pads it."""
    variant, device = conditioner.variant, conditioner.device
    parts = {name: tensor.to(device) for name, tensor in entry.items()}
    text = Text(parts["tokens"], parts["mask"], embeds=parts.get("embeds"), quoted=parts.get("quoted"))
    one = Conditioning(text=text, ids=parts["ids"], valid=text.tokens.shape[1])
    return padded(one, variant.text_tokens) if variant.pad_text else one


def remembered(seen: Seen, readings: Sequence[Reading]) -> Entry:
    """A picture as the text model left it. The last reading holds the ones before it; `stops` says where they end."""
    last, grid = readings[-1], seen.grid
    entry = {
        "features": seen.features,
        "grid": torch.tensor([grid.rows, grid.columns, grid.factor, grid.width, grid.height]),
        "ids": torch.tensor(last.ids),
        "hidden": last.hidden,
        "stops": torch.tensor([len(one.ids) for one in readings]),
        "pictured": torch.tensor([int(one.picture != b"") for one in readings]),
    }
    for index, (keys, values) in enumerate(last.layers):
        entry |= {f"keys.{index:03}": keys, f"values.{index:03}": values}
    return entry


def recalled(entry: Entry, digest: bytes, conditioner: Conditioner) -> tuple[Seen, tuple[Reading, ...]]:
    """What `remembered` packed, on the model's device."""
    device = conditioner.device
    seen = Seen(digest, entry["features"].to(device), Grid(*entry["grid"].tolist()))
    ids, hidden = entry["ids"].tolist(), entry["hidden"].to(device)
    count = sum(name.startswith("keys.") for name in entry)
    layers = [(entry[f"keys.{index:03}"].to(device), entry[f"values.{index:03}"].to(device)) for index in range(count)]
    readings = tuple(
        Reading(
            ids[:stop],
            digest if pictured else b"",
            hidden[:stop],
            [(keys[:, :, :stop], values[:, :, :stop]) for keys, values in layers],
        )
        for stop, pictured in zip(entry["stops"].tolist(), entry["pictured"].tolist(), strict=True)
    )
    return seen, readings
