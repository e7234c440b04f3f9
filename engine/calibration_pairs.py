"""What a model is calibrated on: pictures and instructions, by default some that need no file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from step1x.engine.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

# Local and global edits, of colour, content, weather and style.
INSTRUCTIONS = (
    "make it darker",
    "change the background to a beach",
    "turn it into a pencil drawing",
    "add a red hat",
    "remove the object in the middle",
    "make the sky stormy",
    "replace the wall with bricks",
    "make it black and white",
    "let it snow",
    "turn the green parts blue",
    "make it look like an oil painting",
    "add a bird in the top left corner",
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_BYTES = 1 << 20  # of a file of instructions
CELLS = (3, 9, 27)  # a computed picture is the sum of fields of so many random cells a side, each half as strong
SHAPES = 4


def pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names. Raises InputError if there are none."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not files:
        raise InputError(f"{folder}: no pictures in it; looked for {', '.join(PICTURES)}")
    return files


def instructions(file: Path) -> list[str]:
    """The lines of a text file that hold anything. Raises InputError if none does, or it cannot be read."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InputError(f"{file}: larger than {MAX_BYTES} bytes; are these instructions?")
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text") from error
    if not any(lines):
        raise InputError(f"{file}: no instructions in it, one a line")
    return [line for line in lines if line]


def pairs(
    count: int, side: int, files: Sequence[Path] | None = None, words: Sequence[str] = INSTRUCTIONS
) -> "Iterator[tuple[Image, str]]":
    """So many (picture, instruction), none twice before all combinations have been there.

    Pictures are squares, so that all are edited at one size: the middles of `files`, or computed ones of `side`.
    Raises InputError for a file that is no picture.
    """
    from step1x.engine.picture import open_picture

    for index in range(count):
        if files is None:
            yield drawn(index, side), words[index % len(words)]
        else:
            turn, at = divmod(index, len(files))
            yield squared(open_picture(files[at]).rgb), words[(turn + at) % len(words)]


def squared(image: "Image") -> "Image":
    """The largest square in the middle of a picture."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def drawn(seed: int, side: int) -> "Image":
    """A computed picture: a cloudy field of colours with a few plain shapes before it."""
    import numpy as np
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), (128, 128, 128))
    for octave, cells in enumerate(CELLS):
        field = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image = Image.blend(image, field.resize(image.size, Image.Resampling.BICUBIC), 0.8 / 2**octave)
    brush = ImageDraw.Draw(image)
    for index in range(SHAPES):
        left, top = random.integers(0, side * 3 // 4, 2).tolist()
        width, height = random.integers(side // 8, side // 3, 2).tolist()
        paint = brush.ellipse if index % 2 else brush.rectangle
        paint((left, top, left + width, top + height), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image
