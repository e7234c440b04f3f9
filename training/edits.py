"""Programmatic edits: families of (instruction, source, target, region) on any picture.

Pictures are float32 arrays (height, width, 3) in [0, 1]. Every edit is exact and cheap, so that a result can be judged
against its target. `region` is the float32 (height, width) coverage of what a local edit may change, None for a
global edit. Families and wording are the data of the bundled checkpoint; `bench/quality.py` measures on the same.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

Picture = np.ndarray
Random = np.random.Generator

COLOURS = {
    "red": ("红色", (0.86, 0.12, 0.14)),
    "green": ("绿色", (0.12, 0.66, 0.24)),
    "blue": ("蓝色", (0.13, 0.29, 0.85)),
    "yellow": ("黄色", (0.97, 0.86, 0.14)),
    "purple": ("紫色", (0.56, 0.18, 0.70)),
    "orange": ("橙色", (0.98, 0.55, 0.10)),
}
SHAPES = {"circle": ("圆", "圆形"), "square": ("方块", "正方形")}
# name -> (Chinese, column and row: -1 at the left or top edge, 0 in the middle, 1 at the right or bottom edge)
PLACES = {
    "top left": ("左上角", (-1, -1)),
    "top": ("上方", (0, -1)),
    "top right": ("右上角", (1, -1)),
    "left": ("左边", (-1, 0)),
    "centre": ("中间", (0, 0)),
    "right": ("右边", (1, 0)),
    "bottom left": ("左下角", (-1, 1)),
    "bottom": ("下方", (0, 1)),
    "bottom right": ("右下角", (1, 1)),
}
HALVES = {"left": "左半边", "right": "右半边", "top": "上半部分", "bottom": "下半部分"}
RADIUS = 0.22  # of the shorter side: half the extent of an added shape
INSET = 0.24  # of the shorter side: how far from an edge a shape at it has its centre


@dataclass(frozen=True, slots=True)
class Sample:
    """One training or test example."""

    family: str
    instruction: str
    source: Picture
    target: Picture
    region: Picture | None


def rgb(colour: str) -> Picture:
    return np.asarray(COLOURS[colour][1], dtype=np.float32)


def luma(picture: Picture) -> Picture:
    return (picture @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32))[..., None]


def blur(picture: Picture) -> Picture:
    height, width, _ = picture.shape
    image = Image.fromarray((picture * 255 + 0.5).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(min(height, width) / 40))
    return np.asarray(image, dtype=np.float32) / 255


def sepia(picture: Picture) -> Picture:
    return luma(picture) * np.asarray([1.07, 0.86, 0.64], dtype=np.float32) + np.float32(0.03)


# family -> (function, English wordings, Chinese wordings)
GLOBAL: dict[str, tuple[Callable[[Picture], Picture], Sequence[str], Sequence[str]]] = {
    "black_and_white": (
        lambda p: np.repeat(luma(p), 3, axis=2),
        ("make it black and white", "turn the photo into black and white", "convert to grayscale"),
        ("变成黑白照片", "把图片变成黑白"),
    ),
    "invert": (
        lambda p: 1 - p,
        ("invert the colours", "invert the colors", "make it a negative"),
        ("反转颜色", "变成负片"),
    ),
    "brighter": (
        lambda p: 1 - (1 - p) * np.float32(0.6),
        ("make it brighter", "brighten the picture", "make the photo lighter"),
        ("调亮一点", "让图片更亮"),
    ),
    "darker": (
        lambda p: p * np.float32(0.5),
        ("make it darker", "darken the picture", "make the photo dark"),
        ("调暗一点", "让图片更暗"),
    ),
    "warmer": (
        lambda p: p * np.asarray([0.9, 0.92, 0.66], np.float32) + np.asarray([0.1, 0.05, 0], np.float32),
        ("make it warmer", "use warmer colours", "give it a warm tone"),
        ("色调更暖", "变成暖色调"),
    ),
    "cooler": (
        lambda p: p * np.asarray([0.66, 0.92, 0.9], np.float32) + np.asarray([0, 0.05, 0.1], np.float32),
        ("make it cooler", "use cooler colours", "give it a cold tone"),
        ("色调更冷", "变成冷色调"),
    ),
    "sepia": (
        sepia,
        ("make it sepia", "apply a sepia tone", "make it look like an old photo"),
        ("变成复古棕褐色", "做成老照片"),
    ),
    "blur": (
        blur,
        ("blur the picture", "make it blurry", "apply a blur"),
        ("模糊图片", "让图片变模糊"),
    ),
    "increase_contrast": (
        lambda p: (p - np.float32(0.5)) * np.float32(1.8) + np.float32(0.5),
        ("increase the contrast", "more contrast", "make the contrast stronger"),
        ("提高对比度", "增强对比度"),
    ),
    "decrease_contrast": (
        lambda p: (p - np.float32(0.5)) * np.float32(0.5) + np.float32(0.5),
        ("decrease the contrast", "less contrast", "make the contrast weaker"),
        ("降低对比度", "减弱对比度"),
    ),
}
LOCAL = ("add", "remove", "recolour", "reshape", "paint_half")
FAMILIES = (*GLOBAL, "tint", *LOCAL)


def centre(place: str, size: tuple[int, int]) -> tuple[float, float]:
    """Column and row in pixels of the middle of a shape at `place` of a picture (height, width).

    Outer places keep their distance from the edge, whatever the aspect.
    """
    inset = INSET * min(size)
    column, row = (
        (inset, extent / 2, extent - inset)[side + 1] for side, extent in zip(PLACES[place][1], size[::-1], strict=True)
    )
    return column, row


def coverage(shape: str, place: str, size: tuple[int, int]) -> Picture:
    """Antialiased coverage (height, width) in [0, 1] of a shape of RADIUS at `place`."""
    height, width = size
    column, row = centre(place, size)
    x = np.arange(width, dtype=np.float32)[None] + np.float32(0.5 - column)
    y = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5 - row)
    reach = np.sqrt(x * x + y * y) if shape == "circle" else np.maximum(np.abs(x), np.abs(y))
    return np.clip(0.5 - (reach - RADIUS * min(size)), 0, 1).astype(np.float32)


def painted(picture: Picture, cover: Picture, colour: str) -> Picture:
    return picture + cover[..., None] * (rgb(colour) - picture)


def pick(random: Random, options: Iterable[str]) -> str:
    names = list(options)
    return names[int(random.integers(len(names)))]


def other(random: Random, options: Iterable[str], but: str) -> str:
    return pick(random, [name for name in options if name != but])


def wording(random: Random, english: Sequence[str], chinese: Sequence[str], chinese_share: float) -> str:
    return pick(random, chinese if random.random() < chinese_share else english)


def _tint(picture: Picture, random: Random, chinese: float) -> Sample:
    colour = pick(random, COLOURS)
    name = COLOURS[colour][0]
    words = wording(
        random,
        (f"tint it {colour}", f"give it a {colour} tint", f"add a {colour} tint"),
        (f"加上{name}色调", f"染成{name}"),
        chinese,
    )
    target = picture * np.float32(0.5) + np.float32(0.5) * rgb(colour) * (0.35 + luma(picture))
    return Sample("tint", words, picture, target, None)


def _add(picture: Picture, random: Random, chinese: float) -> Sample:
    colour, shape, place = pick(random, COLOURS), pick(random, SHAPES), pick(random, PLACES)
    where = "in the centre" if place == "centre" else f"at the {place}"
    spot = PLACES[place][0]
    words = wording(
        random,
        (f"add a {colour} {shape} {where}", f"put a {colour} {shape} {where}"),
        (
            f"在{spot}加一个{COLOURS[colour][0]}的{SHAPES[shape][0]}",
            f"在{spot}画一个{COLOURS[colour][0]}{SHAPES[shape][1]}",
        ),
        chinese,
    )
    cover = coverage(shape, place, picture.shape[:2])
    return Sample("add", words, picture, painted(picture, cover, colour), cover)


def _object(picture: Picture, random: Random) -> tuple[str, str, str, Picture, Picture]:
    """A colour, a shape, a place, its coverage, and the picture with it."""
    colour, shape, place = pick(random, COLOURS), pick(random, SHAPES), pick(random, PLACES)
    cover = coverage(shape, place, picture.shape[:2])
    return colour, shape, place, cover, painted(picture, cover, colour)


def _remove(picture: Picture, random: Random, chinese: float) -> Sample:
    colour, shape, _, cover, source = _object(picture, random)
    words = wording(
        random,
        (f"remove the {colour} {shape}", f"remove the {shape}", f"delete the {colour} {shape}"),
        (f"去掉{COLOURS[colour][0]}的{SHAPES[shape][0]}", f"删除{SHAPES[shape][0]}"),
        chinese,
    )
    return Sample("remove", words, source, picture, cover)


def _recolour(picture: Picture, random: Random, chinese: float) -> Sample:
    colour, shape, _, cover, source = _object(picture, random)
    new = other(random, COLOURS, colour)
    words = wording(
        random,
        (f"make the {shape} {new}", f"change the {shape} to {new}", f"make the {colour} {shape} {new}"),
        (
            f"把{SHAPES[shape][0]}变成{COLOURS[new][0]}",
            f"把{COLOURS[colour][0]}的{SHAPES[shape][0]}改成{COLOURS[new][0]}",
        ),
        chinese,
    )
    return Sample("recolour", words, source, painted(picture, cover, new), cover)


def _reshape(picture: Picture, random: Random, chinese: float) -> Sample:
    colour, shape, place, cover, source = _object(picture, random)
    new = other(random, SHAPES, shape)
    words = wording(
        random,
        (f"turn the {shape} into a {new}", f"replace the {shape} with a {new}"),
        (
            f"把{SHAPES[shape][0]}换成{SHAPES[new][0]}",
            f"把{COLOURS[colour][0]}的{SHAPES[shape][0]}变成{SHAPES[new][1]}",
        ),
        chinese,
    )
    new_cover = coverage(new, place, picture.shape[:2])
    target = painted(picture, new_cover, colour)
    return Sample("reshape", words, source, target, np.maximum(cover, new_cover))


def _paint_half(picture: Picture, random: Random, chinese: float) -> Sample:
    colour, half = pick(random, COLOURS), pick(random, HALVES)
    height, width, _ = picture.shape
    cover = np.zeros((height, width), np.float32)
    cover[
        height // 2 if half == "bottom" else 0 : height // 2 if half == "top" else height,
        width // 2 if half == "right" else 0 : width // 2 if half == "left" else width,
    ] = 1
    words = wording(
        random,
        (f"paint the {half} half {colour}", f"make the {half} half {colour}"),
        (f"把{HALVES[half]}涂成{COLOURS[colour][0]}", f"{HALVES[half]}变成{COLOURS[colour][0]}"),
        chinese,
    )
    return Sample("paint_half", words, picture, painted(picture, cover, colour), cover)


_DRAWN = {
    "tint": _tint,
    "add": _add,
    "remove": _remove,
    "recolour": _recolour,
    "reshape": _reshape,
    "paint_half": _paint_half,
}


def sample(family: str, picture: Picture, random: Random, chinese_share: float = 0.35) -> Sample:
    """A random edit of `family` on `picture` (height, width, 3) float32 in [0, 1].

    Raises ValueError for an unknown family.
    """
    if family in GLOBAL:
        function, english, chinese = GLOBAL[family]
        words = wording(random, english, chinese, chinese_share)
        result = Sample(family, words, picture, function(picture), None)
    elif family in _DRAWN:
        result = _DRAWN[family](picture, random, chinese_share)
    else:
        raise ValueError(f"unknown edit family {family!r}; known: {', '.join(FAMILIES)}")
    target = np.clip(result.target, 0, 1).astype(np.float32)
    return Sample(family, result.instruction, result.source, target, result.region)


def all_wordings() -> list[str]:
    """Every instruction the families can say."""
    random = np.random.default_rng(0)
    blank = np.zeros((8, 8, 3), np.float32)
    said = {words for _, english, chinese in GLOBAL.values() for words in (*english, *chinese)}
    for family in FAMILIES:
        said.update(sample(family, blank, random, 0.5).instruction for _ in range(600))
    return sorted(said)


def words(instructions: Iterable[str]) -> list[str]:
    """The text the tokenizer is trained on: instructions, the Chinese ones cut at the names of colours, shapes, places.

    Chinese has no spaces: trained on whole instructions, byte pairs merge each into a token of its own, and what a
    colour or a place is must be learned once for every instruction that names it.
    """
    tables = (COLOURS, PLACES, HALVES)
    names = {value if isinstance(value, str) else value[0] for table in tables for value in table.values()}
    names.update(name for shape in SHAPES.values() for name in shape)
    cut = re.compile("(" + "|".join(sorted(names, key=len, reverse=True)) + ")")
    return [part for instruction in instructions for part in cut.split(instruction) if part]
