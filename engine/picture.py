"""Pictures in and out: any common file becomes a Picture, a result becomes one whole file or none.

Opening (performance.md §F): regular files only, a short list of formats told by their first bytes, the size
taken from the header before a pixel is decoded. Saving: encoded in memory, written beside the target, then
moved over it. Nothing here relies on or changes Pillow's process-wide settings.
"""

import io
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from step1x.engine.errors import InputError
from step1x.engine.pixels import attach_alpha, bare, on_background, standard

# Where Pillow itself refuses by default: 151-megapixel cameras pass; decoded it is 0.5 GB of RGB.
MAX_PIXELS = 178_956_970
MAX_BYTES = 1 << 30  # of a stream, which has to be read whole; a file on disk is read as far as its header says
HEADER_BYTES = 32

SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"BM", "BMP"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
# Named in the error, so that nobody has to guess why a picture that opens elsewhere is refused here.
UNSUPPORTED = (
    (0, b"%PDF", "a PDF document"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML or SVG file"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (8, b"CR\x02", "a camera raw file"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftypcrx", "a camera raw file"),
    (4, b"ftyphei", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIC picture"),
    (4, b"ftyp", "a film"),
)

SAVED = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# 95 without chroma subsampling: the loss stays below what an edit changes.
OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "method": 4},
}
KEY = re.compile(r"[!-~](?:[ -~]{0,77}[!-~])?")  # a PNG keyword (PNG §11.3.3.2), kept to ASCII

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An opened picture.

    rgb: mode RGB, sRGB, upright, free of metadata; transparent parts composited on white.
    alpha: mode L, the same size, or None if the source has no transparency.
    name: what to call it in messages (a file's name, never its whole path).
    """

    rgb: Image.Image
    alpha: Image.Image | None
    name: str


Source = PathLike | bytes | BinaryIO | Image.Image | Picture


def open_picture(source: Source) -> Picture:
    """Open a path, the bytes of a file, a binary stream (read to its end, not closed) or a PIL image.

    PNG, JPEG, WebP, BMP, TIFF and GIF are read (the first frame of each), at most MAX_PIXELS large; a
    `Picture` passes through. Raises InputError, one line, for anything that is not a whole picture of these.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, Image.Image):
        return _decoded(source, "the picture")
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), "the picture")
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        with _open_file(path) as stream:
            return _read(stream, Path(path).name)
    return _read(_buffered(source), "the picture")


def keeps_alpha(target: PathLike) -> bool:
    """Whether the format of `target` ("-": PNG) stores transparency. InputError for unknown extensions."""
    return _saved_format(os.fspath(target)) != "JPEG"


def check_target(target: PathLike, *, source: PathLike | None = None, overwrite: bool = False) -> None:
    """Raise InputError if a picture could not be written to `target` now; leaves nothing behind.

    For use before the work starts. `source` is a path that `target` must not be. Directories, pipes and
    devices are never replaced, other files only with `overwrite`.
    """
    name = os.fspath(target)
    if name == "-":
        return
    try:
        existing = _existing(name)
        if existing and stat.S_ISDIR(existing.st_mode):
            raise InputError(f"cannot write {name!r}: it is a directory; name a file in it")
        if existing and not stat.S_ISREG(existing.st_mode):
            raise InputError(f"cannot write {name!r}: not a regular file; -o - writes to standard output")
        _saved_format(name)
        folder = Path(name).parent
        if not folder.is_dir():
            raise InputError(f"cannot write {name!r}: there is no directory {str(folder)!r}")
        if existing and source is not None and os.path.exists(source) and os.path.samefile(source, name):
            raise InputError(f"cannot write {name!r}: it is the source itself; choose another name")
        if existing and not overwrite:
            raise InputError(f"cannot write {name!r}: it exists; --force (overwrite=True) replaces it")
        _beside(os.path.realpath(name), b"").unlink()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot write {name!r}: {_reason(error)}") from error
    except ValueError as error:  # a NUL character, or text that no file name can have
        raise InputError(f"cannot write {name!r}: not a possible file name") from error


