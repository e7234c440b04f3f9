"""Which step computes what: the rules of step and region skipping (step-skipping.md; section numbers are its).

Three rules, all pure: velocity decay plans every step before the first one runs (§1.6), the partition tells
edited from kept tokens (§1.2, §1.3), TeaCache decides step by step (§3.1-3.3). policy.py makes plans of them.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from step1x.engine.connector import wide
from step1x.engine.errors import InputError

# How much the guided velocity's norm grows per step beyond what the step's length explains: entry i - 1 is the
# transition from step i - 1 to i. Fitted by RegionE on the diffusers pipelines (norm-rescaled guidance at every
# step) at 28 steps and 1024 x 1024; §1.6 gives them with four digits, the release keeps float16 (`as_stored`).
GAMMAS_V11 = (
    *(0.9746, 0.9593, 1.0036, 1.0084, 1.0106, 1.0114, 1.0138, 1.0163, 1.0152),
    *(1.0163, 1.0197, 1.0186, 1.0219, 1.0218, 1.0223, 1.0266, 1.0272, 1.0305),
    *(1.0311, 1.0362, 1.0385, 1.0423, 1.0500, 1.0536, 1.0671, 1.0866, 1.1015),
)
GAMMAS_V12 = (
    *(0.7936, 0.9807, 1.0063, 1.0205, 0.9946, 1.0125, 1.0116, 1.0125, 1.0172),
    *(1.0171, 1.0183, 1.0170, 1.0170, 1.0236, 1.0263, 1.0264, 1.0277, 1.0321),
    *(1.0338, 1.0361, 1.0396, 1.0454, 1.0492, 1.0566, 1.0696, 1.0879, 1.1179),
)
DECAY_THRESHOLD = 0.02  # §1.9, Step1X: how far the predicted norm may drift before a step is computed again
WARMUP_STEPS = 6  # §1.1: before that the estimate of the result is too noisy to tell edited tokens by
POST_STEPS = 2  # §1.1: the last steps run on all tokens, to smooth the seams
REFRESH_STEPS = (15,)  # §1.1: full steps between, counted from 0 (the release counts from 1)

SIMILARITY_THRESHOLD = 0.88  # §1.9, Step1X: tokens less similar to the reference than this are edited

# §3.2: FLUX.1-dev's polynomial, which Step1X's release uses as it is; highest power first.
TEACACHE_COEFFICIENTS = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
TEACACHE_THRESHOLD = 0.2  # §3.3, the release's default


class Mode(StrEnum):
    """What a step evaluates; the letters spell a plan (§1.6)."""

    FULL = "F"  # all tokens
    NOISE = "N"  # all target tokens; the reference's keys and values are those of the last step that filled
    REGION = "R"  # edited target tokens only; all others' keys and values are those of the last step that filled
    SKIP = "s"  # no block: the last computed velocity, scaled, or the last residual of the blocks (`Policy.residual`)


class Guide(StrEnum):
    """Which branches of guidance a computed step evaluates. Without guidance there is one, and steps are BOTH."""

    BOTH = "both"
    REUSE = "reuse"  # the conditional one; the difference is that of the last BOTH step
    COND = "cond"  # the conditional one; the step is not guided


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what it evaluates and what it keeps for later steps.

    scale: where it skips, the multiplier on the last computed velocity. fill: its keys and values are kept. jump: the
    index in the schedule to which unedited tokens go straight from here; the steps before that see edited ones alone.
    The first step of a plan with a jump tells edited from unedited. instead: what a skip evaluates if a probe vetoes
    it; None: nothing does.
    """

    mode: Mode
    scale: float = 1.0
    guide: Guide = Guide.BOTH
    fill: bool = False
    jump: int | None = None
    instead: Mode | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """RegionE's division of the steps, counted from 0 (§1.1): full ones to start with, on edited tokens, full ones.

    Raises InputError for values that leave no legal plan.
    """

    steps: int
    warmup: int
    post: int
    refreshes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.warmup < 1 or self.post < 0 or self.warmup + self.post > self.steps:
            raise InputError(
                f"warmup must be at least 1, post at least 0, both together at most {self.steps} steps; "
                f"got {self.warmup} and {self.post}"
            )
        possible = self.refreshable
        if any(step not in possible for step in self.refreshes):
            where = f"must lie in {possible.start}..{possible.stop - 1}" if possible else "have no room in so few steps"
            raise InputError(f"refresh steps {where}, got {list(self.refreshes)}")
        ordered = sorted(self.refreshes)
        if any(after - before < 2 for before, after in pairwise(ordered)):
            raise InputError(f"refresh steps must not be adjacent or repeated, got {list(self.refreshes)}")

    @property
    def refreshable(self) -> range:
        """Steps that may be refreshes: some on edited tokens must be left before and after."""
        return range(self.warmup + 1, self.steps - self.post - 1)

    @property
    def partition(self) -> int:
        """The step whose velocity tells edited from unedited tokens."""
        return self.warmup - 1

    def full(self, step: int) -> bool:
        """Whether a step always evaluates all tokens."""
        return step < self.warmup or step >= self.steps - self.post or step in self.refreshes

    def computed(self, step: int) -> bool:
        """Whether a step may not skip: the full ones, and the first on edited tokens alone."""
        return self.full(step) or step == self.warmup


