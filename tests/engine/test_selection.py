"""Choosing rows: against plain loops, and the promises that region steps rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.engine.errors import InputError
from step1x.engine.plan import edited_tokens
from step1x.engine.selection import BUCKET, choose, distance, token_mask


def masks(batch: int, tokens: int, density: float, seed: int) -> Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < density


def plain(edited: list[bool], order: list[float], rows: int) -> list[int]:
    inside = [token for token, one in enumerate(edited) if one]
    others = sorted((token for token, one in enumerate(edited) if not one), key=lambda token: (order[token], token))
    return sorted(inside + others[: rows - len(inside)])


@settings(deadline=None, max_examples=150)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 70),
    bucket=st.integers(1, 80),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_choice_equals_a_plain_loop(batch: int, tokens: int, bucket: int, density: float, seed: int) -> None:
    edited = masks(batch, tokens, density, seed)
    # few distinct values, so that ties are common
    order = torch.randint(0, 6, (batch, tokens), generator=torch.Generator().manual_seed(seed)) / 8
    made = choose(edited, order, bucket)
    counts = edited.sum(dim=1).tolist()
    assert list(made.edited) == counts
    assert made.fell_back == (max(counts) > 0.6 * tokens)
    rows = next(rows for rows in range(bucket, tokens + 2 * bucket, bucket) if rows >= max(counts))
    rows = tokens if made.fell_back else min(rows, tokens)
    for i in range(batch):
        active = made.active[i].tolist()
        assert active == plain(edited[i].tolist(), order[i].tolist(), rows)
        assert set(edited[i].nonzero().flatten().tolist()) <= set(active)
        assert made.kept[i].tolist() == [token for token in range(tokens) if token not in active]


def test_empty_mask_takes_one_bucket_of_the_least_similar() -> None:
    similar = torch.linspace(1, 0.9, 1024)[None]
    made = choose(edited_tokens(similar, (32, 32)), similar)
    assert made.edited == (0,)
    assert not made.fell_back
    assert made.active[0].tolist() == list(range(1024 - BUCKET, 1024))


def test_full_mask_falls_back_to_all_tokens() -> None:
    made = choose(torch.ones(1, 1024, dtype=torch.bool), torch.zeros(1, 1024))
    assert made.fell_back
    assert made.active[0].tolist() == list(range(1024))
    assert made.kept.shape == (1, 0)


@pytest.mark.parametrize(("count", "fell_back"), [(600, False), (601, True)])
def test_falls_back_above_six_tenths(count: int, fell_back: bool) -> None:
    edited = torch.arange(1000)[None] < count
    made = choose(edited, torch.zeros(1, 1000), bucket=8)
    assert made.fell_back == fell_back
    assert made.active.shape[1] == (1000 if fell_back else 600)


def test_batch_is_padded_to_the_bucket_of_its_largest_mask() -> None:
    edited = torch.stack([torch.arange(100) < count for count in (0, 3, 17)])
    made = choose(edited, torch.arange(100.0).flip(0).expand(3, -1), bucket=10)
    assert made.edited == (0, 3, 17)
    assert made.active.shape == (3, 20)
    assert made.active[0].tolist() == list(range(80, 100))
    assert made.active[1].tolist() == [0, 1, 2, *range(83, 100)]
    assert made.active[2].tolist() == [*range(17), 97, 98, 99]


def test_unknown_similarity_comes_last() -> None:
    order = torch.tensor([[float("nan"), 0.5, 0.9, 0.7]])
    assert choose(torch.zeros(1, 4, dtype=torch.bool), order, bucket=3).active.tolist() == [[1, 2, 3]]


def test_bucket_has_a_token() -> None:
    with pytest.raises(InputError, match="at least one token, got 0"):
        choose(torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 4), bucket=0)


def marked(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every token that overlaps a marked cell, cell by cell."""
    made = torch.zeros(grid, dtype=torch.bool)
    height, width = mask.shape
    for y, x in mask.nonzero().tolist():
        for row in range(grid[0]):
            for column in range(grid[1]):
                over_row = row * height < (y + 1) * grid[0] and y * grid[0] < (row + 1) * height
                over_column = column * width < (x + 1) * grid[1] and x * grid[1] < (column + 1) * width
                made[row, column] |= over_row and over_column
    return made.flatten()


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_mask_of_any_size_marks_each_token_it_touches(
    height: int, width: int, rows: int, columns: int, seed: int
) -> None:
    mask = masks(1, height * width, 0.05, seed).view(1, height, width)
    mask[0, seed % height, seed % width] = True
    assert torch.equal(token_mask(mask, (rows, columns))[0], marked(mask[0], (rows, columns)))


def test_one_pixel_in_each_corner_is_one_token() -> None:
    mask = torch.zeros(1, 48, 80, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 47, 79] = mask[0, 15, 16] = True
    assert token_mask(mask, (3, 5))[0].nonzero().flatten().tolist() == [0, 1, 14]


def test_mask_that_marks_nothing_is_an_error() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0] = True
    with pytest.raises(InputError, match="the mask marks nothing"):
        token_mask(mask, (4, 4))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_distance_equals_a_plain_loop(rows: int, columns: int, seed: int) -> None:
    edited = masks(2, rows * columns, 0.1, seed)
    made = distance(edited, (rows, columns)).view(2, rows, columns)
    for i in range(2):
        points = [divmod(token, columns) for token in edited[i].nonzero().flatten().tolist()]
        for row in range(rows):
            for column in range(columns):
                nearest = min((max(abs(row - y), abs(column - x)) for y, x in points), default=max(rows, columns))
                assert made[i, row, column] == nearest


def test_mask_grows_around_itself() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 3, 3] = True
    edited = token_mask(mask, (8, 8))
    made = choose(edited, distance(edited, (8, 8)), bucket=9)
    assert made.active[0].tolist() == [row * 8 + column for row in (2, 3, 4) for column in (2, 3, 4)]