def save_picture(
    image: Image.Image,
    target: PathLike,
    metadata: Mapping[str, str | int | float] | None = None,
    *,
    alpha: Image.Image | None = None,
    overwrite: bool = True,
) -> None:
    """Write `image` (RGB or RGBA) to `target`: PNG, JPEG or WebP by its extension, "-" is stdout (PNG).

    The file appears whole or not at all; without `overwrite` it never replaces one, not even one that appears
    meanwhile. `alpha` is attached (`attach_alpha`) where the format has it, else the picture stays on white.
    `metadata` becomes UTF-8 text chunks of a PNG; other formats carry none. Equal input gives equal bytes.
    Raises InputError for a target that `check_target` refuses, OSError if writing fails.
    """
    name = os.fspath(target)
    check_target(name, overwrite=overwrite)
    data = encode_picture(image, _saved_format(name), metadata or {}, alpha=alpha)
    if name == "-":
        if sys.stdout is None:
            raise InputError("cannot write to standard output: it is closed")
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    commit(data, name, overwrite)


def encode_picture(
    image: Image.Image,
    kind: str,
    metadata: Mapping[str, str | int | float],
    *,
    alpha: Image.Image | None = None,
) -> bytes:
    """The bytes of a PNG, JPEG or WEBP file of `image`; arguments as for `save_picture`."""
    if alpha is not None and kind != "JPEG":
        image = attach_alpha(image, alpha)
    if image.mode == "RGBA" and kind == "JPEG":
        image = on_background(image.convert("RGB"), image.getchannel("A"))
    image = bare(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"))
    options = dict(OPTIONS[kind])
    if kind == "PNG":
        options["pnginfo"] = _text_chunks(metadata)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _text_chunks(metadata: Mapping[str, str | int | float]) -> PngInfo:
    chunks = PngInfo()
    for key in sorted(metadata):
        if not KEY.fullmatch(key):
            raise ValueError(f"not a possible PNG keyword: {key!r}")
        # An iTXt chunk is UTF-8 and cannot hold NUL.
        text = str(metadata[key]).replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
        chunks.add_itxt(key, text)
    return chunks


def _open_file(path: str) -> BinaryIO:
    """The regular file at `path`, opened without ever blocking on a pipe or a device."""
    if path.startswith(("http://", "https://")):
        raise InputError(f"cannot open {path!r}: addresses are not fetched; download the picture first")
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise InputError(f"cannot open {path!r}: it is a directory; name one picture in it")
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"cannot open {path!r}: not a regular file; save the picture to a file first")
        if info.st_size == 0:
            raise InputError(f"cannot open {path!r}: the file is empty")
        # Should a pipe take the file's place in between, O_NONBLOCK returns at once. Windows has no such flag
        # and no such pipes.
        return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot open {path!r}: {_reason(error)}") from error
    except ValueError as error:  # a NUL character, or text that no file name can have
        raise InputError(f"cannot open {path!r}: not a possible file name") from error


def _buffered(stream: BinaryIO) -> BinaryIO:
    """The rest of `stream` in memory."""
    if not hasattr(stream, "read"):
        kind = type(stream).__name__
        raise InputError(f"a picture is a path, bytes, a binary stream or a PIL image, not {kind}")
    try:
        data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the picture from the stream: {_reason(error)}") from error
    if not isinstance(data, bytes | bytearray):
        raise InputError("cannot read the picture from the stream: it is a text stream; open it in mode 'rb'")
    if len(data) > MAX_BYTES:
        raise InputError(f"the picture on the stream is larger than {MAX_BYTES} bytes; save it to a file")
    return io.BytesIO(data)


def _read(stream: BinaryIO, name: str) -> Picture:
    """Recognise, open and decode the file in `stream`."""
    try:
        header = stream.read(HEADER_BYTES)
        stream.seek(0)
        with _reader(header, name)(stream) as image:
            return _decoded(image, name)
    except InputError:
        raise
    # Pillow's readers answer hostile bytes with almost any exception (SyntaxError, struct.error, IndexError,
    # zlib.error, MemoryError, ...). All of them mean one thing here.
    except Exception as error:
        raise InputError(f"cannot read {name!r}: damaged or truncated ({_reason(error)})") from error


