"""The pixels of every form in which a picture may be stored."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from step1x.engine.errors import InputError
from step1x.engine.picture import open_picture
from step1x.engine.pixels import attach_alpha

RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)


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


def row(image: Image.Image | None) -> list[object]:
    """The pixels of the first row."""
    assert image is not None
    return [image.getpixel((x, 0)) for x in range(image.width)]


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind, orientation):
    stored = photo()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    # The stored pixels' first row and column lie where the EXIF standard says (tag 0x0112).
    array = np.asarray(stored)
    if orientation >= 5:
        array = array.transpose(1, 0, 2)
    flips = {1: "", 2: "x", 3: "xy", 4: "y", 5: "", 6: "x", 7: "xy", 8: "y"}[orientation]
    array = array[:, ::-1] if "x" in flips else array
    array = array[::-1] if "y" in flips else array
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    opened = open_picture(encoded(stored, kind, exif=exif, **options))
    assert opened.rgb.size == (array.shape[1], array.shape[0])
    assert difference(opened.rgb, Image.fromarray(np.ascontiguousarray(array))) <= 3
    assert not opened.rgb.info


def test_alpha_is_turned_with_the_picture():
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    opened = open_picture(encoded(image, "PNG", exif=exif))
    assert opened.alpha is not None
    assert difference(opened.alpha, image.getchannel("A").transpose(Image.Transpose.ROTATE_270)) == 0


@pytest.mark.parametrize(
    "exif",
    [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40],
)
def test_damaged_exif_is_ignored(exif):
    with warnings.catch_warnings(action="ignore"):
        opened = open_picture(encoded(photo(), "PNG", exif=exif))
    assert difference(opened.rgb, photo()) == 0


def test_a_profile_is_converted_to_srgb():
    # Display P3 red lies outside sRGB, the grey axis is shared (both D65).
    profile = p3_profile()
    image = Image.new("RGB", (3, 1))
    for x, colour in enumerate([(200, 100, 100), (128, 128, 128), (255, 0, 0)]):
        image.putpixel((x, 0), colour)
    first, grey, red = row(open_picture(encoded(image, "PNG", icc_profile=profile)).rgb)
    # Display P3 and sRGB share white and curve; between them lies this matrix (CSS Color 4 §10.2, rounded).
    matrix = np.array([[1.2249, -0.2249, 0.0], [-0.0420, 1.0420, 0.0], [-0.0196, -0.0786, 1.0983]])
    light = ((np.array([200, 100, 100]) / 255 + 0.055) / 1.055) ** 2.4
    expected = (1.055 * (matrix @ light) ** (1 / 2.4) - 0.055) * 255
    assert np.abs(first - expected).max() <= 2
    assert np.abs(np.subtract(grey, 128)).max() <= 1
    assert red == RED


def p3_profile() -> bytes:
    """A matrix profile with the Display P3 primaries (adapted to D50) and the sRGB curve of Pillow's own."""
    base = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    columns = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    data = bytearray(base)
    for index in range(struct.unpack_from(">I", data, 128)[0]):
        name, offset, _ = struct.unpack_from(">4sII", data, 132 + 12 * index)
        if name in columns:
            struct.pack_into(">3i", data, offset + 8, *(round(value * 65536) for value in columns[name]))
    return bytes(data)


