"""The cache of embeddings: same bits as without, fewer forwards, and nothing on disk that can hurt."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from step1x.engine import Engine
from step1x.engine.caches import cache_folder, make_private, remove
from step1x.engine.cli import program
from step1x.engine.embeddings import SUFFIX, CachedConditioner, EmbeddingCache, Keys, alive
from step1x.engine.errors import InputError
from step1x.engine.text import Conditioner, Conditioning
from step1x.engine.variants import DIFFUSERS_V11, DIFFUSERS_V12, Variant

Build = Callable[[Variant], Conditioner]
PROMPTS = ["make it snow", "", "remove the red circle!", "make it snow"]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 160, 3), dtype=np.uint8))


def same(ours: Conditioning, theirs: Conditioning) -> bool:
    pairs = [(getattr(ours.text, name), getattr(theirs.text, name)) for name in ("tokens", "mask", "embeds", "quoted")]
    pairs.append((ours.ids, theirs.ids))
    return ours.valid == theirs.valid and all(a is b is None or torch.equal(a, b) for a, b in pairs)


def forwards(conditioner: Conditioner) -> Counter[str]:
    """Counts what runs from now on."""
    found: Counter[str] = Counter()
    for name, part in (("language", conditioner.model.language_model), ("vision", conditioner.model.visual)):
        part.register_forward_pre_hook(lambda *_, name=name: found.update([name]))
    return found


@pytest.mark.parametrize("row", [DIFFUSERS_V11, DIFFUSERS_V12], ids=lambda row: row.version)
def test_same_bits_and_fewer_forwards(small_conditioner: Build, tmp_path: Path, row: Variant) -> None:
    plain = small_conditioner(row).encode(picture(0), PROMPTS)
    first = CachedConditioner(small_conditioner(row), EmbeddingCache(tmp_path), lambda: "weights")
    count = forwards(first.conditioner)
    for kept, expected in zip(first.encode(picture(0), PROMPTS[:2]), plain, strict=False):
        assert same(kept, expected)
    assert count["vision"] == 1
    # Another process: what it knows, it knows from the disk.
    for prompts, language in ((PROMPTS[:2], 0), (PROMPTS, 1)):
        later = CachedConditioner(small_conditioner(row), EmbeddingCache(tmp_path), lambda: "weights")
        count = forwards(later.conditioner)
        for kept, expected in zip(later.encode(picture(0), prompts), plain, strict=False):
            assert same(kept, expected)
        # The template is read again only where the picture comes behind the instruction.
        assert count["language"] == language
        assert count["vision"] == 0
    # And in the same process from memory, other pictures in between.
    later.encode(picture(1), PROMPTS)
    count.clear()
    assert all(map(same, later.encode(picture(0), PROMPTS), plain))
    assert not count
    assert all(map(same, later.encode(None, PROMPTS[:1]), small_conditioner(row).encode(None, PROMPTS[:1])))


def test_not_shared_is_not_kept(small_conditioner: Build, tmp_path: Path) -> None:
    cached = CachedConditioner(small_conditioner(DIFFUSERS_V11), EmbeddingCache(tmp_path), lambda: "weights")
    count = forwards(cached.conditioner)
    cached.encode(picture(0), PROMPTS[:1])
    ran = count.total()
    cached.encode(picture(0), PROMPTS[:1], share=False)
    assert count.total() > ran
    assert len(cached.cache.files()) == 2


def test_a_model_whose_files_are_gone_is_not_kept(small_conditioner: Build, tmp_path: Path) -> None:
    said: list[str] = []
    cache = EmbeddingCache(tmp_path, say=said.append)
    cached = CachedConditioner(small_conditioner(DIFFUSERS_V11), cache, (tmp_path / "gone").read_text)
    for _ in range(2):
        assert len(cached.encode(picture(0), PROMPTS[:1])) == 1
    assert not cache.files()
    assert len(said) == 1
    assert "gone: no such file" in said[0]


def test_keys_depend_on_all_that_matters(small_conditioner: Build) -> None:
    encoder = small_conditioner(DIFFUSERS_V11)
    keys = [Keys.make(encoder, "a"), Keys.make(encoder, "b"), Keys.make(small_conditioner(DIFFUSERS_V12), "a")]
    encoder.model.float()
    keys.append(Keys.make(encoder, "a"))
    names = {key.picture(b"p") for key in keys} | {key.instruction(b"p", "x") for key in keys}
    names |= {keys[0].instruction(b"p", "y"), keys[0].instruction(b"q", "x")}
    assert len(names) == 2 * len(keys) + 2


def entry(seed: int = 0, rows: int = 100) -> dict[str, Tensor]:
    return {"rows": torch.randn(rows, 25, generator=torch.Generator().manual_seed(seed)), "ids": torch.arange(seed)}


def test_damage_is_said_and_healed(tmp_path: Path) -> None:
    said: list[str] = []
    chance = random.Random(0)
    for trial in range(30):
        EmbeddingCache(tmp_path).put("k", entry())
        file = tmp_path / f"k{SUFFIX}"
        content = bytearray(file.read_bytes())
        if trial % 3 == 0:
            content = content[: chance.randrange(len(content))]
        elif trial % 3 == 1:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            content += b"more"
        file.write_bytes(content)
        assert EmbeddingCache(tmp_path, say=said.append).get("k") is None
        assert len(said) == trial + 1
        assert f"k{SUFFIX} is damaged" in said[-1]
        assert not file.exists()


def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "kept")
    cache.put("k", entry())
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o777 for file in cache.files()] == [0o600]


def test_a_disk_of_no_use_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for folder, reason in ((tmp_path / "file" / "below", "not a directory"), (tmp_path / "open", "others may write")):
        said: list[str] = []
        cache = EmbeddingCache(folder, say=said.append)
        for key in "ab":
            assert cache.get(key) is None
            cache.put(key, entry())
        assert cache.get("a") is not None  # from memory
        assert len(said) == 1
        assert reason in said[0]


def test_reading_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EmbeddingCache(tmp_path).put("k", entry())

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    found = EmbeddingCache(tmp_path).get("k")
    assert found is not None
    assert torch.equal(found["rows"], entry()["rows"])


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, memory_bytes=1, disk_bytes=45_000)
    for index, key in enumerate("abcd"):
        cache.put(key, entry())
        os.utime(tmp_path / f"{key}{SUFFIX}", (index, index))
    assert cache.get("a") is not None  # used now
    cache.put("e", entry())  # five of 10,200 bytes: one too many
    assert "".join(file.stem for file in cache.files()) == "acde"
    cache.put("f", entry(rows=1000))  # larger than all that is allowed: it stays until the next
    assert [file.stem for file in cache.files()] == ["f"]


def test_memory_has_a_limit(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, memory_bytes=25_000, disk_bytes=0)
    for key in "abc":
        cache.put(key, entry())
    assert [key in cache for key in "abc"] == [False, True, True]
    assert cache.get("a") is None
    assert not cache.files()


WRITER = """
import sys
from pathlib import Path
import torch
from step1x.engine.embeddings import EmbeddingCache
cache, index = EmbeddingCache(Path(sys.argv[1])), 0
print("ready", flush=True)
while True:
    index += 1
    cache.put(f"k{index % 7}", {"rows": torch.full((40_000,), float(index % 7))})