def _reader(header: bytes, name: str) -> Callable[[BinaryIO], ImageFile.ImageFile]:
    """Pillow's reader for the format that `header` shows.

    Called directly: Image.open would try every installed format and warn by a process-wide size.
    """
    from PIL import (
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    if not header:
        raise InputError(f"cannot read {name!r}: there is nothing in it")
    for offset, magic, kind in UNSUPPORTED:
        if header[offset:].startswith(magic):
            raise InputError(f"cannot read {name!r}: it is {kind}; save it as PNG or JPEG first")
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        _check_size(_webp_size(header), name)  # Pillow allocates the whole canvas when it opens a WebP
        return WebPImagePlugin.WebPImageFile
    readers: dict[str, Callable[[BinaryIO], ImageFile.ImageFile]] = {
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
    }
    for magic, kind in SIGNATURES:
        if header.startswith(magic):
            return readers[kind]
    raise InputError(f"cannot read {name!r}: not a PNG, JPEG, WebP, BMP, TIFF or GIF picture")


def _webp_size(header: bytes) -> tuple[int, int]:
    """Width and height that the first chunk of a WebP file announces (RFC 9649 §2.5 to §2.7)."""
    chunk = header[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(header[24:27], "little") + 1, int.from_bytes(header[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(header[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(header[26:28], "little") & 0x3FFF, int.from_bytes(header[28:30], "little") & 0x3FFF


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"cannot use {name!r}: it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise InputError(f"cannot use {name!r}: {width} x {height} pixels, above {MAX_PIXELS}; scale it down first")


def _decoded(image: Image.Image, name: str) -> Picture:
    """`image`, whose pixels may not be decoded yet, as a Picture."""
    _check_size(image.size, name)
    try:
        rgb, alpha = standard(image)
    except InputError as error:
        raise InputError(f"cannot use {name!r}: {error}") from error
    except Exception as error:  # as in _read: a lazily opened PIL image decodes here
        raise InputError(f"cannot read {name!r}: damaged or truncated ({_reason(error)})") from error
    if alpha is not None:
        rgb = on_background(rgb, alpha)
    return Picture(rgb=rgb, alpha=alpha, name=name)


def _saved_format(name: str) -> str:
    suffix = ".png" if name == "-" else Path(name).suffix.lower()
    if suffix not in SAVED:
        raise InputError(f"cannot write {name!r}: the name must end in one of {', '.join(SAVED)}")
    return SAVED[suffix]


def _existing(name: str) -> os.stat_result | None:
    """What `name` leads to, the link itself if it leads nowhere, None if the name is free."""
    try:
        link = os.lstat(name)
    except FileNotFoundError:
        return None
    return os.stat(name) if os.path.exists(name) else link


def _beside(target: str, data: bytes) -> Path:
    """A new file with `data` in the folder of `target`, safely on the disk."""
    path = Path(target).parent / f".step1x-{os.urandom(8).hex()}.tmp"
    try:
        with open(path, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:  # Ctrl-C too must leave nothing
        path.unlink(missing_ok=True)
        raise
    return path


def commit(data: bytes, name: str, overwrite: bool) -> None:
    """Make `data` the content of `name` in one move. Raises OSError, and InputError if it is there after all."""
    target = os.path.realpath(name) if overwrite else name  # through a link, as any editor would
    temporary = _beside(target, data)
    try:
        if not overwrite:
            _link(temporary, target)
        else:
            if os.path.exists(target):
                temporary.chmod(stat.S_IMODE(os.stat(target).st_mode))
            os.replace(temporary, target)
    except FileExistsError as error:
        raise InputError(f"cannot write {name!r}: it has appeared meanwhile; --force replaces it") from error
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: str) -> None:
    """Give `temporary` the name `target`, or FileExistsError if that is taken (a rename would replace it)."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # FAT and some network file systems have no links: reserve the name, then fill it
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(temporary, target)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (" ".join(text.split())[:200] or type(error).__name__).lower()
