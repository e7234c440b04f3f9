import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step1x.training.edits import (
    COLOURS,
    FAMILIES,
    GLOBAL,
    LOCAL,
    PLACES,
    all_wordings,
    centre,
    coverage,
    rgb,
    sample,
    words,
)


def picture(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_changes_the_picture_and_stays_in_range(family: str) -> None:
    base = picture()
    for seed in range(8):
        one = sample(family, base, np.random.default_rng(seed))
        assert one.family == family
        assert one.instruction
        assert one.source.dtype == one.target.dtype == np.float32
        assert one.target.shape == base.shape
        assert 0 <= one.target.min() <= one.target.max() <= 1
        assert np.abs(one.source - one.target).max() > 0.05
        assert (one.region is None) == (family not in LOCAL)


@pytest.mark.parametrize("family", LOCAL)
def test_local_edits_leave_the_rest_alone(family: str) -> None:
    for seed in range(8):
        one = sample(family, picture(), np.random.default_rng(seed))
        assert one.region is not None
        outside = one.region == 0
        assert outside.mean() > 0.4
        assert np.array_equal(one.source[outside], one.target[outside])


@given(st.integers(16, 90), st.integers(16, 90), st.sampled_from(sorted(PLACES)), st.sampled_from(["circle", "square"]))
@settings(max_examples=40, deadline=None)
def test_shapes_lie_inside_at_their_place(height: int, width: int, place: str, shape: str) -> None:
    column, row = centre(place, (height, width))
    cover = coverage(shape, place, (height, width))
    assert cover.min() >= 0
    assert cover.max() <= 1
    rows, columns = np.nonzero(cover > 0.5)
    assert abs(columns.mean() + 0.5 - column) < 1.5
    assert abs(rows.mean() + 0.5 - row) < 1.5


def test_global_edits_are_what_they_say() -> None:
    base = picture()
    grey = sample("black_and_white", base, np.random.default_rng(0)).target
    assert np.ptp(grey, axis=2).max() == 0
    assert np.allclose(sample("invert", base, np.random.default_rng(0)).target, 1 - base)
    assert sample("brighter", base, np.random.default_rng(0)).target.mean() > base.mean()
    assert sample("darker", base, np.random.default_rng(0)).target.mean() < base.mean()
    for family, sign in (("warmer", 1), ("cooler", -1)):
        target = sample(family, base, np.random.default_rng(0)).target
        assert sign * (target[..., 0] - target[..., 2]).mean() > sign * (base[..., 0] - base[..., 2]).mean()
    assert sample("increase_contrast", base, np.random.default_rng(0)).target.std() > base.std()
    assert sample("decrease_contrast", base, np.random.default_rng(0)).target.std() < base.std()


def test_added_shape_has_its_colour() -> None:
    for seed in range(10):
        one = sample("add", picture(), np.random.default_rng(seed), chinese_share=0)
        colour = next(name for name in COLOURS if f" {name} " in one.instruction)
        assert one.region is not None
        assert np.allclose(one.target[one.region == 1], rgb(colour), atol=1e-6)


def test_wordings_are_english_and_chinese() -> None:
    said = all_wordings()
    assert len(said) == len(set(said)) > 300
    assert any("红色" in one for one in said)
    assert {one for _, english, chinese in GLOBAL.values() for one in (*english, *chinese)} <= set(said)


def test_chinese_is_cut_at_names() -> None:
    assert words(["add a red circle at the top left", "在左上角加一个红色的圆"]) == [
        "add a red circle at the top left",
        *("在", "左上角", "加一个", "红色", "的", "圆"),
    ]
    assert words(["把方块变成圆形"]) == ["把", "方块", "变成", "圆形"]


def test_unknown_family_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown edit family 'melt'"):
        sample("melt", picture(), np.random.default_rng(0))
