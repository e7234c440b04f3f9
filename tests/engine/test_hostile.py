"""Hostile input through the real program: exit code 2, one line, nothing written, no bomb, no hanging."""

import ctypes
import io
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
GIGABYTE = 1 << 30


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def noise(kind: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def half(kind: str) -> bytes:
    data = noise(kind)
    return data[: len(data) * 2 // 3]


def tiff(width: int, height: int, *more: tuple[int, int, int, int]) -> bytes:
    """A TIFF with one strip of one byte, whatever its size claims."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (278, 4, 1, height), (279, 4, 1, 1), *more]
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 10) + b"\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


def webp_of(size: int) -> bytes:
    body = bytes(4) + struct.pack("<I", size - 1)[:3] * 2
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBPVP8X" + struct.pack("<I", len(body)) + body


def gif_of(size: int) -> bytes:
    frame = b"," + bytes(4) + struct.pack("<HHB", size, size, 0) + b"\x02\0"
    return b"GIF89a" + struct.pack("<HHBBB", size, size, 0, 0, 0) + frame


def nan_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


zeros = zlib.compress(bytes(20_000 * 2501))  # 50 MB in 49 kB: a real bomb of 400 million pixels
good = noise("PNG")

# name -> content of the file, and what the line must say
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"\x89", "not a PNG"),
    "text": (b"this is not a picture\n" * 50, "not a PNG"),
    "zeros": (bytes(1000), "not a PNG"),
    "random": (np.random.default_rng(1).bytes(5000), "not a PNG"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not a PNG"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not a PNG"),
    "zip": (b"PK\x03\x04" + bytes(100), "not a PNG"),
    "pdf": (b"%PDF-1.7\n%....", "PDF"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "SVG"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n", "not a PNG"),
    "fits": (b"SIMPLE  =                    T" + bytes(100), "not a PNG"),
    "png cut": (half("PNG"), "truncated"),
    "jpeg cut": (half("JPEG"), "truncated"),
    "webp cut": (half("WEBP"), "truncated"),
    "gif cut": (half("GIF"), "truncated"),
    "bmp cut": (half("BMP"), "truncated"),
    "tiff cut": (half("TIFF"), "truncated"),
    "png header only": (good[:33], "damaged"),
    "png bad checksum": (good[:20] + b"\xff" + good[21:], "damaged"),
    "png bad data": (png(4, 4, b"not zlib"), "damaged"),
    "png no width": (png(0, 4, b""), "damaged"),
    "png of depth 7": (png(4, 4, zlib.compress(bytes(60)), depth=7), "damaged"),
    "png claims 60000 squared": (png(60_000, 60_000, zlib.compress(b"")), "scale it down"),
    "png bomb": (png(20_000, 20_000, zeros, depth=1, colour=0), "scale it down"),
    "png line": (png(2**31 - 1, 1, zlib.compress(b"")), "scale it down"),
    "png profile bomb": (png(4, 4, zlib.compress(bytes(52)), chunk(b"iCCP", b"x\0\0" + zeros)), "damaged"),
    "png text bomb": (png(4, 4, zlib.compress(bytes(52)), chunk(b"zTXt", b"x\0\0" + zeros)), "damaged"),
    "bmp bomb": (
        b"BM" + struct.pack("<IHHIIiiHH24x", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24),
        "scale it down",
    ),
    "gif bomb": (gif_of(65_535), "scale it down"),
    "webp bomb": (webp_of(16_000), "scale it down"),
    "tiff bomb": (tiff(100_000, 100_000), "scale it down"),
    "tiff of bits": (tiff(4, 4, (277, 3, 1, 9)), "damaged"),
    "tiff without end": (b"II*\0\x08\0\0\0\xff\xff" + bytes(20), "damaged"),
    "tiff of nan": (nan_tiff(), "nan"),
    "camera raw": (tiff(4, 4, (254, 4, 1, 1)), "camera raw"),
    "jpeg of nothing": (b"\xff\xd8\xff\xd9", "damaged"),
    "jpeg without a size": (b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\0\x01\x01\x11\0", "damaged"),
}

# options of a good command -> what the line must say
OPTIONS: dict[tuple[str, ...], str] = {
    ("--steps", "0"): "range",
    ("--steps", "1e99"): "integer",
    ("--guidance", "nan"): "finite",
    ("--guidance", "-inf"): "range",
    ("--size", "0"): "range",
    ("--size", "99999999999999999999"): "range",
    ("--seed", "-1"): "range",
    ("--seed", str(2**63)): "range",
    ("--strength", "nan"): "finite",
    ("--device", "; rm -rf /"): "is not one of",
    ("--variant", "\x1b[2J"): "is not one of",
    ("--profile", "../../etc/passwd"): "unknown profile",
    ("--profile", "/dev/zero.toml"): "no such file",
    ("--negative-prompt", "\udcff"): "not UTF-8",
    ("--evil",): "no such option",
    ("-o",): "requires an argument",
    ("-o", ""): "must end in",
    ("-o", "."): "is a directory",
    ("-o", "out.exe"): "must end in",
    ("-o", "gone/out.png"): "no directory",
    ("-o", "good.png"): "source itself",
    ("-o", "./good.png", "--force"): "source itself",
    ("-o", "taken.png"): "it exists",
    ("-o", "pipe.png", "--force"): "not a regular file",
    ("-o", "/dev/null", "--force"): "not a regular file",
    ("-o", "/proc/out.png"): "cannot write",
    ("-o", "good.png/out.png"): "not a directory",
    ("-o", "n" * 260 + ".png"): "too long",
    ("-o", "loop.png", "--force"): "not a regular file",
    ("-o", "-", "--json"): "standard output",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """good.png, taken.png, pipe.png (a FIFO), loop.png and gone.png (links), sub.png/ and socket.png."""
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "taken.png").write_bytes(b"mine")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "sub.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket has at most 107 bytes
        server.bind("socket.png")
        os.chdir(here)
    return tmp_path


def default_interrupt() -> None:
    """A job in a shell's background has SIGINT ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def limited() -> None:
    """In the child: 2 GB of address space; a decoded bomb needs more."""
    resource.setrlimit(resource.RLIMIT_AS, (2 * GIGABYTE, 2 * GIGABYTE))


def refused(
    folder: Path,
    *arguments: str,
    needle: str,
    feed: bytes | None = None,
    before: Callable[[], None] = limited,
) -> None:
    """The program refuses as it should, and the folder is as before."""
    listing = snapshot(folder)
    done = subprocess.run(
        [sys.executable, "-m", "step1x.engine", *arguments],
        cwd=folder,
        input=feed,
        stdin=subprocess.DEVNULL if feed is None else None,
        capture_output=True,
        timeout=30,
        preexec_fn=before,
        check=False,
    )
    line = done.stderr.decode(errors="surrogateescape")
    assert done.returncode == 2, line
    assert line.startswith("error: "), line
    assert line.count("\n") == 1, line
    assert line[:-1].isprintable(), line
    assert len(line) < 600, line
    assert needle.lower() in line.lower(), line
    assert done.stdout == b""
    assert snapshot(folder) == listing


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> kind and size of everything in the folder."""
    found = {path.name: path.lstat() for path in folder.iterdir()}
    return {name: (stat.S_IFMT(info.st_mode), info.st_size) for name, info in found.items()}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    data, needle = FILES[name]
    (tmp_path / "hostile.png").write_bytes(data)
    refused(tmp_path, "edit", "hostile.png", "make it blue", needle=needle)


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options(folder, options):
    refused(folder, "edit", "good.png", "make it blue", *options, needle=OPTIONS[options])


@pytest.mark.parametrize(
    ("name", "needle"),
    [
        ("missing.png", "no such file"),
        ("sub.png", "is a directory"),
        ("pipe.png", "not a regular file"),
        ("socket.png", "not a regular file"),
        ("loop.png", "symbolic links"),
        ("gone.png", "no such file"),
        ("good.png/x", "not a directory"),
        ("/dev/zero", "not a regular file"),
        ("/dev/stdin", "not a regular file"),
        ("/proc/self/mem", "the file is empty"),
        ("https://example.org/a.png", "download"),
        ("file:///etc/passwd", "no such file"),
        ("n" * 300, "too long"),
        ("", "no such file"),
        ("new\nline\x1b[31m.png", "no such file"),
        (os.fsdecode(b"gr\xfcn.png"), "no such file"),
        ("--", "missing argument"),
    ],
)
def test_names(folder, name, needle):
    refused(folder, "edit", name, "make it blue", needle=needle)


@pytest.mark.parametrize("instruction", ["", "  \t\n", os.fsdecode(b"make it gr\xfcn")])
def test_instructions(folder, instruction):
    refused(folder, "edit", "good.png", instruction, needle="instruction")


@pytest.mark.parametrize(
    ("feed", "options", "needle"),
    [
        (b"", ("-o", "out.png"), "nothing in it"),
        (b"words", ("-o", "out.png"), "not a PNG"),
        (good[:500], ("-o", "out.png"), "truncated"),
        (good, (), "has no name"),
    ],
)
def test_standard_input(tmp_path, feed, options, needle):
    refused(tmp_path, "edit", "-", "make it blue", *options, needle=needle, feed=feed)


def test_a_closed_standard_input(tmp_path):
    refused(tmp_path, "edit", "-", "blue", "-o", "a.png", needle="closed", before=lambda: os.close(0))


def powerless() -> None:
    """In the child: root too must keep to the permissions of files (capabilities 1 and 2, see capabilities(7))."""
    drop = 24  # PR_CAPBSET_DROP, which without privileges fails and is not needed
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)


def test_files_and_folders_that_may_not_be_used(tmp_path):
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "secret.png").write_bytes(good)
    (tmp_path / "secret.png").chmod(0)
    (tmp_path / "locked").mkdir(mode=0o555)
    cat = subprocess.run(["cat", "secret.png"], cwd=tmp_path, capture_output=True, preexec_fn=powerless, check=False)
    if cat.returncode == 0:
        pytest.skip("root reads everything here")
    for words in (("secret.png", "blue"), ("good.png", "blue", "-o", "locked/out.png")):
        refused(tmp_path, "edit", *words, needle="permission denied", before=powerless)


@pytest.mark.parametrize("words", [(), ("frobnicate",), ("edit",), ("edit", "a.png"), ("convert", "a", "b")])
def test_commands(tmp_path, words):
    done = subprocess.run(
        [sys.executable, "-m", "step1x.engine", *words], capture_output=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"Traceback" not in done.stderr


def test_a_pickle_is_no_model(tmp_path):
    (tmp_path / "weights.ckpt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(tmp_path, "info", "weights.ckpt", needle="weights.ckpt", before=lambda: None)  # torch needs space


def test_a_full_disk_is_our_failure():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "step1x.engine", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: no space left on device")


class TestWithTheModel:
    """What is odd but right is edited; what only the model can refuse is refused like the rest."""

    @staticmethod
    def edit(folder: Path, name: str, *options: str) -> "subprocess.CompletedProcess[bytes]":
        words = [name, "make it black and white", "--steps", "1", "--seed", "0", "-o", "out.png", *options]
        return subprocess.run(
            [sys.executable, "-m", "step1x.engine", "edit", *words],
            cwd=folder,
            capture_output=True,
            check=False,
        )

    def test_odd_pictures_are_edited(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 65536, (40, 56), dtype=np.uint16)
        deep = Image.fromarray(pixels)
        logo = Image.new("LA", (50, 40), (120, 100))
        for index, (image, kind, mode) in enumerate([(deep, "PNG", "RGB"), (logo, "PNG", "RGBA")]):
            name = f"odd{index}.png"
            image.save(tmp_path / name, kind)
            done = self.edit(tmp_path, name, "--force")
            assert done.returncode == 0, done.stderr
            assert done.stdout == b"out.png\n"
            with Image.open(tmp_path / "out.png") as result:
                assert result.mode == mode

    @pytest.mark.parametrize("size", [(1, 1), (1, 10_000)])
    def test_thin_pictures_are_edited_or_refused(self, tmp_path, size):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "thin.png")
        done = self.edit(tmp_path, "thin.png")
        assert done.returncode in (0, 2), done.stderr
        if done.returncode == 2:
            assert done.stderr.startswith(b"error: ")
            assert done.stderr.count(b"\n") == 1
            assert not (tmp_path / "out.png").exists()

    def test_ctrl_c_leaves_nothing(self, tmp_path):
        (tmp_path / "good.png").write_bytes(good)
        command = [
            sys.executable,
            "-m",
            "step1x.engine",
            "edit",
            "good.png",
            "blue",
            "--steps",
            "1000",
            "--force",
        ]
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=default_interrupt) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(6)  # loading or denoising: it must not matter
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=30)
        assert (process.returncode, error.strip()) == (130, b"error: interrupted")
        assert [path.name for path in tmp_path.iterdir()] == ["good.png"]