@dataclass(frozen=True, kw_only=True, slots=True)
class DecayRule:
    """Settings of RegionE as released (§1.1, §1.6). Steps are counted from 0.

    `gammas` hold for one number of steps, one guidance rule and about one size. Raises InputError for values
    that leave no legal plan.
    """

    gammas: tuple[float, ...]
    threshold: float = DECAY_THRESHOLD
    warmup: int = WARMUP_STEPS
    post: int = POST_STEPS
    refreshes: tuple[int, ...] = REFRESH_STEPS

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise InputError(f"threshold must be at least 0, got {self.threshold}")
        _ = self.stages

    @property
    def stages(self) -> Stages:
        return Stages(steps=self.steps, warmup=self.warmup, post=self.post, refreshes=self.refreshes)

    @property
    def steps(self) -> int:
        return len(self.gammas) + 1

    def computed(self, step: int) -> bool:
        """Whether a step may not skip."""
        return self.stages.computed(step)


def decay_ratios(schedule: Sequence[float], gammas: Sequence[float]) -> list[float]:
    """Expected norm of each step's velocity over the step's before, entry i - 1 for step i (§1.6).

    schedule: noise levels, one more than there are steps, falling from 1 to 0. Raises ValueError unless there
    are two more of them than gammas.
    """
    if len(schedule) != len(gammas) + 2:
        raise ValueError(f"{len(gammas)} gammas are for {len(gammas) + 1} steps, the schedule has {len(schedule) - 1}")
    return [gamma * (1 + schedule[index + 1] - schedule[index]) for index, gamma in enumerate(gammas)]


def as_stored(gammas: Sequence[float]) -> tuple[float, ...]:
    """A table rounded to float16, as the release keeps it: that moves the skips of most plans by a step (§1.6)."""
    return tuple(float(struct.unpack("<e", struct.pack("<e", gamma))[0]) for gamma in gammas)


def decayed(ratios: Sequence[float], threshold: float) -> bool:
    """Whether a step may skip, by the ratios of all steps since the last computed one, its own the last (§1.6).

    Their product must stay within `threshold` of 1. A growing norm (a ratio of 1 or more) is outside the model of a
    decaying velocity.
    """
    return ratios[-1] < 1 and 1 - math.prod(ratios) <= threshold


def decay_plan(schedule: Sequence[float], rule: DecayRule) -> list[StepPlan]:
    """Modes and scales of RegionE as released, without a look at any tensor (§1.6).

    A skip scales the last velocity by its own ratio alone. schedule: as in `decay_ratios`. `Region` with `Decay`
    (policy.py) is the same at any number of steps, and knows what is kept.
    """
    ratios = decay_ratios(schedule, rule.gammas)
    plan, last = [], 0
    for step in range(rule.steps):
        if not rule.computed(step) and decayed(ratios[last:step], rule.threshold):
            plan.append(StepPlan(Mode.SKIP, ratios[step - 1]))
        else:
            plan.append(StepPlan(Mode.FULL if rule.stages.full(step) else Mode.REGION))
            last = step
    return plan


def spelled(plan: Iterable[StepPlan]) -> str:
    """A plan as one letter a step, such as FFFFFFRsss.

    Lower case (f, n, r) reuses the difference of guidance; a step without guidance is followed by a minus: `F-F-NN`.
    """
    return "".join(_letter(step) for step in plan)


