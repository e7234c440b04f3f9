"""The norm of the guided velocity along the schedule, by which steps are predicted (step-skipping.md §1.6, §4.5)."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

from step1x.engine.errors import InputError
from step1x.engine.plan import decay_ratios
from step1x.engine.schedule import timesteps

FITTED_TOKENS = 4096  # target tokens of the size the released tables were made at, 1024 x 1024


class Norms(Protocol):
    def ratios(self, schedule: Sequence[float]) -> list[float]:
        """Norm of each step's velocity over the step's before, entry i - 1 for step i; math.inf where not known.

        schedule: noise levels, one more than there are steps.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class NormCurve:
    """The norm as a function of the noise level, for any schedule: norms[i] at levels[i], falling, in any unit.

    A norm belongs to a point of the trajectory and not to a number of steps, so ratios over short steps multiply to
    those over long ones. Between levels its logarithm is linear; outside it is not known, and no step is skipped.
    Raises InputError for levels that do not fall, or norms that are no positive numbers, one a level.
    """

    levels: tuple[float, ...]
    norms: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or any(before <= after for before, after in pairwise(self.levels)):
            raise InputError(f"a norm curve needs at least two levels that fall, got {list(self.levels)}")
        if len(self.norms) != len(self.levels) or not all(0 < norm < math.inf for norm in self.norms):
            raise InputError(f"a norm curve needs {len(self.levels)} positive norms, got {list(self.norms)}")

    def ratios(self, schedule: Sequence[float]) -> list[float]:
        logs = [self._log(level) for level in schedule[:-1]]
        return [
            math.inf if before is None or after is None else math.exp(after - before)
            for before, after in pairwise(logs)
        ]

    def _log(self, level: float) -> float | None:
        if not self.levels[-1] <= level <= self.levels[0]:
            return None
        below = bisect_left(self.levels, -level, lo=1, key=lambda one: -one)
        high, low = self.levels[below - 1], self.levels[below]
        above, under = math.log(self.norms[below - 1]), math.log(self.norms[below])
        return under + (above - under) * (level - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Gammas:
    """A table of the release (`plan.GAMMAS_V11`), one gamma for each step but the first.

    A schedule of that many steps takes it step by step whatever its shift, as the release does; others go by
    `curve`.
    """

    table: tuple[float, ...]

    @property
    def curve(self) -> NormCurve:
        """The norm that the table stands for at 1024 x 1024."""
        levels = timesteps(len(self.table) + 1, FITTED_TOKENS).tolist()
        norms = accumulate(decay_ratios(levels, self.table), lambda norm, ratio: norm * ratio, initial=1.0)
        return NormCurve(levels=tuple(levels[:-1]), norms=tuple(norms))

    def ratios(self, schedule: Sequence[float]) -> list[float]:
        if len(schedule) == len(self.table) + 2:
            return decay_ratios(schedule, self.table)
        return self.curve.ratios(schedule)
