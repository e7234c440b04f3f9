"""Sizes, packing, position ids and pixels: properties, and the errors of sizes that do not work."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from step1x.engine.errors import InputError
from step1x.engine.image import (
    Canvas,
    fit,
    grid_ids,
    image_ids,
    pack,
    pixels,
    resized,
    to_image,
    to_tensor,
    unpack,
)

GOLDEN = Path(__file__).parent.parent / "golden"
SIDES = st.integers(1, 20000)


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 16),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.int64]),
)
def test_unpack_is_the_inverse_of_pack(batch: int, channels: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    count = batch * channels * rows * columns * 4
    latents = (torch.arange(count) % 251).view(batch, channels, 2 * rows, 2 * columns).to(dtype)
    tokens = pack(latents)
    assert (tokens.shape, tokens.dtype) == ((batch, rows * columns, 4 * channels), dtype)
    assert torch.equal(unpack(tokens, (rows, columns)), latents)


def test_features_are_channel_then_row_then_column() -> None:
    latents = torch.arange(16 * 4 * 6, dtype=torch.float32).view(1, 16, 4, 6)
    tokens = pack(latents)
    for row in range(2):
        for column in range(3):
            for channel in range(16):
                for y in range(2):
                    for x in range(2):
                        got = tokens[0, row * 3 + column, channel * 4 + y * 2 + x]
                        assert got == latents[0, channel, 2 * row + y, 2 * column + x]


def test_ids() -> None:
    assert grid_ids((2, 3)).tolist() == [[[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]]
    assert grid_ids((1, 2), (1, 2, 3)).tolist() == [[[1, 2, 3], [1, 2, 4]]]


@settings(deadline=None)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    offset=st.sampled_from([None, (0, 0, 0), (1, 1, 1), (1, 0, 0)]),
)
def test_image_ids_are_those_of_the_target_then_of_the_reference(
    rows: int, columns: int, offset: tuple[int, int, int] | None
) -> None:
    ids = image_ids((rows, columns), offset)
    count = rows * columns
    assert ids.dtype == torch.float32
    assert ids.shape == (1, count if offset is None else 2 * count, 3)
    for index in range(count):
        target = torch.tensor([0.0, index // columns, index % columns])
        assert torch.equal(ids[0, index], target)
        if offset is not None:
            assert torch.equal(ids[0, count + index], target + torch.tensor(offset))


@settings(deadline=None, max_examples=300)
@given(width=SIDES, height=SIDES, level=st.sampled_from([64, 128, 256, 512, 768, 1024, 1280]))
@example(width=15, height=20000, level=512)
@example(width=64, height=4096, level=512)
def test_fit_keeps_area_and_aspect_within_one_token(width: int, height: int, level: int) -> None:
    ideal = level * math.sqrt(width / height), level * math.sqrt(height / width)
    if min(ideal) < 14:
        with pytest.raises(InputError, match=f"a picture of {width}x{height} is too narrow .* size {level}"):
            fit(width, height, level)
        return
    if min(ideal) < 17:
        return  # on the edge: rounding decides
    for side, wanted in zip(fit(width, height, level), ideal, strict=True):
        assert side % 16 == 0
        assert wanted - 16 < side < wanted + 2


@pytest.mark.parametrize(
    ("source", "level", "wanted"),
    [
        ((512, 512), 512, (512, 512)),
        ((1024, 1536), 512, (416, 624)),
        ((1024, 1536), 768, (624, 928)),
        ((1024, 1536), 1024, (832, 1248)),
        ((1920, 1080), 512, (672, 384)),
        ((1920, 1080), 768, (1024, 576)),
        ((1920, 1080), 1024, (1360, 768)),
        ((800, 600), 512, (592, 432)),
        ((1, 1), 16, (16, 16)),
    ],
)
def test_fit_by_example(source: tuple[int, int], level: int, wanted: tuple[int, int]) -> None:
    assert fit(*source, level) == wanted


def test_fit_refuses_tiny_levels() -> None:
    with pytest.raises(InputError, match="size 15 is below 16 pixels"):
        fit(100, 100, 15)


def test_canvas() -> None:
    canvas = Canvas(64, 48)
    assert (canvas.grid, canvas.tokens, canvas.latent_size) == ((3, 4), 12, (6, 8))


@pytest.mark.parametrize(("width", "height"), [(0, 16), (16, 0), (-16, 16), (17, 16), (16, 40)])
def test_canvas_refuses_other_sizes(width: int, height: int) -> None:
    with pytest.raises(InputError, match=f"{width}x{height}: both sides must be multiples of 16"):
        Canvas(width, height)


def photograph(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width * height)
    data = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.frombytes("RGB", (width, height), data.numpy().tobytes())


def test_every_byte_survives_the_way_there_and_back() -> None:
    levels = Image.frombytes("RGB", (256, 1), bytes(value for level in range(256) for value in (level, 0, 255)))
    tensor = to_tensor(levels)
    assert (tensor.shape, tensor.dtype) == ((1, 3, 1, 256), torch.float32)
    assert tensor[0, :, 0, 7].tolist() == pytest.approx([7 / 255, 0, 1])
    assert to_image((tensor * 2 - 1)[0], truncate=False).tobytes() == levels.tobytes()


def constant(value: float) -> Tensor:
    return torch.full((3, 2, 4), value)


@pytest.mark.parametrize(
    ("value", "truncated", "rounded"), [(0.5, 191, 191), (0.9999, 254, 255), (-1, 0, 0), (7, 255, 255), (-7, 0, 0)]
)
def test_output_is_clamped_and_truncated_or_rounded(value: float, truncated: int, rounded: int) -> None:
    for truncate, wanted in ((True, truncated), (False, rounded)):
        image = to_image(constant(value).bfloat16() if value == 0.5 else constant(value), truncate)
        assert (image.mode, image.size) == ("RGB", (4, 2))
        assert set(image.tobytes()) == {wanted}


def test_output_is_row_by_row_and_takes_views() -> None:
    source = photograph(5, 3)
    turned = (to_tensor(source) * 2 - 1)[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    assert to_image(turned, truncate=False).tobytes() == source.tobytes()


@pytest.mark.parametrize("resize", ["bicubic", "lanczos", "bilinear-antialias"])
def test_resized(resize: str) -> None:
    image = resized(photograph(37, 21), Canvas(32, 48), resize)
    assert (image.mode, image.size) == ("RGB", (32, 48))
    same = photograph(32, 48)
    assert resized(same, Canvas(32, 48), resize) is same


@pytest.mark.parametrize("resize", ["bicubic", "lanczos", "bilinear-antialias"])
@pytest.mark.parametrize("size", [(37, 21), (1, 1), (200, 16)])
def test_pixels(resize: str, size: tuple[int, int]) -> None:
    got = pixels(photograph(*size), Canvas(32, 48), resize)
    assert (got.shape, got.dtype) == ((1, 3, 48, 32), torch.float32)
    assert got.min() >= -1
    assert got.max() <= 1
    flat = pixels(Image.new("RGB", size, (255, 0, 51)), Canvas(32, 48), resize)
    torch.testing.assert_close(flat[0, :, 5, 5], torch.tensor([1.0, -1.0, -0.6]))


def test_pixels_of_a_picture_that_fits_are_its_own() -> None:
    source = photograph(32, 16)
    for resize in ("bicubic", "lanczos", "bilinear-antialias"):
        torch.testing.assert_close(pixels(source, Canvas(32, 16), resize), to_tensor(source) * 2 - 1)


@pytest.mark.golden
@pytest.mark.parametrize("level", [512, 768, 1024])
def test_golden_sizes_of_the_release(level: int) -> None:
    rows = json.loads((GOLDEN / "resize.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        wanted = row[f"official_{level}"]
        if "error" not in wanted:
            assert list(fit(row["w"], row["h"], level)) == wanted, (row["w"], row["h"])
