"""The rules of skipping on their own: plan strings, limits, morphology against a plain loop, the TeaCache fold."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.engine.plan import (
    GAMMAS_V11,
    GAMMAS_V12,
    DecayRule,
    Guide,
    Mode,
    Stages,
    StepPlan,
    TeaCacheRule,
    as_stored,
    decay_plan,
    decay_ratios,
    decide,
    decisions,
    dilated,
    edited_tokens,
    eroded,
    relative_change,
    similarity,
    spelled,
)
from step1x.engine.schedule import timesteps


def spell(tokens: int, rule: DecayRule) -> str:
    return spelled(decay_plan(timesteps(rule.steps, tokens).tolist(), rule))


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (1024, "FFFFFFRssRssRssFssRssRsssRFF"),
        (2304, "FFFFFFRsssRsssRFssRssRsssRFF"),
        (4020, "FFFFFFRsssssssRFsssRssRsRsFF"),
        (4096, "FFFFFFRsssssssRFsssRssRsRsFF"),
        (4100, "FFFFFFRsssssssRFsssRssRsRsFF"),
        (6400, "FFFFFFRRRRRRRRRFRsRssssRsRFF"),
    ],
)
def test_plans_of_the_reference(tokens: int, wanted: str) -> None:
    assert spell(tokens, DecayRule(gammas=GAMMAS_V11)) == wanted


def test_plan_of_v12() -> None:
    assert spell(4096, DecayRule(gammas=GAMMAS_V12)) == "FFFFFFRsssssRssFssssRssRssFF"


def test_stored_gammas_move_a_skip() -> None:
    assert spell(1024, DecayRule(gammas=as_stored(GAMMAS_V11))) == "FFFFFFRssRssRsRFssRssRsssRFF"


@pytest.mark.parametrize(
    ("threshold", "counts"),
    [(0, "9 19 0"), (0.01, "9 6 13"), (0.02, "9 5 14"), (0.03, "9 3 16"), (0.04, "9 2 17"), (0.08, "9 1 18")],
)
def test_threshold_sweep_of_the_reference(threshold: float, counts: str) -> None:
    plan = spell(4096, DecayRule(gammas=GAMMAS_V11, threshold=threshold))
    assert " ".join(str(plan.count(letter)) for letter in "FRs") == counts


def test_skips_scale_by_their_own_ratio() -> None:
    rule = DecayRule(gammas=GAMMAS_V11)
    schedule = timesteps(28, 4096).tolist()
    ratios = decay_ratios(schedule, rule.gammas)
    for step, made in enumerate(decay_plan(schedule, rule)):
        assert made.scale == (ratios[step - 1] if made.mode is Mode.SKIP else 1.0)


def test_several_refreshes_and_no_post_steps() -> None:
    rule = DecayRule(gammas=GAMMAS_V11, threshold=1.0, warmup=2, post=0, refreshes=(20, 8))
    plan = spell(4096, rule)
    assert [step for step, letter in enumerate(plan) if letter == "F"] == [0, 1, 8, 20]
    assert plan[2] == "R"


def test_velocity_that_does_not_decay_is_never_skipped() -> None:
    schedule = timesteps(28, 4096).tolist()
    gammas = tuple(1 / (1 + after - before) for before, after in pairwise(schedule[:-1]))
    growing = DecayRule(gammas=tuple(gamma * 1.0000001 for gamma in gammas))
    assert "s" not in spelled(decay_plan(schedule, growing))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_plan_keeps_its_promises(data: st.DataObject) -> None:
    steps = data.draw(st.integers(4, 40))
    warmup = data.draw(st.integers(1, steps - 3))
    post = data.draw(st.integers(0, steps - warmup - 2))
    allowed = range(warmup + 1, steps - post - 1)
    refreshes = tuple(step for step in allowed if (step - warmup) % data.draw(st.integers(2, 5)) == 0)
    refreshes = tuple(step for i, step in enumerate(refreshes) if not i or step - refreshes[i - 1] > 1)
    gammas = data.draw(st.lists(st.floats(0.9, 1.1), min_size=steps - 1, max_size=steps - 1))
    threshold = data.draw(st.floats(0, 0.2))
    rule = DecayRule(gammas=tuple(gammas), threshold=threshold, warmup=warmup, post=post, refreshes=refreshes)
    schedule = timesteps(steps, 1024).tolist()
    plan, ratios = decay_plan(schedule, rule), decay_ratios(schedule, rule.gammas)
    assert len(plan) == steps
    drift = 1.0
    for step, made in enumerate(plan):
        assert (made.mode is Mode.FULL) == (step < warmup or step >= steps - post or step in refreshes)
        drift = drift * ratios[step - 1] if made.mode is Mode.SKIP else 1.0
        assert made.mode is not Mode.SKIP or 1 - threshold <= drift < 1
    first_after = plan[warmup].mode
    assert first_after is not Mode.SKIP


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"threshold": -0.1}, "threshold must be at least 0, got -0.1"),
        ({"warmup": 0}, "warmup must be at least 1"),
        ({"post": -1}, "post at least 0"),
        ({"warmup": 27, "refreshes": ()}, "both together at most 28 steps; got 27 and 2"),
        ({"refreshes": (6,)}, "must lie in 7..24, got \\[6\\]"),
        ({"refreshes": (25,)}, "must lie in 7..24"),
        ({"refreshes": (10, 11)}, "adjacent"),
        ({"refreshes": (10, 14, 10)}, "repeated"),
    ],
)
def test_illegal_rules_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DecayRule(gammas=GAMMAS_V11, **values)  # type: ignore[arg-type]


def test_gammas_are_for_one_number_of_steps() -> None:
    with pytest.raises(ValueError, match="27 gammas are for 28 steps, the schedule has 50"):
        decay_plan(timesteps(50, 4096).tolist(), DecayRule(gammas=GAMMAS_V11))


def test_no_room_for_a_refresh_is_said() -> None:
    with pytest.raises(ValueError, match="refresh steps have no room in so few steps, got \\[2\\]"):
        Stages(steps=4, warmup=2, post=1, refreshes=(2,))


def test_spelling_tells_all_modes_and_guides_apart() -> None:
    evaluated = [Mode.FULL, Mode.NOISE, Mode.REGION]
    plan = [StepPlan(mode, guide=guide) for guide in Guide for mode in evaluated]
    assert spelled(plan) == "FNRfnrF-N-R-"
    assert spelled([StepPlan(Mode.SKIP, guide=guide) for guide in Guide]) == "sss"


def brute(mask: Tensor, offsets: list[tuple[int, int]], combine: object) -> Tensor:
    """Morphology cell by cell; cells beyond the border are not set."""
    rows, columns = mask.shape
    made = torch.zeros_like(mask)
    for y in range(rows):
        for x in range(columns):
            near = (0 <= y + dy < rows and 0 <= x + dx < columns and bool(mask[y + dy, x + dx]) for dy, dx in offsets)
            made[y, x] = combine(near)  # type: ignore[operator]
    return made


CROSS = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]
SQUARE = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 999), density=st.floats(0, 1))
def test_morphology_equals_a_plain_loop(rows: int, columns: int, seed: int, density: float) -> None:
    masks = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    for index, mask in enumerate(masks):
        assert torch.equal(eroded(masks)[index], brute(mask, CROSS, all))
        assert torch.equal(dilated(masks)[index], brute(mask, SQUARE, any))


def test_isolated_tokens_vanish_and_regions_grow() -> None:
    similar = torch.ones(1, 9, 12)
    similar[0, 1, 10] = 0  # a speck
    similar[0, 3:7, 2:6] = 0  # a block of 4 x 4
    edited = edited_tokens(similar.flatten(1), (9, 12)).view(9, 12)
    wanted = torch.zeros(9, 12, dtype=torch.bool)
    wanted[2:8, 1:7] = True
    # the eroded block keeps 2 x 2 cells, whose squares cover rows 2..7 and columns 1..6
    assert torch.equal(edited, wanted)


def test_partition_of_a_batch_is_that_of_each_picture() -> None:
    generator = torch.Generator().manual_seed(3)
    estimate, reference = (torch.randn(3, 30, 8, generator=generator) for _ in range(2))
    together = edited_tokens(similarity(estimate, reference), (5, 6), threshold=0.4)
    for index in range(3):
        one = slice(index, index + 1)
        assert torch.equal(
            edited_tokens(similarity(estimate[one], reference[one]), (5, 6), threshold=0.4)[0], together[index]
        )


def test_threshold_itself_counts_as_edited() -> None:
    similar = torch.tensor([[0.25, 0.5, 0.75]])
    edited = edited_tokens(similar, (1, 3), threshold=0.5, smooth=False)
    assert edited.tolist() == [[True, True, False]]


def test_partition_may_be_empty_or_everything() -> None:
    assert not edited_tokens(torch.ones(1, 16), (4, 4)).any()
    assert edited_tokens(torch.zeros(1, 16), (4, 4)).all()


def test_similarity_is_a_cosine_in_float32() -> None:
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = similarity(x, -3 * x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full((1, 5), -1.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [(0, 0.264), (0.02, 0.208), (0.05, 0.181), (0.1, 0.207), (0.15, 0.243), (0.2, 0.262), (0.25, 0.314)],
)
def test_polynomial_has_the_shape_of_the_reference(change: float, wanted: float) -> None:
    assert TeaCacheRule().predicted(change) == pytest.approx(wanted, abs=6e-4)


def test_polynomial_of_any_degree() -> None:
    assert TeaCacheRule(coefficients=(2.0, 3.0, 5.0)).predicted(10.0) == 235.0


def test_polynomial_is_not_used_outside_its_fit() -> None:
    rule = TeaCacheRule(coefficients=(2.0, -1.0), span=(0.25, 1.5))
    assert [rule.predicted(change) for change in (0, 0.25, 0.75, 1.5, 9)] == [0, 0, 0.5, 2, 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"threshold": -1.0}, "threshold of at least 0"),
        ({"coefficients": ()}, "coefficients"),
        ({"span": (0.5, 0.5)}, "must rise from 0"),
        ({"span": (-0.1, 0.5)}, "must rise from 0"),
    ],
)
def test_illegal_polynomials_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TeaCacheRule(**values)


def test_default_threshold_skips_at_most_once_in_a_row() -> None:
    inside = list(decisions(TeaCacheRule(), [0.05] * 7))
    assert [one.compute for one in inside] == [True, False, True, False, True, False, True]
    outside = decisions(TeaCacheRule(), [0.2] * 5)
    assert all(one.compute for one in outside)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 2))
def test_gathered_change_stays_below_the_threshold(changes: list[float], threshold: float) -> None:
    made = list(decisions(TeaCacheRule(threshold=threshold), changes))
    assert len(made) == len(changes)
    assert made[0].compute
    assert made[-1].compute
    for one in made:
        assert one.accumulated == 0.0 if one.compute else one.accumulated < threshold


def test_decision_at_the_threshold_computes() -> None:
    rule = TeaCacheRule(threshold=0.5, coefficients=(1.0, 0.0))
    assert decide(rule, 0.25, 0.25, forced=False).compute
    assert not decide(rule, 0.25, 0.2, forced=False).compute
    assert decide(rule, 0.0, 0.0, forced=True).compute


def test_relative_change() -> None:
    previous = torch.tensor([[1.0, -3.0]])
    assert relative_change(previous, previous) == 0.0
    assert relative_change(torch.tensor([[2.0, -3.0]]), previous) == 0.25
    # half precision: sums are float32, so that 65536 equal parts do not stall
    many = torch.full((65536,), 1.0, dtype=torch.bfloat16)
    assert math.isclose(relative_change(many * 1.5, many), 0.5)
