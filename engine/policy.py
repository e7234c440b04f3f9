"""Policies: what each step of a request computes, planned before the first one runs (step-skipping.md §6.1-6.3).

A policy permits and refuses, step by step, what a step may leave out. Policies compose by intersection (`Together`):
left out is what some permit and none refuses. `Policy.plan` turns that into a legal plan for any number of steps.

    Dense               nothing is left out
    StepMask            steps by a list, evenly spread or every n-th: what all others must beat at equal work
    Decay, MagCache     steps whose velocity is predictable from its norm
    Region              unedited tokens
    RefFreeze           the reference
    CfgReuse            the unconditional branch, by reuse of the last difference
    GuidanceInterval    the unconditional branch, outside an interval of noise levels
    TeaCache            steps by what a probe sees (the only one that decides while it runs)

RegionE is `regione()`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import reduce
from itertools import accumulate, pairwise
from operator import and_

from step1x.engine.errors import InputError
from step1x.engine.norms import Gammas, Norms
from step1x.engine.plan import (
    DECAY_THRESHOLD,
    GAMMAS_V11,
    POST_STEPS,
    REFRESH_STEPS,
    WARMUP_STEPS,
    Guide,
    Mode,
    Stages,
    StepPlan,
    TeaCacheRule,
    decayed,
    decide,
)

RELEASED_STEPS = 28  # the number of steps that the release's stages (§1.1) are for


@dataclass(frozen=True, slots=True)
class Permit:
    """Whether a step may leave out this or that; None: the policy has no say.

    skip: everything, the last velocity times `scale` standing in. reference, unedited: these rows, their keys and
    values being kept ones. reuse: the unconditional branch, by reuse of the difference. unguided: guidance itself.
    """

    skip: bool | None = None
    reference: bool | None = None
    unedited: bool | None = None
    reuse: bool | None = None
    unguided: bool | None = None
    scale: float = 1.0

    def __and__(self, other: "Permit") -> "Permit":
        """The intersection; of two scales the smaller, so that a prediction goes before plain reuse."""
        return Permit(
            _both(self.skip, other.skip),
            _both(self.reference, other.reference),
            _both(self.unedited, other.unedited),
            _both(self.reuse, other.reuse),
            _both(self.unguided, other.unguided),
            min(self.scale, other.scale),
        )


def _both(one: bool | None, other: bool | None) -> bool | None:
    if one is None or other is None:
        return other if one is None else one
    return one and other


SILENT = Permit()
WHOLE = Permit(skip=False, reference=False, unedited=False, reuse=False, unguided=False)  # a step that fills


@dataclass(frozen=True, slots=True)
class Past:
    """The last steps so far that computed anything, evaluated all tokens, and evaluated both branches (or None)."""

    computed: int = 0
    full: int = 0
    guided: int | None = None


Permits = Callable[[int, Past], Permit]  # of a step, counted from 0


class Probe(StrEnum):
    """A signal whose `plan.relative_change` from step to step a dynamic policy asks for."""

    RELEASED = "released"  # §3.3: the first block's norm of all image rows and branches, not modulated
    TARGET = "target"  # the first block's modulated input: active target rows of the conditional branch


class Policy(ABC):
    """What a step may leave out. Subclasses are frozen dataclasses of settings; `permits` checks these."""

    @property
    def probe(self) -> Probe | None:
        """What a dynamic policy wants to see of every step; None: the plan is final."""
        return None

    @property
    def residual(self) -> bool:
        """Whether a skip adds what the blocks last added and runs the final layer; else the last velocity stands in."""
        return False

    @abstractmethod
    def permits(self, schedule: Sequence[float]) -> Permits:
        """The policy's say for each step of a schedule. Raises InputError for settings that contradict it."""

    def decide(self, planned: StepPlan, gathered: float, change: float) -> tuple[StepPlan, float]:
        """What a step does, now that its probe has been read, and what has gathered after it.

        planned: the plan's; gathered: of the step before, 0 at first; change: of the probe's signal since the step
        before (that of the same rows, where fewer are left).
        """
        return planned, 0.0

    def plan(self, schedule: Sequence[float], guided: bool) -> list[StepPlan]:
        """The whole plan, one entry a step.

        schedule: noise levels, one more than there are steps, falling; guided: whether the request has guidance.
        Raises InputError for a schedule that does not fall, or settings that contradict it.
        """
        if len(schedule) < 2 or any(before <= after for before, after in pairwise(schedule)):
            raise InputError(f"a schedule has at least two levels and falls, got {list(schedule)}")
        permits = self.permits(schedule)
        past, parked, plan = Past(), [False], [StepPlan(Mode.FULL, guide=_guide(permits(0, Past()), Past(), guided))]
        for step in range(1, len(schedule) - 1):
            past = _after(past, plan[-1], step - 1)
            permit = permits(step, past)
            # A policy that lets unedited tokens out has made the step before a full one (WHOLE).
            parked.append(bool(permit.reference and permit.unedited))
            mode = Mode.REGION if parked[-1] else Mode.NOISE if permit.reference else Mode.FULL
            guide = _guide(permit, past, guided)
            landing = parked[-2] and not parked[-1]  # unedited tokens come back, to a velocity of their own
            if permit.skip and not landing:
                scale = 1.0 if self.residual else permit.scale  # scales are of velocities
                plan.append(StepPlan(Mode.SKIP, scale, guide, instead=mode if self.probe else None))
            else:
                plan.append(StepPlan(mode, guide=guide))
        return [_keeping(plan, parked, step) for step in range(len(plan))]


