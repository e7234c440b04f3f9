"""Masks: what they mark, and how an edit is put into them."""

import numpy as np
import pytest
from PIL import Image

from step1x.engine.errors import InputError
from step1x.engine.mask import open_mask, pasted
from step1x.engine.picture import open_picture

WIDTH, HEIGHT = 200, 100
SOURCE = Image.new("RGB", (WIDTH, HEIGHT), (10, 20, 30))
EDITED = Image.new("RGB", (WIDTH, HEIGHT), (210, 220, 230))


def marked(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_bright_or_opaque_pixels_are_marked() -> None:
    picture = open_picture(SOURCE)
    bright = Image.new("L", SOURCE.size, 127)
    bright.paste(128, (20, 30, 60, 70))
    assert np.array_equal(open_mask(bright, picture), marked(20, 30, 60, 70))
    opaque = Image.new("RGBA", SOURCE.size, (255, 255, 255, 0))
    opaque.paste((0, 0, 0, 255), (20, 30, 60, 70))
    assert np.array_equal(open_mask(opaque, picture), marked(20, 30, 60, 70))


def test_other_sizes_and_empty_masks_are_refused() -> None:
    with pytest.raises(InputError, match="the mask is 20 x 10, the picture 200 x 100; make them one size"):
        open_mask(Image.new("L", (20, 10), 255), open_picture(SOURCE))
    with pytest.raises(InputError, match="marks nothing"):
        open_mask(Image.new("L", SOURCE.size, 100), open_picture(SOURCE))


@pytest.mark.parametrize("box", [(50, 20, 150, 80), (0, 0, 200, 100), (0, 40, 30, 60)])
def test_the_edit_fades_in_within_the_mask(box: tuple[int, int, int, int]) -> None:
    mask = marked(*box)
    made, source, edited = (np.asarray(one).astype(int) for one in (pasted(EDITED, SOURCE, mask), SOURCE, EDITED))
    assert np.array_equal(made[~mask], source[~mask])
    middle = ((box[1] + box[3]) // 2, (box[0] + box[2]) // 2)
    assert np.abs(made[middle] - edited[middle]).max() <= 1
    if box[0] > 0:
        row = made[middle[0], box[0] : middle[1], 0]
        assert row[0] < row[-1]
        assert (np.diff(row) >= 0).all()


@pytest.mark.parametrize("box", [(50, 50, 51, 51), (50, 0, 52, 100)])
def test_a_mask_too_thin_for_a_seam_shows_the_edit(box: tuple[int, int, int, int]) -> None:
    mask = marked(*box)
    made = np.asarray(pasted(EDITED, SOURCE, mask))
    assert (made[mask] == np.asarray(EDITED)[mask]).all()
    assert (made[~mask] == np.asarray(SOURCE)[~mask]).all()


def test_a_notch_in_a_mask_is_outside() -> None:
    """The blurred mask fills a notch that is narrower than its seam; the picture's own pixels must not be."""
    mask = marked(20, 10, 180, 90)
    mask[10:60, 100:102] = False
    mask[40, 60] = False
    made = np.asarray(pasted(EDITED, SOURCE, mask))
    assert np.array_equal(made[~mask], np.asarray(SOURCE)[~mask])
    assert np.array_equal(made[70, 50:150], np.asarray(EDITED)[70, 50:150])
