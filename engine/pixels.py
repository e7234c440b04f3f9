"""The pixels of any PIL image as upright 8-bit sRGB and alpha, each form of storage by its own rule."""

import io
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFile

from step1x.engine.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# EXIF orientation -> how to turn the stored pixels upright (EXIF 2.32, tag 0x0112)
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SUBFILE_TYPE, PHOTOMETRIC, DNG_VERSION = 254, 262, 50706  # TIFF tags (TIFF 6.0, DNG 1.7)
WHITE = 255  # what the model sees behind transparent pixels


def standard(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """`image`, decoded here if it is not yet, as sRGB colours (RGB) and alpha (L or None), upright, bare.

    The colours keep what lies beneath transparent parts. Raises InputError for values that cannot be scaled
    to 8 bits and for camera raw files; whatever Pillow raises on damaged data passes through.
    """
    white, inverted, key = _depth(image)
    image.load()  # before anything that swallows errors: a second load after a failed one succeeds, with blanks
    turn = _turn(image)  # none for a TIFF: Pillow has turned it while loading, and removed the tag
    if key != image.info.get("transparency"):
        image = image.copy()  # the caller's stays as it is
        image.info["transparency"] = key
    colour, alpha = _split(image, white)
    if inverted:
        colour = colour.point([255 - value for value in range(256)])
    rgb = _srgb(colour, image.info.get("icc_profile"))
    if turn is not None:
        rgb, alpha = rgb.transpose(turn), alpha.transpose(turn) if alpha else None
    return bare(rgb), bare(alpha) if alpha else None


def on_background(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    """`rgb` seen through `alpha` (L) before white: what the model gets, and what a JPEG shows."""
    return Image.composite(rgb, Image.new("RGB", rgb.size, (WHITE, WHITE, WHITE)), alpha)


def attach_alpha(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    """`rgb`, an edit of a picture that was put `on_background`, with `alpha` (resized to it): mode RGBA.

    The background's share is taken out of half-transparent pixels, which would else keep a white fringe.
    """
    import numpy as np

    if alpha.size != rgb.size:
        alpha = alpha.resize(rgb.size, Image.Resampling.BICUBIC)
    cover = np.asarray(alpha, dtype=np.float32)[..., None] / 255
    seen = np.asarray(rgb.convert("RGB"), dtype=np.float32)
    own = (seen - (1 - cover) * WHITE) / np.maximum(cover, 1 / 255)
    own = np.where(cover > 0, own, WHITE).clip(0, 255)
    attached = Image.fromarray(np.rint(own).astype(np.uint8))
    attached.putalpha(alpha)
    return attached


def bare(image: Image.Image) -> Image.Image:
    """A copy without metadata: no EXIF (which may hold a place), no profile, no comments."""
    copy = image.copy()
    copy.info = {}
    return copy


def _depth(image: Image.Image) -> tuple[int, bool, Any]:
    """What Pillow leaves undone about a file's bit depth; it must be asked before decoding.

    The stored value that means white (0: by the mode's own rule), whether the scale runs from white to black,
    and the transparent entry or key colour in decoded values. Refuses camera raw files, whose first TIFF
    picture is a small preview.
    """
    raw = _raw_mode(image)
    inverted = False
    if image.format == "TIFF" and raw:
        tags: dict[int, Any] = image.tag_v2  # type: ignore[attr-defined]  # only TiffImageFile has it
        if DNG_VERSION in tags or tags.get(SUBFILE_TYPE, 0) & 1:
            raise InputError("it is a camera raw file with a small preview; save it as PNG or JPEG first")
        inverted = image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == 0
    key = image.info.get("transparency")
    if image.format == "PNG" and key is not None:
        # The PNG key colour is stored at the file's depth, the pixels arrive at 8 bits (PNG §11.3.2.1).
        if raw in ("L;2", "L;4"):
            key *= 255 // (2 ** int(raw[2:]) - 1)
        elif raw == "RGB;16B":
            key = tuple(value >> 8 for value in key)
    return (4095 if raw == "I;12" else 0), inverted, key


def _raw_mode(image: Image.Image) -> str:
    """How the file stores a pixel in Pillow's words, '' once it is decoded."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return ""
    arguments = image.tile[0].args
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings the picture upright, by its EXIF (or XMP) orientation; a damaged block counts as none."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF is a TIFF in miniature and fails in as many ways; the pixels are still good
        return None


def _split(image: Image.Image, white: int) -> tuple[Image.Image, Image.Image | None]:
    """Colours at 8 bits in a mode that ImageCms knows (L, RGB, CMYK, LAB), and alpha (L) or None."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _shallow(image, white)
    if mode in ("LA", "La"):
        grey = image.convert("LA")
        return grey.getchannel("L"), grey.getchannel("A")
    if image.has_transparency_data:  # RGBA, RGBa, PA, and P, 1, L, RGB with a transparent entry or key colour
        with_alpha = image.convert("RGBA")
        colour = bare(image) if mode in ("L", "RGB") else with_alpha.convert("RGB")
        return colour, with_alpha.getchannel("A")
    if mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if mode == "1" else "RGB"), None


def _shallow(image: Image.Image, white: int) -> tuple[Image.Image, Image.Image | None]:
    """Greys of 12, 16 or 32 bits or floats, scaled (convert("L") would clip at 255), and alpha (L) or None.

    Integers: 65535 is white, 2^31 - 1 if larger values occur. Floats: 1 is white if no value is above 1,
    else 255.
    """
    import numpy as np

    values: NDArray[Any] = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        white = 1 if high <= 1 else 255
    elif not white:
        white = 65535 if high <= 65535 else 2**31 - 1
    if not (low >= 0 and high <= white):  # NaN fails this too
        raise InputError(f"its values run from {low:g} to {high:g}; save it with 8 or 16 bits per channel")
    grey = np.rint(values.astype(np.float32) * np.float32(255 / white)).astype(np.uint8)
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return Image.fromarray(grey), None
    return Image.fromarray(grey), Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))


def _srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    """`colour` (L, RGB, CMYK, LAB) in sRGB (RGB) by its ICC profile; a broken or foreign one is ignored."""
    converted = None
    if profile and colour.mode != "LAB":
        from PIL import ImageCms

        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(colour, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            converted = None
    return converted or (colour if colour.mode == "RGB" else bare(colour).convert("RGB"))
