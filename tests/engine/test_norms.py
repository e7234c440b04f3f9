"""Norms along the schedule: the released table at its own steps, and one curve for all other schedules."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step1x.engine.norms import FITTED_TOKENS, Gammas, NormCurve
from step1x.engine.plan import GAMMAS_V11, GAMMAS_V12, decay_ratios
from step1x.engine.schedule import timesteps


@pytest.mark.parametrize("table", [GAMMAS_V11, GAMMAS_V12])
def test_curve_gives_the_table_where_it_was_fitted(table: tuple[float, ...]) -> None:
    schedule = timesteps(28, FITTED_TOKENS).tolist()
    ratios = Gammas(table).curve.ratios(schedule)
    assert ratios == pytest.approx(decay_ratios(schedule, table), rel=1e-12)
    gammas = [ratio / (1 + schedule[i + 1] - schedule[i]) for i, ratio in enumerate(ratios)]
    assert gammas == pytest.approx(table, rel=1e-12)


@pytest.mark.parametrize("tokens", [1024, 4096, 6400])
def test_table_goes_step_by_step_at_its_own_number_of_steps(tokens: int) -> None:
    schedule = timesteps(28, tokens).tolist()
    assert Gammas(GAMMAS_V11).ratios(schedule) == decay_ratios(schedule, GAMMAS_V11)


def test_other_numbers_of_steps_go_by_the_curve() -> None:
    schedule = timesteps(14, 2304).tolist()
    assert Gammas(GAMMAS_V11).ratios(schedule) == Gammas(GAMMAS_V11).curve.ratios(schedule)


@given(st.integers(2, 40), st.integers(256, 6400))
def test_ratios_over_short_steps_multiply_to_those_over_long_ones(steps: int, tokens: int) -> None:
    curve = Gammas(GAMMAS_V11).curve
    long = curve.ratios(timesteps(steps, tokens).tolist())
    short = curve.ratios(timesteps(2 * steps, tokens).tolist())
    for i, ratio in enumerate(long):
        pair = short[2 * i] * short[2 * i + 1]
        assert pair == pytest.approx(ratio, rel=1e-6) or (math.isinf(pair) and math.isinf(ratio))


def test_curve_between_and_beyond_its_levels() -> None:
    curve = NormCurve(levels=(0.8, 0.4), norms=(4.0, 1.0))
    assert curve.ratios([0.8, 0.6, 0.4, 0.0]) == pytest.approx([0.5, 0.5])
    assert curve.ratios([0.9, 0.8, 0.4, 0.3, 0.0]) == pytest.approx([math.inf, 0.25, math.inf])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"levels": (0.5,), "norms": (1.0,)}, "at least two levels that fall"),
        ({"levels": (0.5, 0.5), "norms": (1.0, 1.0)}, "at least two levels that fall"),
        ({"levels": (1.0, 0.5), "norms": (1.0,)}, "needs 2 positive norms"),
        ({"levels": (1.0, 0.5), "norms": (1.0, 0.0)}, "needs 2 positive norms"),
        ({"levels": (1.0, 0.5), "norms": (1.0, math.nan)}, "needs 2 positive norms"),
    ],
)
def test_illegal_curves_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NormCurve(**values)
