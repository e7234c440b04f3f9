from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from step1x.training.pictures import Photographs, picture, scene


@pytest.fixture
def photographs(tmp_path: Path) -> Photographs:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    Image.fromarray(pixels[:40, :32]).save(tmp_path / "small.jpg")
    (tmp_path / "note.txt").write_text("not a picture")
    return Photographs(tmp_path)


def test_crops_have_the_size_asked_for(photographs: Photographs) -> None:
    assert len(photographs.images) == 2
    random = np.random.default_rng(0)
    for height, width in ((16, 48), (48, 16), (32, 32)):
        for _ in range(10):
            made = photographs.crop(random, height, width)
            assert made.shape == (height, width, 3)
            assert made.dtype == np.float32
            assert 0 <= made.min() <= made.max() <= 1


def test_same_seed_same_picture(photographs: Photographs) -> None:
    first, second = (picture(photographs, np.random.default_rng(5), 32, 32, 0.5) for _ in range(2))
    assert np.array_equal(first, second)


def test_scenes_differ_and_are_in_range() -> None:
    random = np.random.default_rng(0)
    made = [scene(random, 24, 40) for _ in range(4)]
    assert all(one.shape == (24, 40, 3) and 0 <= one.min() <= one.max() <= 1 for one in made)
    assert not np.array_equal(made[0], made[1])


def test_a_folder_without_photographs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photographs"):
        Photographs(tmp_path)
