"""Policies: published plans, the promises of any composition, and each policy's rule against a plain loop."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.engine.errors import InputError
from step1x.engine.norms import Gammas, NormCurve
from step1x.engine.plan import (
    GAMMAS_V11,
    GAMMAS_V12,
    DecayRule,
    Guide,
    Mode,
    StepPlan,
    TeaCacheRule,
    as_stored,
    decay_plan,
    decisions,
    spelled,
)
from step1x.engine.policy import (
    CfgReuse,
    Decay,
    Dense,
    GuidanceInterval,
    MagCache,
    Policy,
    Probe,
    RefFreeze,
    Region,
    StepMask,
    TeaCache,
    Together,
    regione,
)
from step1x.engine.schedule import timesteps

EVALUATING = {Mode.NOISE, Mode.REGION}


def levels(steps: int, tokens: int = 4096) -> list[float]:
    return timesteps(steps, tokens).tolist()


def spell(policy: Policy, steps: int = 28, tokens: int = 4096, guided: bool = True) -> str:
    return spelled(policy.plan(levels(steps, tokens), guided))


def together(*policies: Policy) -> Together:
    return Together(policies)


# published plans


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (1024, "FFFFFFRssRssRssFssRssRsssRFF"),
        (2304, "FFFFFFRsssRsssRFssRssRsssRFF"),
        (4096, "FFFFFFRsssssssRFsssRssRsRsFF"),
        (6400, "FFFFFFRRRRRRRRRFRsRssssRsRFF"),
    ],
)
def test_regione_at_the_sizes_of_the_reference(tokens: int, wanted: str) -> None:
    assert spell(regione(), tokens=tokens) == wanted


def test_regione_of_v12() -> None:
    assert spell(regione(Gammas(GAMMAS_V12))) == "FFFFFFRsssssRssFssssRssRssFF"


@pytest.mark.parametrize(
    ("threshold", "counts"),
    [(0, "9 19 0"), (0.01, "9 6 13"), (0.02, "9 5 14"), (0.03, "9 3 16"), (0.04, "9 2 17"), (0.08, "9 1 18")],
)
def test_threshold_sweep_of_the_reference(threshold: float, counts: str) -> None:
    plan = spell(regione(threshold=threshold))
    assert " ".join(str(plan.count(letter)) for letter in "FRs") == counts


def test_regione_keeps_what_its_regions_need() -> None:
    plan = regione().plan(levels(28), True)
    assert [step for step, one in enumerate(plan) if one.fill] == [5, 15]
    assert [(step, one.jump) for step, one in enumerate(plan) if one.jump is not None] == [(5, 15), (15, 26)]
    assert all(one.guide is Guide.BOTH and one.instead is None for one in plan)


def test_decay_without_regions_computes_half_the_steps() -> None:
    refresh = StepMask(mask="1" + "0" * 14 + "1" + "0" * 12)
    assert spell(together(Decay(), refresh)) == spell(regione()).replace("R", "F")


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (1024, "FFFFFFRsssssRssFsssRssRssRFF"),
        (2304, "FFFFFFRssssssRsFsssRssRsssFF"),
        (4096, "FFFFFFRsssssssRFsssRssRsRsFF"),
        (6400, "FFFFFFRssssssssFssssRssRsRFF"),
    ],
)
def test_regione_by_the_norm_curve_does_not_degenerate_at_other_sizes(tokens: int, wanted: str) -> None:
    assert spell(regione(Gammas(GAMMAS_V11).curve), tokens=tokens) == wanted


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (1, "F"),
        (2, "FF"),
        (3, "FFF"),
        (4, "FFRF"),
        (6, "FFFRRF"),
        (8, "FFFRFsRF"),
        (14, "FFFFRsssFsRsRF"),
        (20, "FFFFFRsssssFssRsRsFF"),
        (50, "FFFFFFFFFFRssssssssssssssRsFssssssRssssRsssRssFFFF"),
    ],
)
def test_regione_at_other_numbers_of_steps(steps: int, wanted: str) -> None:
    assert spell(regione(), steps) == wanted


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ((RefFreeze(),), "FNNNNFRsssssssRFsssRssRsRsNN"),
        ((CfgReuse(last=2),), "FFFFFFrsssssssrFsssrssrsrsFF"),
        ((CfgReuse(),), "FFFFFFrsssssssrFsssrssrsrsff"),
        ((RefFreeze(), CfgReuse()), "FNNNNFrsssssssrFsssrssrsrsnn"),
        ((RefFreeze(), GuidanceInterval(low=0.2)), "FNNNNFRsssssssRFsssRssRsRsN-N-"),
        ((RefFreeze(first=6), CfgReuse(every=12)), "FFFFFFrsssssssrFsssrssrsrsnN"),
        ((RefFreeze(last=2, every=3),), "FNNFNFRsFssFssFFssFssFssFsFF"),
    ],
)
def test_compositions_with_regione(parts: tuple[Policy, ...], wanted: str) -> None:
    assert spell(together(regione(), *parts)) == wanted


def test_reference_kept_for_the_post_steps_is_that_of_the_refresh() -> None:
    plan = together(regione(), RefFreeze()).plan(levels(28), True)
    assert [step for step, one in enumerate(plan) if one.fill] == [0, 5, 15]
    assert [one.jump for one in plan if one.fill] == [None, 15, 26]


# promises of any plan


@st.composite
def masks(draw: st.DrawFn, steps: int) -> str:
    return "1" + format(draw(st.integers(0, 2 ** (steps - 1) - 1)), f"0{steps}b")[1:]


@st.composite
def regions(draw: st.DrawFn, steps: int) -> Region:
    warmup = draw(st.integers(1, steps))
    post = draw(st.integers(0, steps - warmup))
    refreshes = tuple(range(warmup + 1, steps - post - 1, draw(st.integers(2, 6))))
    return Region(warmup=warmup, post=post, refreshes=refreshes)


def policies(steps: int) -> st.SearchStrategy[Policy]:
    """Any policy but a dynamic one, with settings that so many steps allow."""
    small, threshold = st.integers(0, steps), st.floats(0, 0.3)
    maybe = st.none() | small
    return st.one_of(
        st.sampled_from([Dense(), Region()]),
        regions(steps),
        st.builds(Decay, threshold=threshold, warmup=maybe, post=maybe),
        st.builds(MagCache, threshold=threshold, cap=small),
        st.builds(StepMask, mask=masks(steps)),
        st.builds(RefFreeze, first=st.integers(1, steps), last=small, every=small),
        st.builds(CfgReuse, first=maybe, last=small, every=small),
        st.builds(GuidanceInterval, low=st.floats(0, 0.4), high=st.floats(0.5, 1)),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Policy, ...], list[float], bool]:
    """Policies of which the last may be dynamic, a schedule, and whether there is guidance."""
    steps = draw(st.integers(1, 40))
    chosen = draw(st.lists(policies(steps), max_size=4))
    dynamic = [TeaCache()] if draw(st.booleans()) else []
    return (*chosen, *dynamic), levels(steps, draw(st.sampled_from([16, 1024, 4096, 6400]))), draw(st.booleans())


def check_step(step: int, one: StepPlan, past: dict[str, Any]) -> None:
    """What a step may rely on: `past` is what the steps before made."""
    rows = {one.mode, one.instead}
    assert not (rows & EVALUATING) or past["filled"]
    assert Mode.REGION not in rows or past["landing"] > step
    assert not past["landing"] > step or rows <= {Mode.REGION, Mode.SKIP, None}
    assert past["landing"] != step or one.mode in {Mode.FULL, Mode.NOISE}
    assert one.mode is Mode.SKIP or one.scale == 1.0
    assert one.mode is Mode.SKIP or one.guide is not Guide.REUSE or past["guided"]


def legal(plan: Sequence[StepPlan], dynamic: bool) -> None:
    past = {"filled": False, "guided": False, "landing": -1}
    assert plan[0].mode is Mode.FULL
    for step, one in enumerate(plan):
        check_step(step, one, past)
        assert not one.fill or (one.mode is Mode.FULL and one.guide is Guide.BOTH)
        assert (one.instead is not None) == (dynamic and one.mode is Mode.SKIP)
        if one.jump is not None:
            assert one.mode is Mode.FULL
            assert step + 1 < one.jump <= len(plan)
            past["landing"] = one.jump
        past["filled"] |= one.fill
        past["guided"] |= one.mode is not Mode.SKIP and one.guide is Guide.BOTH


@settings(deadline=None, max_examples=150)
@given(cases())
def test_any_composition_makes_a_legal_plan(
    case: tuple[tuple[Policy, ...], list[float], bool],
) -> None:
    parts, schedule, guided = case
    policy = Together(parts)
    plan = policy.plan(schedule, guided)
    assert len(plan) == len(schedule) - 1
    legal(plan, policy.probe is not None)
    assert guided or all(one.guide is Guide.BOTH for one in plan)
    # steps that fill are the ones later steps need
    fills = [step for step, one in enumerate(plan) if one.fill]
    for fill, after in pairwise([*fills, len(plan)]):
        assert any({one.mode, one.instead} & EVALUATING for one in plan[fill:after])


@settings(deadline=None, max_examples=50)
@given(cases(), st.randoms())
def test_composition_knows_no_order_and_no_nesting(
    case: tuple[tuple[Policy, ...], list[float], bool], random: Any
) -> None:
    parts, schedule, guided = case
    plan = Together(parts).plan(schedule, guided)
    shuffled = random.sample(parts, len(parts))
    assert Together(tuple(shuffled)).plan(schedule, guided) == plan
    assert together(Together(parts[:2]), Together(parts[2:])).plan(schedule, guided) == plan
    assert together(Dense(), *parts).plan(schedule, guided) == plan
    static = tuple(part for part in parts if part.probe is None)
    assert Together(parts + static).plan(schedule, guided) == plan


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_policy_alone_is_the_composition_of_it(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 30))
    policy = data.draw(policies(steps))
    assert together(policy).plan(levels(steps), True) == policy.plan(levels(steps), True)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_composition_leaves_out_only_what_all_permit(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 30))
    mask = data.draw(masks(steps))
    parts = data.draw(st.lists(policies(steps), max_size=3))
    plan = together(StepMask(mask=mask), Region(), *parts).plan(levels(steps), True)
    stages = Region().stages(steps)
    for step, one in enumerate(plan):
        if int(mask[step]) or stages.computed(step):
            assert one.mode is not Mode.SKIP
        if stages.full(step):
            assert one.mode is not Mode.REGION


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 60), st.booleans())
def test_dense_is_all_steps_in_full(steps: int, guided: bool) -> None:
    dense = [StepPlan(Mode.FULL)] * steps
    for policy in (Dense(), Together(()), StepMask(mask="1" * steps), StepMask(every=1), StepMask(computed=steps)):
        assert policy.plan(levels(steps), guided) == dense


@pytest.mark.parametrize("schedule", [[1.0], [1.0, 0.5, 0.5], [0.0, 1.0]])
def test_schedules_fall(schedule: list[float]) -> None:
    with pytest.raises(InputError, match="a schedule has at least two levels and falls"):
        Dense().plan(schedule, True)


def run(plan: Sequence[StepPlan], schedule: Sequence[float], velocity: Tensor, edited: Tensor, x: Tensor) -> Tensor:
    """The plan's Euler steps on tokens of constant velocity; unedited ones only move as the plan says."""
    x, landing = x.clone(), 0
    for step, one in enumerate(plan):
        moving = edited if step < landing else torch.ones_like(edited)
        x[moving] += (schedule[step + 1] - schedule[step]) * one.scale * velocity[moving]
        if one.jump is not None:
            x[~edited] += (schedule[one.jump] - schedule[step + 1]) * velocity[~edited]
            landing = one.jump
    return x