def _guide(permit: Permit, past: Past, guided: bool) -> Guide:
    if guided and permit.unguided:
        return Guide.COND
    return Guide.REUSE if guided and permit.reuse and past.guided is not None else Guide.BOTH


def _after(past: Past, made: StepPlan, step: int) -> Past:
    if made.mode is Mode.SKIP:
        return past
    return Past(step, step if made.mode is Mode.FULL else past.full, step if made.guide is Guide.BOTH else past.guided)


def _keeping(plan: Sequence[StepPlan], parked: Sequence[bool], step: int) -> StepPlan:
    """A step of the plan with what later ones want of it: keys and values, and the jump of unedited tokens."""
    if plan[step].mode is not Mode.FULL:
        return plan[step]
    stretch = range(step + 1, next((i for i in range(step + 1, len(plan)) if plan[i].mode is Mode.FULL), len(plan)))
    fill = any({plan[i].mode, plan[i].instead} & {Mode.NOISE, Mode.REGION} for i in stretch)
    jump = next((i for i in stretch if not parked[i]), stretch.stop)
    return replace(plan[step], fill=fill, jump=jump if jump > step + 1 else None)


def _scaled(steps: int) -> tuple[int, int, int]:
    """Warm-up, post steps and refresh of the release for another number of steps; at least one step is warm-up.

    The partition comes no earlier, as a share of the steps, than the release's: the estimate of the result is too
    noisy before (§1.2). Post steps are no smaller a share either, if the steps last.
    """
    warmup = min(math.ceil((WARMUP_STEPS - 1) * steps / RELEASED_STEPS) + 1, steps)
    post = min(math.ceil(POST_STEPS * steps / RELEASED_STEPS), steps - warmup)
    return warmup, post, round(REFRESH_STEPS[0] * steps / RELEASED_STEPS)