def _letter(step: StepPlan) -> str:
    if step.mode is Mode.SKIP or step.guide is Guide.BOTH:
        return step.mode.value
    return step.mode.lower() if step.guide is Guide.REUSE else f"{step.mode}-"


def similarity(estimate: Tensor, reference: Tensor) -> Tensor:
    """Cosine of each token's estimated result and its reference (§1.2).

    Both (batch, tokens, channels): packed latents, the estimate being x - t * velocity. Returns (batch, tokens),
    float32 or wider.
    """
    return F.cosine_similarity(wide(estimate), wide(reference), dim=-1)


def edited_tokens(
    similar: Tensor, grid: tuple[int, int], threshold: float = SIMILARITY_THRESHOLD, smooth: bool = True
) -> Tensor:
    """Which tokens an edit changes: (batch, tokens) bool (§1.2, §1.3).

    similar: (batch, tokens) from `similarity`, row-major on `grid` (rows, columns). `smooth` drops isolated
    tokens and grows what is left by about one token. The result may be empty or everything: the caller decides
    what that means.
    """
    edited = (similar <= threshold).unflatten(-1, grid)
    return (dilated(eroded(edited)) if smooth else edited).flatten(-2)


def eroded(mask: Tensor) -> Tensor:
    """Cells whose four neighbours are set too: the 3x3 cross; beyond the border nothing is set.

    mask: (batch, rows, columns) bool; the same shape is returned.
    """
    padded = F.pad(mask, (1, 1, 1, 1))
    rows = padded[..., :-2, 1:-1] & padded[..., 2:, 1:-1]
    columns = padded[..., 1:-1, :-2] & padded[..., 1:-1, 2:]
    return mask & rows & columns


def dilated(mask: Tensor) -> Tensor:
    """Cells with any cell set in the 5x5 square around them. mask: (batch, rows, columns) bool; so is the result."""
    return F.max_pool2d(mask.float()[:, None], 5, stride=1, padding=2)[:, 0] > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TeaCacheRule:
    """Settings of TeaCache (§3.1): a polynomial from the signal's change to the output's, and a budget for it.

    span: the changes that the polynomial was fitted to; others are taken to its ends, and predictions below 0 to 0
    (§3.5). None: it is used as it is. Raises InputError for a negative threshold, no coefficients or an empty span.
    """

    threshold: float = TEACACHE_THRESHOLD
    coefficients: tuple[float, ...] = TEACACHE_COEFFICIENTS
    span: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.threshold < 0 or not self.coefficients:
            raise InputError(
                f"TeaCache needs a threshold of at least 0 and coefficients, got {self.threshold} and "
                f"{list(self.coefficients)}"
            )
        if self.span is not None and not 0 <= self.span[0] < self.span[1]:
            raise InputError(f"TeaCache's span must rise from 0 or more, got {list(self.span)}")

    def predicted(self, change: float) -> float:
        """The output's relative change that the polynomial predicts of the signal's."""
        if self.span is None:
            return self._polynomial(change)
        return max(0.0, self._polynomial(min(max(change, self.span[0]), self.span[1])))

    def _polynomial(self, change: float) -> float:
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a step computes, and the predicted change that has gathered after it."""

    compute: bool
    accumulated: float


def decide(rule: TeaCacheRule, accumulated: float, change: float, *, forced: bool) -> Decision:
    """One step of TeaCache: skip while the gathered change is below the threshold, else compute and start anew.

    accumulated: of the step before; change: `relative_change` of this step's signal. `forced` steps compute.
    """
    gathered = accumulated + rule.predicted(change)
    if forced or gathered >= rule.threshold:
        return Decision(True, 0.0)
    return Decision(False, gathered)


def decisions(rule: TeaCacheRule, changes: Sequence[float]) -> Iterator[Decision]:
    """`decide` over all steps; the first and the last are forced (§3.1). The first change is not looked at."""
    accumulated = 0.0
    for step, change in enumerate(changes):
        decision = decide(rule, accumulated, change, forced=step in (0, len(changes) - 1))
        accumulated = decision.accumulated
        yield decision


def relative_change(signal: Tensor, previous: Tensor) -> float:
    """mean|signal - previous| / mean|previous| over everything; reads one number back from the device (§3.1)."""
    before = wide(previous)
    return ((wide(signal) - before).abs().mean() / before.abs().mean()).item()