def cmyk_profile() -> bytes:
    """A CMYK profile (one lookup table) in which cyan ink is red: unlike any conversion without it."""
    corners = []
    for index in range(16):  # cyan slowest, black fastest
        c, _, _, k = (index >> shift & 1 for shift in (3, 2, 1, 0))
        corners.append((0, 128, 128) if k else (138, 209, 195) if c else (255, 128, 128))  # Lab: black, red, white
    identity = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table += identity * 4 + b"".join(bytes(corner) for corner in corners) + identity * 3
    table += bytes(-len(table) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s", 144 + len(table), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    assert len(header) == 128
    return header + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


def test_cmyk_goes_through_its_profile_and_without_one_is_plain():
    image = Image.new("CMYK", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 255))
    plain = row(open_picture(encoded(image, "TIFF")).rgb)
    assert plain == [WHITE, (0, 255, 255), BLACK]
    paper, ink, black = row(open_picture(encoded(image, "TIFF", icc_profile=cmyk_profile())).rgb)
    assert np.abs(np.subtract(paper, 255)).max() <= 2
    assert ink[0] > 200
    assert max(ink[1:]) < 80
    assert max(black) <= 2
    jpeg = open_picture(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert difference(jpeg.rgb, Image.new("RGB", (16, 16), RED)) <= 4  # Adobe stores CMYK inverted


@pytest.mark.parametrize("profile", [b"nonsense", b"\0" * 200, cmyk_profile(), cmyk_profile()[:200]])
def test_a_broken_or_foreign_profile_is_ignored(profile):
    assert difference(open_picture(encoded(photo(), "PNG", icc_profile=profile)).rgb, photo()) == 0


def test_grey_with_a_profile():
    grey = Image.linear_gradient("L")
    opened = open_picture(encoded(grey, "TIFF", icc_profile=grey_profile(gamma=1.0)))
    # Linear light 0.5 is sRGB 188 (IEC 61966-2-1).
    assert abs(opened.rgb.getpixel((0, 128))[0] - 188) <= 1


def grey_profile(gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    header = struct.pack(
        ">I4xI4s4s4s12x4s", 156 + len(curve) + len(white), 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp"
    )
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    tags = struct.pack(">I", 2) + struct.pack(">4sII", b"kTRC", 156, len(curve))
    tags += struct.pack(">4sII", b"wtpt", 156 + len(curve), len(white))
    return header + tags + curve + white


def test_alpha_is_kept_and_the_colours_are_put_on_white():
    image = Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(*RED, 255), (*RED, 128), (*BLACK, 0)]):
        image.putpixel((x, 0), colour)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        opened = open_picture(encoded(image, kind, **options))
        assert row(opened.alpha) == [255, 128, 0]
        assert row(opened.rgb) == [RED, (255, 127, 127), WHITE]


def test_the_other_alpha_modes():
    grey = Image.new("LA", (1, 1), (100, 51))
    assert row(open_picture(encoded(grey, "PNG")).alpha) == [51]
    assert row(open_picture(encoded(grey, "PNG")).rgb) == [(224, 224, 224)]
    assert row(open_picture(grey.convert("La")).alpha) == [51]
    premultiplied = Image.new("RGBA", (1, 1), (255, 0, 0, 128)).convert("RGBa")
    assert row(open_picture(premultiplied).rgb) == [(255, 127, 127)]
    palette = Image.new("RGBA", (1, 1), (0, 255, 0, 128)).convert("PA")
    assert row(open_picture(palette).alpha) == [128]
    assert row(open_picture(palette).rgb)[0][1] == 255


@pytest.mark.parametrize(
    ("data", "colours", "alpha"),
    [
        (png((2, 1), 1, 0, b"\0\x40", tRNS=b"\0\x01"), [0, 255], [255, 0]),
        (png((4, 1), 2, 0, b"\0\x1b", tRNS=b"\0\x02"), [0, 85, 255, 255], [255, 255, 0, 255]),
        (png((2, 1), 4, 0, b"\0\x7f", tRNS=b"\0\x0f"), [119, 255], [255, 0]),
        (png((2, 1), 8, 0, b"\0\x0a\x14", tRNS=b"\0\x0a"), [255, 20], [0, 255]),
        (png((2, 1), 16, 0, b"\0\x01\x01\x80\0", tRNS=b"\x01\x01"), [255, 128], [0, 255]),
        (png((2, 1), 8, 2, b"\0abcdef", tRNS=b"\0a\0b\0c"), [255, (100, 101, 102)], [0, 255]),
        (
            png((2, 1), 16, 2, b"\0" + b"\x12\x34" * 3 + b"\x80\0" * 3, tRNS=b"\x12\x34" * 3),
            [255, 128],
            [0, 255],
        ),
        (
            png((2, 1), 8, 3, b"\0\0\1", PLTE=bytes(RED + GREEN), tRNS=b"\x80"),
            [(255, 127, 127), GREEN],
            [128, 255],
        ),
        (png((1, 1), 16, 4, b"\0\x80\0\x40\0"), [223], [64]),
        (png((1, 1), 16, 6, b"\0\x80\0\xff\xff\x80\0\x40\0"), [(223, 255, 223)], [64]),
    ],
    ids=[
        "grey 1",
        "grey 2",
        "grey 4",
        "grey 8",
        "grey 16",
        "rgb 8",
        "rgb 16",
        "palette",
        "grey alpha 16",
        "rgba 16",
    ],
)
def test_transparency_of_each_png_kind(data, colours, alpha):
    opened = open_picture(data)
    assert row(opened.alpha) == alpha
    assert row(opened.rgb) == [colour if isinstance(colour, tuple) else (colour,) * 3 for colour in colours]