"""


def test_killed_writers_leave_whole_files_or_none(tmp_path: Path) -> None:
    chance = random.Random(1)
    for _ in range(8):
        words = [sys.executable, "-c", WRITER, str(tmp_path)]
        writers = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(2)]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.05))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
            assert not alive(writer.pid)
        said: list[str] = []
        cache = EmbeddingCache(tmp_path, say=said.append)
        for index in range(7):
            found = cache.get(f"k{index}")
            assert found is None or torch.equal(found["rows"], torch.full((40_000,), float(index)))
        cache.put("mine", entry())
        assert not said
        assert not list(tmp_path.glob(".*"))


def test_an_engine_keeps_and_finds_them(tmp_path: Path) -> None:
    shown, edits, counts = Image.new("RGB", (64, 48), (90, 140, 60)), [], []
    for kept in (False, EmbeddingCache(tmp_path), EmbeddingCache(tmp_path)):
        engine = Engine.load(device="cpu", cache=kept)
        inner = engine.conditioner.conditioner if isinstance(engine.conditioner, CachedConditioner) else None
        count = forwards(inner or engine.conditioner)  # type: ignore[arg-type]
        edits.append(np.asarray(engine.edit(shown, "make it darker", seed=1, steps=2, size=64, guidance=2.0).image))
        counts.append(count.total())
    assert np.array_equal(edits[0], edits[1])
    assert np.array_equal(edits[0], edits[2])
    assert counts[0] == counts[1] > counts[2] == 0


def test_folders_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(program, ["cache", *words])
        assert result.exit_code == 0, result.output
        return result.output

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "embeddings: 0 files" in run("info")
    EmbeddingCache().put("k", entry())
    make_private(cache_folder() / "compiled" / "deep")
    (cache_folder() / "compiled" / "deep" / "code.so").write_bytes(b"12345")
    assert '"embeddings": {"files": 1, "bytes": 1' in run("info", "--json")
    assert '"compiled": {"files": 1, "bytes": 5}' in run("info", "--json")
    assert "removed 0.0 MB" in run("clear")
    assert not list(cache_folder().iterdir())
    run("clear")
    (cache_folder() / "embeddings").write_text("no folder")
    with pytest.raises(InputError, match="cannot be removed"):
        remove(cache_folder() / "embeddings")
