"""Building engines: what decides the key, what is refused, and everything that can go wrong on the way."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from step1x.engine import Engine, build, config_file, layouts, store
from step1x.engine.build import find_or_build, find_source
from step1x.engine.caches import files
from step1x.engine.checkpoint import Planned, write
from step1x.engine.dit import DiT
from step1x.engine.errors import InputError
from step1x.engine.folder import BUNDLED
from step1x.engine.parts import load_engine_folder
from step1x.engine.store import MANIFEST, Manifest, engines_folder
from step1x.profiles import Profile, Weights, load_profile

CPU = load_profile("cpu")
DISTURBED = Path(__file__).with_name("disturbed_builds.py")
DIT = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return engines_folder()


@pytest.fixture
def whole(caches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine in this test's cache, built once."""
    first = tmp_path_factory.getbasetemp() / "bundled-engine"
    if not first.exists():
        find_or_build(None, CPU, say=quiet, into=first)
    place = caches / Manifest.read(first).key
    caches.mkdir(parents=True, mode=0o700)
    shutil.copytree(first, place)
    return place


def quiet(_: str) -> None:
    pass


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "model"))


def test_an_engine_edits_as_its_source(whole: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    ours, theirs = Engine(load_engine_folder(whole, device="cpu")), Engine.load(profile="cpu", cache=False)
    edits = [engine.edit(picture, "make it darker", seed=1, steps=1, size=64) for engine in (ours, theirs)]
    assert edits[0].image.tobytes() == edits[1].image.tobytes()
    assert edits[0].metadata == edits[1].metadata


def test_an_engine_is_found_again(whole: Path) -> None:
    before = files(whole)
    said: list[str] = []
    assert find_or_build(None, CPU, say=said.append) == whole
    assert not said
    assert files(whole) == before
    assert find_or_build(BUNDLED, CPU, say=said.append) == whole


def test_a_cache_that_can_only_be_read_is_enough(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "rename", "unlink"):
        monkeypatch.setattr(Path, name, refused)
    assert find_or_build(None, CPU, say=quiet) == whole


def key(model: Path | None = None, profile: Profile = CPU, **options: Any) -> str:
    blocks = options.get("blocks")
    return build.Order.of(find_source(model, **options), profile, blocks).key


def test_what_changes_an_engine_changes_its_key(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name everywhere, so that only contents count."""
    model = model.rename(model.with_name(BUNDLED.name))
    found = {key(), key(model)}
    assert len(found) == 1
    changed = [CPU.model_copy(update={"dtype": "bfloat16"}), CPU.model_copy(update={"weights": Weights(text="int8")})]
    found |= {key(profile=profile) for profile in changed}
    found |= {key(blocks=1), key(random=True)}
    assert len(found) == 5
    for file in (model / "processor" / "tokenizer_config.json", model / "text_encoder" / "config.json"):
        file.write_text(file.read_text() + " ")
        found.add(key(model))
    assert len(found) == 6  # a config counts by what it says
    tensors = load_file(model / DIT)
    tensors["proj_out.bias"][0] += 1
    save_file(tensors, model / DIT)
    found.add(key(model))
    with monkeypatch.context() as patched:
        patched.setattr(build, "versions", lambda: {"torch": "3"})
        found.add(key())
    monkeypatch.setattr(build, "architecture", lambda _: "sm_90")
    found.add(key())
    assert len(found) == 9


def test_nothing_is_said_on_standard_output(caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    place = find_or_build(None, CPU, say=said.append)
    assert place.parent == caches
    assert capsys.readouterr() == ("", "")
    assert said == [f"building the engine of step1x-tiny for cpu in {place}"]


def test_random_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    profile = CPU.model_copy(update={"weights": Weights(dit="fp8")})
    one, other = (find_or_build(None, profile, say=quiet, random=True, into=tmp_path / name) for name in "ab")
    assert Manifest.read(one).files == Manifest.read(other).files
    assert Manifest.read(one).facts["source"]["name"] == "random-step1x-tiny"
    loaded = load_engine_folder(one, device="cpu")
    assert loaded.dit.img_in.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(loaded.dit.img_in.weight[:, 0], loaded.dit.txt_in.weight[:, 0])
    assert Engine(loaded).name == "random-step1x-tiny"


def test_the_first_blocks_only(tmp_path: Path) -> None:
    said: list[str] = []
    folder = find_or_build(None, CPU, say=said.append, blocks=1, into=tmp_path / "engine")
    assert "at most 1 double and 1 single blocks" in said[1]
    assert Manifest.read(folder).facts["blocks"] == 1
    short, full = load_engine_folder(folder, device="cpu").dit, Engine.load(profile="cpu").dit
    assert (short.config.depth, short.config.depth_single) == (1, 1)
    state = full.state_dict()
    assert len(short.state_dict()) < len(state)
    assert all(torch.equal(value, state[name]) for name, value in short.state_dict().items())


def damaged(name: str, how: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        if how == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif how == "flipped":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content)
        elif how == "gone":
            path.unlink()
        else:
            path.write_bytes(b"something else")

    return spoil


NAMES = (
    "dit.safetensors",
    "folded.safetensors",
    "text.safetensors",
    "config.json",
    "processor/tokenizer.json",
    MANIFEST,
)


@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "replaced"])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_named_and_made_again(whole: Path, name: str, how: str) -> None:
    manifest = Manifest.read(whole)
    damaged(name, how)(whole)
    before = {path: path.stat().st_ino for path in files(whole) if path != whole / name}
    verify = how == "flipped" and name.endswith(".safetensors")
    if not verify:
        with pytest.raises(InputError, match=f"{name}"):
            load_engine_folder(whole, device="cpu")
    said: list[str] = []
    assert find_or_build(None, CPU, say=said.append, verify=verify) == whole
    assert f"{name}" in said[0]
    assert "it is built again" in said[0]
    assert Manifest.read(whole).files == manifest.files
    assert not store.faults(whole, manifest, hashes=True)
    assert not [path for path in whole.parent.iterdir() if path.name.startswith(".")]
    if name != MANIFEST:  # without which nothing is known of the others
        rest = {path: inode for path, inode in before.items() if path != whole / MANIFEST}
        assert {path: path.stat().st_ino for path in rest} == rest


def test_a_damaged_file_is_made_again_or_said_to_need_its_source(whole: Path, model: Path) -> None:
    """A file with bytes of the same size is good until it is verified."""
    damaged("vae.safetensors", "flipped")(whole)
    said: list[str] = []
    find_or_build(None, CPU, say=said.append)
    assert not said
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model/vae: no \.safetensors file here"):
        find_or_build(model, CPU, say=said.append)


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    target.mkdir()
    target.chmod(0o775)  # as some systems make folders; it is empty, and a private one takes its place
    assert find_or_build(None, CPU, say=quiet, into=target) == target
    assert find_or_build(None, CPU, say=quiet, into=target) == target
    with pytest.raises(InputError, match=r"engine: another engine is here; remove it or choose another folder"):
        find_or_build(None, CPU, say=quiet, into=target, blocks=1)
    (target / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match=r"manifest\.json: damaged .*; remove it or choose another folder"):
        find_or_build(None, CPU, say=quiet, into=target)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for taken in (mine, mine / "thesis.txt"):
        with pytest.raises(InputError, match="remove it or choose another folder"):
            find_or_build(None, CPU, say=quiet, into=taken)
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "mine"]


def test_folders_that_others_may_write_to_are_refused(whole: Path, tmp_path: Path) -> None:
    whole.chmod(0o770)
    with pytest.raises(InputError, match="others may write to it; nothing is loaded from there"):
        find_or_build(None, CPU, say=quiet)
    shutil.rmtree(whole)
    whole.parent.chmod(0o777)
    with pytest.raises(InputError, match="the engine cannot be written: others may write to it"):
        find_or_build(None, CPU, say=quiet)
    whole.parent.chmod(0o700)
    partial = whole.with_name(f".{whole.name}.partial")
    partial.mkdir()
    partial.chmod(0o777)
    with pytest.raises(InputError, match="the engine cannot be written: others may write to it"):
        find_or_build(None, CPU, say=quiet)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "read-only file system"), (errno.EACCES, "permission denied"), (errno.ENOSPC, "no space left")],
)
def test_a_disk_that_refuses_is_one_line(
    caches: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refused)
        with pytest.raises(InputError, match=f"the engine cannot be written: {words}"):
            find_or_build(None, CPU, say=quiet)
    assert not caches.exists()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refused)
        with pytest.raises(InputError, match=f"the engine cannot be written: {words}"):
            find_or_build(None, CPU, say=quiet)
    assert not [path for path in caches.iterdir() if not path.name.startswith(".")]


def test_a_cache_below_a_file_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file/step1x-engine.*: the engine cannot be written: not a directory"):
        find_or_build(None, CPU, say=quiet)


def test_a_disk_too_small_is_said_before_the_work(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1_000_000))
    with pytest.raises(InputError, match=r"needs 0\.0 GB, the disk has 0\.0 GB left"):
        find_or_build(None, CPU, say=quiet)
    assert not list(caches.rglob("*.safetensors"))


def test_a_disk_that_fills_up_is_one_line_and_the_rest_is_kept(caches: Path) -> None:
    """A limit of the file size acts as a disk that is full in the middle of a large file."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, old[1]))
    try:
        with pytest.raises(InputError, match="the engine cannot be written: file too large"):
            find_or_build(None, CPU, say=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    (partial,) = caches.iterdir()
    left = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert sorted(left) == ["folded.safetensors", "text.safetensors", "vae.safetensors", "vision.safetensors"]
    place = find_or_build(None, CPU, say=quiet)
    assert {name: (place / name).stat().st_ino for name in left} == left
    assert [path.name for path in caches.iterdir()] == [place.name]


def test_a_quantised_layer_is_made_once_and_dropped() -> None:
    reads: list[int] = []

    def weight() -> torch.Tensor:
        reads.append(1)
        return torch.ones(16, 32)

    layer = build.Quantised("int4-weight", weight)
    for name in ("weight_scale", "weight", "weight_zero"):
        layer.take(name)
    assert len(reads) == 1
    assert not layer._made


def test_files_are_those_of_the_format(whole: Path) -> None:
    for path in whole.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.keys()
            assert file.metadata() == {"format": "pt"}


MEASURE = """
import sys
from pathlib import Path
from step1x.engine.build import find_or_build
from step1x.profiles import Weights, load_profile
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
profile = load_profile("cpu").model_copy(update={"dtype": "bfloat16", "weights": Weights(dit=sys.argv[2])})
find_or_build(None, profile, say=str, into=sys.argv[3])  # what is imported late
before = peak()
folder = find_or_build(sys.argv[1], profile, say=str, into=sys.argv[4])
print(before, peak(), (folder / "dit.safetensors").stat().st_size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("scheme", "size"), [("plain", 0.52e9), ("fp8", 0.26e9)])
def test_a_build_has_one_layer_in_memory(model: Path, tmp_path: Path, scheme: str, size: float) -> None:
    """The largest layer is linear1 of a single block: 59 MB in bfloat16; quantising takes float32 copies of rows."""
    config = replace(
        find_source(model).config.dit,
        hidden_size=2048, heads=16, depth=1, depth_single=3, mlp_hidden=8192, rope_axes=(16, 56, 56),
    )  # fmt: skip
    with torch.device("meta"):
        official = {name: tuple(value.shape) for name, value in DiT(config).state_dict().items()}
    targets = layouts.to_diffusers(official, layouts.dit_map(), config.hidden_size)
    zeros = [
        Planned(one.key, "BF16", one.shape, partial(torch.zeros, one.shape, dtype=torch.bfloat16)) for one in targets
    ]
    write(model / DIT, zeros)
    (model / DIT).with_name("config.json").write_text(json.dumps(config_file.dit_as_diffusers(config)))
    words = [str(model), scheme, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
    before, peak, written = map(int, done.stdout.split())
    print(f"{written / 1e9:.2f} GB written, {(peak - before) / 1e9:.2f} GB of memory")
    assert written == pytest.approx(size, rel=0.1)
    assert peak - before < 0.36e9


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "count", "words"), [("kills", "16", "16 builds killed"), ("races", "3", "3 races of two")]
)
def test_disturbed_builds(what: str, count: str, words: str) -> None:
    done = subprocess.run([sys.executable, DISTURBED, what, count], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