def _at_least(low: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < low:
            raise InputError(f"{name} must be at least {low}, got {value}")


@dataclass(frozen=True, slots=True)
class Dense(Policy):
    """Every step evaluates everything. Among other policies it changes nothing."""

    def permits(self, schedule: Sequence[float]) -> Permits:
        return lambda step, past: SILENT


@dataclass(frozen=True, slots=True)
class Together(Policy):
    """The intersection of policies. Raises InputError where two of them want a probe."""

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        if sum(policy.probe is not None for policy in self.policies) > 1:
            raise InputError("only one policy can decide by a probe: leave out one TeaCache")

    @property
    def _dynamic(self) -> Policy:
        return next((policy for policy in self.policies if policy.probe is not None), Dense())

    @property
    def probe(self) -> Probe | None:
        return self._dynamic.probe

    @property
    def residual(self) -> bool:
        return any(policy.residual for policy in self.policies)

    def decide(self, planned: StepPlan, gathered: float, change: float) -> tuple[StepPlan, float]:
        return self._dynamic.decide(planned, gathered, change)

    def permits(self, schedule: Sequence[float]) -> Permits:
        parts = [policy.permits(schedule) for policy in self.policies]
        return lambda step, past: reduce(and_, (part(step, past) for part in parts), SILENT)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMask(Policy):
    """Steps that compute, the others reusing the last velocity as it is (§4.6). Exactly one of the fields is given.

    mask: 1 computes, 0 skips, such as "1101" or (1, 1, 0, 1), one a step. every: step 0 and each so many steps after.
    computed: how many steps compute, spread evenly, first and last among them (all, if there are fewer). Raises
    InputError for anything else.
    """

    mask: str | Sequence[int] | None = None
    every: int | None = None
    computed: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.mask, self.every, self.computed)) != 1:
            raise InputError("a step mask is one of: mask, every, computed")
        if self.mask is not None and (not set(self.mask) <= {0, 1, "0", "1"} or not self.mask or not int(self.mask[0])):
            raise InputError(f"a step mask holds zeros and ones and begins with 1, got {self.mask!r}")
        _at_least(1, every=self.every, computed=self.computed)

    def permits(self, schedule: Sequence[float]) -> Permits:
        kept = self._computed(len(schedule) - 1)
        return lambda step, past: Permit(skip=step not in kept)

    def _computed(self, steps: int) -> set[int]:
        if self.every is not None:
            return set(range(0, steps, self.every))
        if self.computed is not None:
            count = min(self.computed, steps)
            return {round(index * (steps - 1) / max(count - 1, 1)) for index in range(count)}
        mask = self.mask or ""
        if len(mask) != steps:
            raise InputError(f"the step mask has {len(mask)} entries for {steps} steps")
        return {step for step in range(steps) if int(mask[step])}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decay(Policy):
    """RegionE's velocity decay cache (§1.6): skips while the velocity's norm is expected to fall by little.

    norms: a table of the release, or a curve fitted to a model. threshold: how far the norm may fall. warmup: the
    last of the first steps that compute; post: how many last steps compute; None: as the release, scaled to the number
    of steps. A skip scales by its own ratio alone, as the release does. Raises InputError for negative values.
    """

    norms: Norms = field(default_factory=lambda: Gammas(GAMMAS_V11))
    threshold: float = DECAY_THRESHOLD
    warmup: int | None = None
    post: int | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InputError(f"threshold must be at least 0, got {self.threshold}")
        _at_least(0, warmup=self.warmup, post=self.post)

    def permits(self, schedule: Sequence[float]) -> Permits:
        steps, ratios = len(schedule) - 1, self.norms.ratios(schedule)
        warmup, post, _ = _scaled(steps)
        warmup, post = _or(self.warmup, warmup), _or(self.post, post)

        def permit(step: int, past: Past) -> Permit:
            since = ratios[past.computed : step]
            if step <= warmup or step >= steps - post or not decayed(since, self.threshold):
                return Permit(skip=False)
            return Permit(skip=True, scale=since[-1])

        return permit


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCache(Policy):
    """MagCache (§4.5) on velocities: skips while the gathered error of their norms is small; reuses them unscaled.

    threshold: of the sum of |1 - product of ratios| over the skips in a row; cap: most skips in a row; start: share of
    the steps before the first skip. The defaults are those published for FLUX.1 Kontext. Raises InputError for
    negative values.
    """

    norms: Norms = field(default_factory=lambda: Gammas(GAMMAS_V11))
    threshold: float = 0.05
    cap: int = 4
    start: float = 0.2

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and self.start >= 0):
            raise InputError(f"threshold and start must be at least 0, got {self.threshold} and {self.start}")
        _at_least(0, cap=self.cap)

    def permits(self, schedule: Sequence[float]) -> Permits:
        steps, ratios = len(schedule) - 1, self.norms.ratios(schedule)

        def permit(step: int, past: Past) -> Permit:
            products = accumulate(ratios[past.computed : step], lambda product, ratio: product * ratio)
            error = sum(abs(1 - product) for product in products)
            few = step - past.computed <= self.cap
            return Permit(skip=step >= self.start * steps and few and error <= self.threshold)

        return permit


@dataclass(frozen=True, kw_only=True, slots=True)
class Region(Policy):
    """RegionE's stages (§1.1, §1.4, §6.3): between warm-up and post steps only edited tokens are evaluated.

    The last step of the warm-up tells them apart; at a refresh all tokens are evaluated again. None: as the release,
    scaled to the number of steps, as far as they have room; then short schedules have no such stretch. Raises
    InputError, when it plans, for given values that leave no legal plan.
    """

    warmup: int | None = None
    post: int | None = None
    refreshes: tuple[int, ...] | None = None

    def stages(self, steps: int) -> Stages:
        """The stages of so many steps. Raises InputError as `Stages`."""
        warmup, post, refresh = _scaled(steps)
        warmup = _or(self.warmup, min(warmup, steps - (self.post or 0)))
        post = _or(self.post, max(0, min(post, steps - warmup)))
        bare = Stages(steps=steps, warmup=warmup, post=post, refreshes=())
        fitting = (refresh,) if refresh in bare.refreshable else ()
        return replace(bare, refreshes=fitting if self.refreshes is None else tuple(self.refreshes))

    def permits(self, schedule: Sequence[float]) -> Permits:
        steps = len(schedule) - 1
        stages = self.stages(steps)
        whole = {stages.partition, *stages.refreshes} if stages.warmup + stages.post < steps else set()

        def permit(step: int, past: Past) -> Permit:
            if step in whole:
                return WHOLE
            skip = False if stages.computed(step) else None
            if stages.full(step):
                return Permit(skip=skip, unedited=False)
            return Permit(skip=skip, reference=True, unedited=True)

        return permit