@settings(deadline=None, max_examples=60)
@given(
    steps=st.integers(1, 40),
    warmup=st.integers(1, 8),
    every=st.integers(1, 4),
    density=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_jumps_on_straight_paths_end_where_dense_does(
    steps: int, warmup: int, every: int, density: float, seed: int
) -> None:
    warmup = min(warmup, steps)
    policy = together(Region(warmup=warmup, post=0), StepMask(every=every), RefFreeze(every=7))
    generator = torch.Generator().manual_seed(seed)
    x, velocity = (torch.randn(30, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    edited = torch.rand(30, generator=generator) < density
    schedule = levels(steps)
    made = run(policy.plan(schedule, True), schedule, velocity, edited, x)
    dense = run(Dense().plan(schedule, True), schedule, velocity, edited, x)
    torch.testing.assert_close(made, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense, x - schedule[0] * velocity, rtol=0, atol=1e-12)


# decay and its sibling


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_region_with_decay_is_the_released_rule(data: st.DataObject) -> None:
    table = data.draw(st.sampled_from([GAMMAS_V11, GAMMAS_V12, as_stored(GAMMAS_V11)]))
    warmup = data.draw(st.integers(1, 20))
    post = data.draw(st.integers(0, 26 - warmup))
    refreshes = tuple(range(warmup + 1, 26 - post, data.draw(st.integers(2, 9))))
    rule = DecayRule(
        gammas=table,
        threshold=data.draw(st.floats(0, 0.1)),
        warmup=warmup,
        post=post,
        refreshes=refreshes,
    )
    schedule = levels(28, data.draw(st.integers(256, 8192)))
    made = together(
        Region(warmup=warmup, post=post, refreshes=refreshes),
        Decay(norms=Gammas(table), threshold=rule.threshold, warmup=warmup, post=post),
    ).plan(schedule, True)
    assert [(one.mode, one.scale) for one in made] == [(one.mode, one.scale) for one in decay_plan(schedule, rule)]


@given(st.integers(1, 60), st.integers(256, 6400))
def test_no_threshold_no_skip(steps: int, tokens: int) -> None:
    assert "s" not in spell(Decay(threshold=0.0), steps, tokens)


@given(st.integers(2, 60))
def test_norms_that_do_not_fall_are_not_skipped(steps: int) -> None:
    schedule = levels(steps)
    gammas = tuple(1 / (1 + after - before) for before, after in pairwise(schedule[:-1]))
    plan = Decay(norms=Gammas(gammas), threshold=0.5, warmup=0, post=0).plan(schedule, True)
    # a ratio is 1 up to rounding: what may be skipped is skipped by it
    assert all(one.mode is Mode.FULL or one.scale > 1 - 1e-15 for one in plan)
    growing = tuple(gamma * 1.0000001 for gamma in gammas)
    assert "s" not in spell(Decay(norms=Gammas(growing), threshold=0.5, warmup=0, post=0), steps)


def test_a_skip_scales_by_its_own_ratio() -> None:
    schedule = levels(28)
    ratios = Gammas(GAMMAS_V11).ratios(schedule)
    for step, one in enumerate(Decay().plan(schedule, True)):
        assert one.scale == (ratios[step - 1] if one.mode is Mode.SKIP else 1.0)


def test_prediction_goes_before_plain_reuse() -> None:
    decay, mask = Decay(threshold=1.0), StepMask(mask="1" + "0" * 27)
    for parts in ((decay, mask), (mask, decay)):
        assert together(*parts).plan(levels(28), True) == decay.plan(levels(28), True)


def test_decay_stays_out_of_what_its_curve_does_not_know() -> None:
    curve = NormCurve(levels=(0.9, 0.3), norms=(1.0, 0.99))
    schedule = [1.0, 0.95, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0]
    assert spelled(Decay(norms=curve, warmup=0, post=0).plan(schedule, True)) == "FFFsssFF"


@settings(deadline=None, max_examples=100)
@given(
    steps=st.integers(1, 50),
    threshold=st.floats(0, 0.5),
    cap=st.integers(0, 6),
    start=st.floats(0, 1),
    tokens=st.just(4096),
)
def test_magcache_equals_a_plain_loop(steps: int, threshold: float, cap: int, start: float, tokens: int) -> None:
    schedule = levels(steps, tokens)
    ratios = Gammas(GAMMAS_V11).ratios(schedule)
    wanted, product, error, skipped = "F", 1.0, 0.0, 0
    for step in range(1, steps):
        product *= ratios[step - 1]
        error += abs(1 - product)
        skipped += 1
        if step >= start * steps and error <= threshold and skipped <= cap:
            wanted += "s"
        else:
            wanted, product, error, skipped = wanted + "F", 1.0, 0.0, 0
    policy = MagCache(threshold=threshold, cap=cap, start=start)
    assert spell(policy, steps, tokens) == wanted
    assert all(one.scale == 1 for one in policy.plan(schedule, True))


# masks


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (StepMask(mask="1101001"), "FFsFssF"),
        (StepMask(mask=(1, 0, 0, 0, 0, 0, 1)), "FsssssF"),
        (StepMask(mask=[True, False] + [True] * 5), "FsFFFFF"),
        (StepMask(every=3), "FssFssF"),
        (StepMask(computed=1), "Fssssss"),
        (StepMask(computed=3), "FssFssF"),
        (StepMask(computed=9), "FFFFFFF"),
    ],
)
def test_step_masks(policy: StepMask, wanted: str) -> None:
    assert spell(policy, 7) == wanted


@given(st.integers(1, 60), st.integers(1, 70))
def test_any_number_of_steps_is_spread_evenly(steps: int, computed: int) -> None:
    plan = spell(StepMask(computed=computed), steps)
    made = [step for step, letter in enumerate(plan) if letter == "F"]
    assert len(made) == min(computed, steps)
    assert made[0] == 0
    assert computed == 1 or made[-1] == steps - 1
    gaps = [after - before for before, after in pairwise(made)]
    assert not gaps or max(gaps) - min(gaps) <= 1


# region, reference, guidance


def test_stages_of_the_release_and_of_other_numbers_of_steps() -> None:
    released = Region().stages(28)
    assert (released.warmup, released.post, released.refreshes) == (6, 2, (15,))
    for steps in range(1, 120):
        stages = Region().stages(steps)
        estimated, post = (stages.warmup - 1) / steps, stages.post / steps
        assert estimated >= 5 / 28 or stages.warmup == steps
        assert post >= 2 / 28 or stages.warmup + stages.post == steps
        assert len(stages.refreshes) <= 1


def test_given_stages_are_kept_and_the_others_fit_in() -> None:
    assert spell(Region(warmup=1), 4) == "FRRF"
    assert spell(Region(post=0), 4) == "FFRR"
    assert spell(Region(post=3), 4) == "FFFF"
    assert spell(Region(refreshes=()), 28) == "F" * 6 + "R" * 20 + "FF"
    assert spell(Region(warmup=1, post=0, refreshes=(9, 20)), 28) == "F" + "R" * 8 + "F" + "R" * 10 + "F" + "R" * 7
    assert Region(warmup=1, post=0, refreshes=()).plan(levels(28), True)[0].jump == 28


@pytest.mark.parametrize(
    ("policy", "steps", "words"),
    [
        (Region(warmup=0), 28, "warmup must be at least 1"),
        (Region(warmup=29), 28, "both together at most 28 steps; got 29 and 0"),
        (Region(warmup=3, post=2), 4, "both together at most 4 steps; got 3 and 2"),
        (Region(post=4), 4, "warmup must be at least 1"),
        (Region(refreshes=(7, 8)), 28, "adjacent"),
        (Region(refreshes=(6,)), 28, "must lie in 7..24, got \\[6\\]"),
        (Region(refreshes=(25,)), 28, "must lie in 7..24"),
        (Region(refreshes=(15,)), 4, "no room in so few steps"),
        (StepMask(mask="101"), 4, "the step mask has 3 entries for 4 steps"),
    ],
)
def test_settings_that_contradict_the_schedule_are_refused(policy: Policy, steps: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        policy.plan(levels(steps), True)
    with pytest.raises(InputError, match=words):
        together(Dense(), policy).plan(levels(steps), True)


def test_warmup_and_the_first_region_step_are_computed() -> None:
    assert spell(together(Region(), StepMask(mask="1010" + "1" * 24)))[:8] == "FFFFFFRR"
    assert spell(together(Region(), StepMask(mask="1" + "0" * 27)))[:8] == "FFFFFFRs"


def test_step_at_which_unedited_tokens_come_back_is_computed() -> None:
    policy = together(Region(), RefFreeze(first=6, last=10), StepMask(mask="1" + "0" * 27))
    plan = policy.plan(levels(28), True)
    assert spelled(plan) == "FFFFFFRssssssssFssFsssssssFF"
    assert [one.jump for one in plan if one.jump] == [15, 18]


def test_frozen_reference() -> None:
    assert spell(RefFreeze(), 6) == "FNNNNN"
    assert spell(RefFreeze(first=2, last=1), 6) == "FFNNNF"
    assert spell(RefFreeze(first=3, every=2), 10) == "FFFNFNFNFN"
    assert spell(RefFreeze(first=9), 6) == "FFFFFF"
    plan = RefFreeze(first=3, last=2, every=3).plan(levels(10), True)
    assert [step for step, one in enumerate(plan) if one.fill] == [2, 5]
    # a step whose keys are wanted is not skipped
    assert spell(together(RefFreeze(first=2), StepMask(every=3)), 6) == "FFsNss"


def test_reused_guidance() -> None:
    assert spell(CfgReuse(first=2), 6) == "FFffff"
    assert spell(CfgReuse(first=0, last=1), 6) == "FffffF"
    assert spell(CfgReuse(first=1, every=2), 7) == "FfFfFfF"
    assert spell(CfgReuse(), 28) == "F" * 6 + "f" * 22
    assert spell(CfgReuse(first=1), 6, guided=False) == "FFFFFF"
    # the age counts from the last step that evaluated both, not from the last that was to
    assert spell(together(CfgReuse(first=1, every=2), StepMask(mask="11011")), 5) == "FfsFf"


def test_guidance_interval() -> None:
    schedule = levels(10)
    plan = GuidanceInterval(low=0.4, high=0.95).plan(schedule, True)
    assert [one.guide is Guide.COND for one in plan] == [not 0.4 <= level <= 0.95 for level in schedule[:-1]]
    assert spell(GuidanceInterval(low=0.4, high=0.95), 10, guided=False) == "F" * 10
    # no difference to reuse yet, and none wanted at the end
    both = together(GuidanceInterval(low=0.4, high=0.95), CfgReuse(first=0))
    assert spell(both, 10) == "F-F-FffffffF-"


def test_step_that_fills_is_guided() -> None:
    plan = together(GuidanceInterval(low=0.5, high=0.8), RefFreeze(first=2)).plan(levels(6), True)
    assert spelled(plan) == "F-FN-NNN-"


# probes


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.floats(0, 2))
def test_teacache_decides_as_its_rule(changes: list[float], threshold: float) -> None:
    rule = TeaCacheRule(threshold=threshold)
    policy = together(TeaCache(rule=rule), Dense())
    assert policy.probe is Probe.RELEASED
    gathered, made = 0.0, []
    for planned, change in zip(policy.plan(levels(len(changes)), True), changes, strict=True):
        one, gathered = policy.decide(planned, gathered, change)
        made.append((one.mode is Mode.FULL, gathered))
    assert made == [(one.compute, one.accumulated) for one in decisions(rule, changes)]


def test_veto_computes_what_the_other_policies_leave() -> None:
    policy = together(Region(), RefFreeze(), TeaCache(), CfgReuse())
    plan = policy.plan(levels(28), True)
    assert spelled(plan) == "FNNNNFrssssssssFssssssssssnn"
    vetoed = [policy.decide(one, 0.0, 10.0)[0] for one in plan]
    assert spelled(vetoed) == "FNNNNF" + "r" * 9 + "F" + "r" * 10 + "nn"
    legal(vetoed, dynamic=False)


def test_probe_turns_no_computed_step_into_a_skip() -> None:
    policy = together(StepMask(every=2), TeaCache(rule=TeaCacheRule(threshold=9.0)))
    plan = policy.plan(levels(6), True)
    assert spelled(plan) == "FsFsFF"
    assert [policy.decide(one, 1.0, 0.0)[0] for one in plan] == plan
    assert policy.decide(plan[2], 1.0, 0.0)[1] == 0


@settings(deadline=None, max_examples=50)
@given(cases(), st.data())
def test_any_veto_leaves_a_legal_plan(case: tuple[tuple[Policy, ...], list[float], bool], data: st.DataObject) -> None:
    parts, schedule, guided = case
    policy = together(TeaCache(), *(part for part in parts if part.probe is None))
    plan = policy.plan(schedule, guided)
    vetoes = data.draw(masks(len(plan)))
    run = [policy.decide(one, 0.0, 10.0 * int(veto))[0] for one, veto in zip(plan, vetoes, strict=True)]
    legal([replace(one, instead=None) for one in run], dynamic=False)


def test_policies_without_a_probe_let_the_plan_be() -> None:
    plan = regione().plan(levels(28), True)
    assert regione().probe is None
    assert [regione().decide(one, 3.0, 3.0)[0] for one in plan] == plan


# settings


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StepMask(), "a step mask is one of: mask, every, computed"),
        (lambda: StepMask(mask="11", every=2), "a step mask is one of: mask, every, computed"),
        (lambda: StepMask(mask="011"), "begins with 1, got '011'"),
        (lambda: StepMask(mask="1a"), "zeros and ones"),
        (lambda: StepMask(mask=""), "zeros and ones"),
        (lambda: StepMask(every=0), "every must be at least 1, got 0"),
        (lambda: StepMask(computed=0), "computed must be at least 1, got 0"),
        (lambda: Decay(threshold=-0.1), "threshold must be at least 0, got -0.1"),
        (lambda: Decay(threshold=math.nan), "threshold must be at least 0, got nan"),
        (lambda: Decay(warmup=-1), "warmup must be at least 0, got -1"),
        (lambda: Decay(post=-1), "post must be at least 0, got -1"),
        (lambda: MagCache(threshold=-1), "must be at least 0, got -1 and 0.2"),
        (lambda: MagCache(cap=-1), "cap must be at least 0, got -1"),
        (lambda: RefFreeze(first=0), "first must be at least 1, got 0"),
        (lambda: RefFreeze(every=-1), "every must be at least 0, got -1"),
        (lambda: CfgReuse(last=-1), "last must be at least 0, got -1"),
        (lambda: GuidanceInterval(low=0.5, high=0.5), "rises within 0..1, got 0.5 to 0.5"),
        (lambda: GuidanceInterval(high=1.5), "rises within 0..1"),
        (lambda: TeaCache(signal=Probe.TARGET), "the probe target needs a rule fitted to it"),
        (lambda: together(TeaCache(), together(TeaCache())), "only one policy can decide by a probe"),
    ],
)
def test_illegal_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("warmup", "post", "letters"), [(2, 3, "FFFssssssFFF"), (1, 1, "FFsssssssssF"), (0, 0, "Fsssssssssss")]
)
def test_the_first_and_last_steps_of_decay_compute(warmup: int, post: int, letters: str) -> None:
    """Those up to `warmup`, and `post` of them, where the norm itself would let every step skip."""
    levels = [1 - step / 12 for step in range(13)]
    curve = NormCurve(levels=tuple(levels), norms=tuple(1 - 1e-6 * step for step in range(13)))
    assert spelled(Decay(norms=curve, warmup=warmup, post=post).plan(levels, guided=False)) == letters
