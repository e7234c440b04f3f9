"""Every way to hand a picture over works, and whatever is no whole picture gives one clear line."""

import contextlib
import io
import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from step1x.engine.errors import InputError
from step1x.engine.picture import MAX_PIXELS, open_picture

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def photo(width: int = 24, height: int = 16) -> Image.Image:
    """A smooth picture in which every corner differs."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], -1).round().astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG file by hand, for the forms that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    body = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + end


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.mark.parametrize(
    ("kind", "options", "bound"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "tiff_adobe_deflate"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 16),
        ("JPEG", {"quality": 95, "subsampling": 0}, 8),
        ("JPEG", {"quality": 95, "progressive": True}, 24),
    ],
)
def test_formats_give_the_pixels(kind, options, bound):
    opened = open_picture(encoded(photo(), kind, **options))
    assert opened.rgb.mode == "RGB"
    assert opened.alpha is None
    assert difference(opened.rgb, photo()) <= bound


def test_every_kind_of_source_gives_the_same(tmp_path):
    data = encoded(photo(), "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    sources = [path, str(path), data, io.BytesIO(data), Image.open(path), photo()]
    for source in sources:
        assert difference(open_picture(source).rgb, photo()) == 0
    opened = open_picture(path)
    assert opened.name == "photo.png"
    assert open_picture(opened) is opened


def test_a_stream_is_read_to_its_end_and_left_open():
    class Pipe(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self.rest = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            return self.rest.read(size)

    pipe = Pipe(encoded(photo(), "PNG"))
    assert difference(open_picture(pipe).rgb, photo()) == 0
    assert not pipe.closed


def test_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    for kind, options in (("GIF", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert open_picture(data).rgb.getpixel((3, 3)) == RED


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_thin_pictures_open(size):
    assert open_picture(encoded(Image.new("RGB", size, RED), "PNG")).rgb.size == size


def one_line(source: object, needle: str) -> None:
    with pytest.raises(InputError) as caught:
        open_picture(source)  # type: ignore[arg-type]
    text = str(caught.value)
    assert needle in text
    assert "\n" not in text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.8, 0.97])
def test_truncated_files_are_errors(kind, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with warnings.catch_warnings(action="ignore"):
        one_line(data[: max(24, int(len(data) * part))], "damaged or truncated")


def test_bombs_are_refused_before_they_are_decoded():
    def webp(chunk: bytes, body: bytes) -> bytes:
        return b"RIFF" + struct.pack("<I", 4 + 8 + len(body)) + b"WEBP" + chunk + struct.pack("<I", len(body)) + body

    side = struct.pack("<I", 16382)[:3]
    bombs = [
        png((60_000, 60_000), 8, 2, b"\0"),
        png((2**31 - 1, 1), 1, 0, b"\0"),
        b"BM" + struct.pack("<IHHIIiiHH24x", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24),
        b"GIF89a"
        + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
        + b",\0\0\0\0"
        + struct.pack("<HHB", 65_535, 65_535, 0)
        + b"\x02\0",
        webp(b"VP8X", bytes(4) + side + side),
        webp(b"VP8L", b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(8)),
        webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + bytes(8)),
    ]
    for bomb in bombs:
        one_line(bomb, "scale it down")


def test_the_limit_is_ours_and_pillow_keeps_its_own(monkeypatch):
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    one_line(png((MAX_PIXELS + 1, 1), 8, 0, b"\0"), "scale it down")
    one_line(Image.Image._new(Image.new("L", (1, 1)), Image.core.new("L", (0, 5))), "no pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", before)
    open_picture(encoded(photo(), "PNG"))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("data", "needle"),
    [
        (b"", "nothing in it"),
        (b"hello, I am not a picture", "not a PNG, JPEG"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "an AVIF picture"),
        (b"8BPS\0\x01" + bytes(30), "a Photoshop file"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(30), "a camera raw file"),
        (b"P6 1 1 255\n\0\0\0", "not a PNG, JPEG"),
        (b"SIMPLE  =                    T", "not a PNG, JPEG"),
        (b"BM" + b"\xff" * 60, "damaged"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 60, "damaged"),
        (b"GIF89a" + b"\0" * 20, "no"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + b"\0" * 10, "no pixels"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 40, "damaged"),
        (png((4, 4), 8, 2, b"").replace(zlib.compress(b""), b"not zlib"), "damaged"),
    ],
)
def test_what_is_no_picture(data, needle):
    with warnings.catch_warnings(action="ignore"):
        one_line(data, needle)


def test_sources_of_the_wrong_type(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words")
    with path.open() as stream:
        one_line(stream, "text stream")
    one_line(np.zeros((4, 4, 3)), "not ndarray")
    one_line(7, "not int")
    closed = Image.open(io.BytesIO(encoded(photo(), "PNG")))
    closed.close()
    one_line(closed, "damaged")


def test_names_that_are_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s.png"))
    for name, needle in {
        "pipe.png": "not a regular file",
        "s.png": "not a regular file",
        "empty.png": "the file is empty",
        "loop.png": "symbolic links",
        "gone.png": "no such file",
        "empty.png/x.png": "not a directory",
        "": "it is a directory",
        "n" * 300: "too long",
        "a\0b": "not a possible file name",
        "\ud800": "not a possible file name",
    }.items():
        one_line(os.path.join(tmp_path, name), needle)
    server.close()
    one_line("", "no such file")
    one_line("/dev/zero", "not a regular file")
    one_line("https://example.org/a.png", "download")


def test_links_and_odd_names_are_followed(tmp_path):
    name = os.fsdecode(b"gr\xfcn\n.png")
    (tmp_path / name).write_bytes(encoded(photo(), "PNG"))
    (tmp_path / "link").symlink_to(tmp_path / name)
    for path in (tmp_path / name, tmp_path / "link"):
        assert difference(open_picture(path).rgb, photo()) == 0
    (tmp_path / name).write_bytes(b"x")
    one_line(tmp_path / name, "\\udcfc")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_flipped_bits_never_escape(kind):
    """Any damage gives a picture or an InputError: nothing else is ever raised."""
    random = np.random.default_rng(0)
    data = encoded(photo(), kind)
    for _ in range(60):
        broken = bytearray(data)
        for position in random.integers(0, min(len(broken), 400), 3):
            broken[position] ^= 1 << int(random.integers(0, 8))
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(InputError):
            assert open_picture(bytes(broken)).rgb.mode == "RGB"