@dataclass(frozen=True, kw_only=True, slots=True)
class RefFreeze(Policy):
    """Keys and values of the reference's rows are those of an earlier step, and the rows are not evaluated (§6.2 P4).

    first, last: how many steps evaluate them at the beginning, one at least, and at the end. every: so many steps after
    they were evaluated, they are again; 0: never. Raises InputError for less.
    """

    first: int = 1
    last: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        _at_least(1, first=self.first)
        _at_least(0, last=self.last, every=self.every)

    def permits(self, schedule: Sequence[float]) -> Permits:
        steps = len(schedule) - 1

        def permit(step: int, past: Past) -> Permit:
            if step < self.first - 1 or step >= steps - self.last:
                return Permit(reference=False)
            if step == self.first - 1 or 0 < self.every <= step - past.full:
                return WHOLE
            return Permit(reference=True)

        return permit


@dataclass(frozen=True, kw_only=True, slots=True)
class CfgReuse(Policy):
    """The difference of guidance is that of an earlier step, and the unconditional branch is not evaluated (§6.2 P5).

    first, last: how many steps evaluate it at the beginning (None: the release's warm-up, scaled to the number of
    steps) and at the end. every: so many steps after it was evaluated, it is again; 0: never, but where another
    policy wants it. Raises InputError for less than 0.
    """

    first: int | None = None
    last: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        _at_least(0, first=self.first, last=self.last, every=self.every)

    def permits(self, schedule: Sequence[float]) -> Permits:
        steps = len(schedule) - 1
        first = _or(self.first, _scaled(steps)[0])

        def permit(step: int, past: Past) -> Permit:
            old = 0 < self.every <= step - (past.guided or 0)
            return Permit(reuse=first <= step < steps - self.last and not old)

        return permit


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceInterval(Policy):
    """Guides only the steps that begin at a noise level in [low, high]; but a step whose keys are kept is guided.

    Unlike the others it changes what is sampled, not only how well it is met. Raises InputError for an empty interval.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise InputError(f"a guidance interval rises within 0..1, got {self.low} to {self.high}")

    def permits(self, schedule: Sequence[float]) -> Permits:
        return lambda step, past: Permit(unguided=not self.low <= schedule[step] <= self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeaCache(Policy):
    """Skips until a probe's predicted changes have gathered to a threshold (§3.1); the first and the last step compute.

    By default the release's rule (§3.3). Another probe wants a rule that was fitted to it. What is reused is what the
    blocks added: a skipped step adds it to its own rows and runs the final layer with its own modulation.
    """

    rule: TeaCacheRule = field(default_factory=TeaCacheRule)
    signal: Probe = Probe.RELEASED

    def __post_init__(self) -> None:
        if self.signal is not Probe.RELEASED and self.rule.span is None:
            raise InputError(f"the probe {self.signal} needs a rule fitted to it, with the span of the fit")

    @property
    def probe(self) -> Probe:
        return self.signal

    @property
    def residual(self) -> bool:
        return True

    def permits(self, schedule: Sequence[float]) -> Permits:
        return lambda step, past: Permit(skip=0 < step < len(schedule) - 2)

    def decide(self, planned: StepPlan, gathered: float, change: float) -> tuple[StepPlan, float]:
        if planned.mode is not Mode.SKIP or planned.instead is None:
            return planned, 0.0
        decision = decide(self.rule, gathered, change, forced=False)
        if not decision.compute:
            return planned, decision.accumulated
        return replace(planned, mode=planned.instead, scale=1.0, instead=None), 0.0


def regione(norms: Norms | None = None, threshold: float = DECAY_THRESHOLD) -> Together:
    """RegionE as published: `Region` with `Decay`, v1.1's table by default. At 28 steps its plans are §1.6's."""
    return Together((Region(), Decay(norms=norms or Gammas(GAMMAS_V11), threshold=threshold)))
