"""A result is one whole file or none, and it holds what it should and nothing else."""

import errno
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from step1x.engine import picture as picture_module
from step1x.engine.errors import InputError
from step1x.engine.picture import check_target, keeps_alpha, open_picture, save_picture

WHITE = (255, 255, 255)


def photo(width: int = 24, height: int = 16) -> Image.Image:
    """A smooth picture in which every corner differs."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], -1).round().astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def test_the_same_picture_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp"):
        save_picture(photo(), tmp_path / name, {"seed": 1, "instruction": "make it blue"})
        first = (tmp_path / name).read_bytes()
        save_picture(photo(), tmp_path / name, {"instruction": "make it blue", "seed": 1})
        assert (tmp_path / name).read_bytes() == first


def test_metadata_is_utf8_text(tmp_path):
    metadata = {"instruction": "把它变成黑白 \U0001f3a8", "seed": 7, "guidance": 6.0, "odd": "a\0b\ud800"}
    save_picture(photo(), tmp_path / "a.png", metadata)
    with Image.open(tmp_path / "a.png") as saved:
        assert isinstance(saved, PngImagePlugin.PngImageFile)
        assert saved.text == {
            "instruction": "把它变成黑白 \U0001f3a8",
            "seed": "7",
            "guidance": "6.0",
            "odd": "a\ufffdb?",
        }
        assert difference(saved, photo()) == 0
    save_picture(photo(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.info == {}
    with pytest.raises(ValueError, match="PNG keyword"):
        save_picture(photo(), tmp_path / "a.png", {"k" * 80: 1})


def test_nothing_of_the_source_leaks(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 51.0, 30.0)
    data = encoded(
        photo(),
        "JPEG",
        exif=exif,
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        comment=b"private",
    )
    image = Image.open(io.BytesIO(data))
    for name in ("a.png", "a.jpg", "a.webp"):
        save_picture(image, tmp_path / name)
        save_picture(open_picture(data).rgb, tmp_path / f"opened-{name}")
        for path in (tmp_path / name, tmp_path / f"opened-{name}"):
            with Image.open(path) as saved:
                assert not set(saved.info) & {"exif", "icc_profile", "comment", "xmp", "dpi"}
                assert not saved.getexif()


def test_alpha_is_attached_where_the_format_has_it(tmp_path):
    alpha = Image.linear_gradient("L").resize(photo().size)
    for name in ("a.png", "a.webp"):
        save_picture(photo(), tmp_path / name, alpha=alpha)
        with Image.open(tmp_path / name) as saved:
            assert saved.mode == "RGBA"
            assert difference(saved.getchannel("A"), alpha) == 0
    save_picture(photo(), tmp_path / "a.jpg", alpha=alpha)
    transparent = photo().convert("RGBA")
    transparent.putalpha(0)
    save_picture(transparent, tmp_path / "b.jpg")
    with Image.open(tmp_path / "a.jpg") as on_white, Image.open(tmp_path / "b.jpg") as white:
        assert difference(on_white, photo()) <= 8
        assert difference(white, Image.new("RGB", photo().size, WHITE)) <= 2
    assert [keeps_alpha(name) for name in ("a.png", "a.WEBP", "a.jpg", "a.JPEG", "-")] == [
        True,
        True,
        False,
        False,
        True,
    ]


def test_targets_that_are_refused(tmp_path):
    (tmp_path / "taken.png").write_bytes(b"mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "taken.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, needle in {
        "taken.png": "--force",
        "folder.png": "is a directory",
        "dangling.png": "not a regular file",
        "pipe.png": "not a regular file",
        "missing/out.png": "no directory",
        "taken.png/out.png": "not a directory",
        "out.tiff": "must end in",
        "out": "must end in",
        "n" * 252 + ".png": "too long",
        "a\0.png": "not a possible file name",
        "\ud800.png": "not a possible file name",
    }.items():
        with pytest.raises(InputError, match=needle) as caught:
            check_target(os.path.join(tmp_path, name))
        assert "\n" not in str(caught.value)
    for name in ("taken.png", "hard.png"):
        with pytest.raises(InputError, match="source itself"):
            check_target(tmp_path / name, source=tmp_path / "taken.png", overwrite=True)
    for name in ("folder.png", "dangling.png", "pipe.png"):
        with pytest.raises(InputError, match="cannot write"):
            save_picture(photo(), tmp_path / name, overwrite=True)
    with pytest.raises(InputError, match="not a regular file"):
        save_picture(photo(), "/dev/null", overwrite=True)
    check_target(tmp_path / "free.png", source=tmp_path / "taken.png")
    check_target(tmp_path / "taken.png", overwrite=True)
    assert (tmp_path / "taken.png").read_bytes() == b"mine"
    assert left(tmp_path) == ["dangling.png", "folder.png", "hard.png", "pipe.png", "taken.png"]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saving_without_overwrite_never_replaces(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    encode = picture_module.encode_picture

    def slow(*arguments, **options):
        target.write_bytes(b"someone else's")  # appears while we work
        return encode(*arguments, **options)

    monkeypatch.setattr(picture_module, "encode_picture", slow)
    with pytest.raises(InputError, match="appeared"):
        save_picture(photo(), target, overwrite=False)
    assert target.read_bytes() == b"someone else's"
    assert left(tmp_path) == ["a.png"]


@pytest.mark.parametrize("taken", [False, True])
def test_file_systems_without_links(tmp_path, monkeypatch, taken):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    target = tmp_path / "a.png"
    if not taken:
        save_picture(photo(), target, overwrite=False)
        assert difference(open_picture(target).rgb, photo()) == 0
        return
    target.write_bytes(b"mine")
    monkeypatch.setattr(picture_module, "check_target", lambda *_, **__: None)
    with pytest.raises(InputError, match="appeared"):
        save_picture(photo(), target, overwrite=False)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_leaves_everything_as_it_was(tmp_path, monkeypatch, error, call):
    target = tmp_path / "a.png"
    target.write_bytes(b"before")
    calls = []

    def fail(*_):
        calls.append(1)
        if call == "replace" or len(calls) > 1:  # the first fsync is that of check_target's trial file
            raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        save_picture(photo(), target)
    assert target.read_bytes() == b"before"
    assert left(tmp_path) == ["a.png"]


def test_overwriting_keeps_the_mode_and_goes_through_links(tmp_path):
    real = tmp_path / "real.png"
    real.write_bytes(b"before")
    real.chmod(0o640)
    (tmp_path / "link.png").symlink_to(real)
    save_picture(photo(), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert difference(open_picture(real).rgb, photo()) == 0
    save_picture(photo(), tmp_path / "new.png", overwrite=False)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new.png").stat().st_mode & 0o777 == 0o666 & ~mask


def test_two_threads_write_one_whole_file(tmp_path):
    target = tmp_path / "a.png"
    errors: list[InputError] = []

    def write() -> None:
        try:
            save_picture(photo(), target, overwrite=False)
        except InputError as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert difference(open_picture(target).rgb, photo()) == 0
    assert left(tmp_path) == ["a.png"]