def test_gif_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette(RED + GREEN)
    image.putpixel((1, 0), 1)
    assert row(open_picture(encoded(image, "GIF", transparency=1)).alpha) == [255, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    assert row(open_picture(encoded(Image.fromarray(values), kind)).rgb) == [(v, v, v) for v in (0, 1, 128, 255)]


def test_deep_modes():
    def greys(image: Image.Image) -> list[int]:
        return [pixel[0] for pixel in row(open_picture(image).rgb)]

    assert greys(Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.int32))) == [0, 128, 255]
    assert greys(Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32))) == [0, 128, 255]
    assert greys(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))) == [0, 128, 255]
    assert greys(Image.fromarray(np.array([[0, 128, 255]], dtype=np.float32))) == [0, 128, 255]
    big_endian = Image.frombytes("I;16B", (2, 1), b"\x80\0\xff\xff")
    assert greys(big_endian) == [128, 255]
    for bad in ([[0, np.nan]], [[-1, 1]], [[0, 300]], [[0, np.inf]]):
        with pytest.raises(InputError, match="its values run from"):
            open_picture(Image.fromarray(np.array(bad, dtype=np.float32)))


def test_sixteen_bit_tiff_that_runs_from_white_to_black():
    data = encoded(Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), "TIFF", tiffinfo={262: 0})
    assert row(open_picture(data).rgb) == [WHITE, BLACK]


def test_the_other_colour_modes():
    assert row(open_picture(Image.new("1", (1, 1), 1)).rgb) == [WHITE]
    assert row(open_picture(Image.new("L", (1, 1), 77)).rgb) == [(77, 77, 77)]
    assert difference(open_picture(photo().convert("YCbCr")).rgb, photo()) <= 3
    assert difference(open_picture(photo().convert("HSV")).rgb, photo()) <= 8
    assert difference(open_picture(photo().convert("RGBX")).rgb, photo()) == 0
    lab = Image.new("LAB", (1, 1), (138, 128 + 81, 128 + 70))  # L 54, a 81, b 70: red
    assert np.abs(np.subtract(row(open_picture(encoded(lab, "TIFF")).rgb)[0], RED)).max() <= 8
    palette = photo().convert("P", palette=Image.Palette.ADAPTIVE)
    assert difference(open_picture(encoded(palette, "PNG")).rgb, palette.convert("RGB")) == 0
    cmyk = Image.merge("CMYK", [*photo().split(), Image.new("L", photo().size)])
    assert difference(open_picture(cmyk).rgb, cmyk.convert("RGB")) == 0


def test_the_callers_image_stays_as_it_is():
    image = Image.open(io.BytesIO(png((2, 1), 4, 0, b"\0\x7f", tRNS=b"\0\x0f")))
    before = dict(image.info)
    assert row(open_picture(image).alpha) == [255, 0]
    assert image.info == before
    assert image.mode == "L"


def test_a_raw_files_preview_is_not_taken_for_the_picture():
    for tag in ({254: 1}, {50706: b"\1\4\0\0"}):
        with pytest.raises(InputError, match="camera raw"):
            open_picture(encoded(photo(), "TIFF", tiffinfo=tag))


def test_attached_alpha_leaves_no_fringe():
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    opened = open_picture(image)
    assert opened.alpha is not None
    back = attach_alpha(opened.rgb, opened.alpha)
    visible = np.asarray(opened.alpha) >= 64
    worst = np.abs(np.asarray(back, dtype=int) - np.asarray(image, dtype=int))[visible].max()
    assert worst <= 4  # 255 / 64: the rounding of the composite, divided by the cover
    assert attach_alpha(opened.rgb.resize((12, 8)), opened.alpha).size == (12, 8)
