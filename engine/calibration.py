"""What step skipping needs to know of a model, fitted to dense edits of it (step-skipping.md §1.6, §3.5, §5.4).

Two fits, and the setting that they hold for: the norm of the guided velocity along the schedule, by which the speeds
of `--speed` plan their skips, and TeaCache's polynomial for the signal of `Probe.TARGET`. A file of these is used for
the guidance rule and the model version it was fitted to, and for nothing else.
"""

import importlib.metadata
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from step1x.engine.connector import wide
from step1x.engine.errors import InputError
from step1x.engine.folder import BUNDLED
from step1x.engine.norms import Gammas, NormCurve, Norms
from step1x.engine.picture import commit
from step1x.engine.plan import GAMMAS_V11, GAMMAS_V12, TeaCacheRule, decisions, relative_change
from step1x.engine.policy import Probe, TeaCache
from step1x.engine.variants import DIFFUSERS_V11, DIFFUSERS_V12, Variant

NAME = "calibration.json"  # of the file that a model's folder may bring with it
MAX_BYTES = 1 << 20  # a calibration has some lines for each step; more is some other file
DEGREE = 4  # of the probe's polynomial (§3.5)
COMPUTED = 0.5  # share of the steps that TeaCache's threshold leaves, over the trajectories of the fit
LEAST_STEPS = 8  # below that, there are hardly more transitions than coefficients
LEAST_RANKED = 3  # trajectories that a rank correlation needs to mean anything


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Setting(_Table):
    """What constants were fitted to."""

    version: Literal["v1.0", "v1.1", "v1.2"]
    rescale_above: float | None  # the guidance rule (`Variant.rescale_above`); None: no guidance
    guidance: float = Field(ge=1)
    digest: str | None = None  # of the weights; None: the released ones, of any precision

    @classmethod
    def of(cls, variant: Variant, guidance: float, digest: str) -> Self:
        """The setting of an edit. guidance: 1 or below is none."""
        rule = variant.rescale_above if guidance > 1 else None
        return cls(version=variant.version, rescale_above=rule, guidance=max(1.0, guidance), digest=digest)

    def fits(self, variant: Variant) -> bool:
        """Whether it can be one of that variant's edits: its version, and its guidance rule if there is guidance."""
        return self.version == variant.version and self.rescale_above in (None, variant.rescale_above)

    def apart(self, edit: "Setting") -> str:
        """How it differs from an edit's, in words; nothing if it does not."""
        same_weights = edit if self.digest is not None else edit.model_copy(update={"digest": None})
        return "" if self == same_weights else f"fitted to {self}, this is {same_weights}"

    def __str__(self) -> str:
        weights = "" if self.digest is None else f" weights {self.digest[:12]}"
        return f"{self.version}{weights} with {_rule(self.rescale_above, self.guidance)}"


def _rule(rescale_above: float | None, guidance: float | None = None) -> str:
    """A guidance rule in words."""
    strength = "" if guidance is None else f" {guidance:g}"
    if rescale_above is None:
        return "no guidance"
    if rescale_above >= 1:
        return f"plain guidance{strength}"
    always = rescale_above <= DIFFUSERS_V11.rescale_above
    return f"guidance{strength} norm-rescaled {'at every step' if always else f'above t = {rescale_above:g}'}"


class Constants(NamedTuple):
    """What the speeds plan by, and what it was fitted to."""

    norms: Norms
    setting: Setting


def published(variant: Variant) -> Constants:
    """RegionE's table of the variant's version, v1.1's where there is none (§1.6, §1.9)."""
    row, table = (DIFFUSERS_V12, GAMMAS_V12) if variant.version == "v1.2" else (DIFFUSERS_V11, GAMMAS_V11)
    setting = Setting(version=row.version, rescale_above=row.rescale_above, guidance=row.guidance)
    return Constants(Gammas(table), setting)


class Curve(_Table):
    """Fields of a `NormCurve`."""

    levels: tuple[float, ...]
    norms: tuple[float, ...]

    @model_validator(mode="after")
    def _is_curve(self) -> Self:
        _ = self.made
        return self

    @property
    def made(self) -> NormCurve:
        return NormCurve(levels=self.levels, norms=self.norms)


class ProbeFit(_Table):
    """Fields of a `TeaCacheRule`, and how good it is.

    r2: share of the variance that it explains. rank: mean over the steps of Spearman's correlation, among the pairs,
    of the probe's change and the velocity's (§5.4: what is left of it once the trend along the schedule is out; about
    0: the probe says nothing of the single picture). None: of fewer than three pairs.
    """

    coefficients: tuple[float, ...]  # highest power first
    span: tuple[float, float]
    threshold: float
    r2: float
    rank: float | None

    @model_validator(mode="after")
    def _is_rule(self) -> Self:
        _ = self.rule
        return self

    @property
    def rule(self) -> TeaCacheRule:
        return TeaCacheRule(threshold=self.threshold, coefficients=self.coefficients, span=self.span)


class Calibration(_Table):
    """All that was fitted, and to what."""

    format: Literal[1] = 1
    model: str
    variant: str
    setting: Setting
    steps: int = Field(ge=1)
    size: int = Field(ge=16)
    tokens: int = Field(ge=1)  # target tokens, which the schedule's shift goes by
    pairs: int = Field(ge=1)
    seed: int = Field(ge=0)  # of the first pair; each later one has the next
    curve: Curve
    probe: ProbeFit
    versions: dict[str, str]
    made: datetime

    @property
    def constants(self) -> Constants:
        return Constants(self.curve.made, self.setting)

    @property
    def teacache(self) -> TeaCache:
        """The policy that the probe's fit is for."""
        return TeaCache(rule=self.probe.rule, signal=Probe.TARGET)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Of a file. Raises InputError, one line, for anything that is no calibration."""
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
        if len(content) > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES} bytes; is it a calibration?")
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{path}: not a calibration: {f'{where}: ' if where else ''}{said.lower()}") from error

    def write(self, path: str | Path, *, overwrite: bool = False) -> None:
        """As JSON, whole or not at all. Raises InputError where nothing can be written."""
        try:
            commit(self.model_dump_json(indent=1).encode() + b"\n", str(path), overwrite)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from error


def calibration_of(model: str | Path | None, file: str | Path | None = None) -> Calibration | None:
    """`file`, else the one in a model's folder, if there is one. Raises InputError for what is no calibration."""
    if file is not None:
        return Calibration.read(file)
    beside = (BUNDLED if model is None else Path(model).expanduser()) / NAME
    return Calibration.read(beside) if beside.is_file() else None


def constants_for(variant: Variant, found: Calibration | None, file: str | Path | None = None) -> Constants:
    """What the speeds of a variant plan by: `found` (of `calibration_of`) if it fits, else what is published.

    Raises InputError if a `file` that was asked for does not fit: another model version or guidance rule.
    """
    if found is not None and found.setting.fits(variant):
        return found.constants
    if found is None or file is None:
        return published(variant)
    raise InputError(
        f"{file}: fitted to {found.setting.version} with {_rule(found.setting.rescale_above)}, but {variant.name} is "
        f"{variant.version} with {_rule(variant.rescale_above)}; fit it again by `step1x-engine calibrate`"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """What a dense edit shows. ratios, probe and velocity have an entry i - 1 for the transition from step i - 1 to i.

    levels: at which each step begins. tokens: of the target. ratios: mean over the tokens of the guided velocity's norm
    over its norm in the step before (§1.6). probe, velocity: relative changes of the probe's signal and of the guided
    velocity, as `plan.relative_change` (§3.5).
    """

    levels: tuple[float, ...]
    tokens: int
    ratios: tuple[float, ...]
    probe: tuple[float, ...]
    velocity: tuple[float, ...]


def trajectory(steps: Iterable[tuple[Tensor, Tensor]], schedule: Sequence[float]) -> Trajectory:
    """Of the guided velocity and the signal of every step, (batch, tokens, channels) each; they are held two by two.

    schedule: noise levels, one more than there are steps.
    """
    ratios, probe, velocity, tokens = [], [], [], 0
    for (before, signal_before), (after, signal) in pairwise(steps):
        tokens = after.shape[1]
        norms = [wide(one).norm(dim=-1) for one in (before, after)]
        ratios.append((norms[1] / norms[0]).mean().item())
        velocity.append(relative_change(after, before))
        probe.append(relative_change(signal, signal_before))
    return Trajectory(
        levels=tuple(schedule[:-1]),
        tokens=tokens,
        ratios=tuple(ratios),
        probe=tuple(probe),
        velocity=tuple(velocity),
    )


def norm_curve(trajectories: Sequence[Trajectory]) -> NormCurve:
    """The norm along one schedule: of each transition, the mean over the pairs of the ratio's logarithm.

    A ratio is a mean over tokens (§1.6). The norm is 1 where the schedule begins. Raises InputError for trajectories of
    several schedules.
    """
    levels = {one.levels for one in trajectories}
    if len(levels) != 1:
        raise InputError(f"a norm curve is fitted to edits of one schedule, got {len(levels)}")
    logs = [
        fmean(math.log(ratio) for ratio in ratios) for ratios in zip(*(one.ratios for one in trajectories), strict=True)
    ]
    norms = (math.exp(log) for log in accumulate(logs, initial=0.0))
    return NormCurve(levels=levels.pop(), norms=tuple(norms))


def probe_fit(trajectories: Sequence[Trajectory], computed: float = COMPUTED) -> ProbeFit:
    """A polynomial of least squares from the probe's change to the velocity's, over all steps of all trajectories.

    Its span is that of the changes seen. computed: the least threshold is taken at which no more than this share of
    their steps computes. Raises InputError if the probe does not change.
    """
    x = np.array([change for one in trajectories for change in one.probe])
    y = np.array([change for one in trajectories for change in one.velocity])
    if len(np.unique(x)) <= DEGREE:
        raise InputError("the probe hardly changes from step to step: there is nothing to fit to it")
    coefficients = np.polynomial.Polynomial.fit(x, y, DEGREE).convert().coef[::-1].tolist()
    span = float(x.min()), float(x.max())
    rule = TeaCacheRule(threshold=0.0, coefficients=tuple(coefficients), span=span)
    predicted = np.array([rule.predicted(change) for change in x])
    return ProbeFit(
        coefficients=rule.coefficients,
        span=span,
        threshold=_threshold(rule, trajectories, computed),
        r2=float(1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
        rank=_rank(trajectories),
    )


def _threshold(rule: TeaCacheRule, trajectories: Sequence[Trajectory], computed: float) -> float:
    """The least threshold, to a millionth of the largest, that leaves no more than a share of the steps."""

    def share(threshold: float) -> float:
        tried = replace(rule, threshold=threshold)
        made = [decision.compute for one in trajectories for decision in decisions(tried, (0.0, *one.probe))]
        return fmean(made)

    low, high = 0.0, max(sum(map(rule.predicted, one.probe)) for one in trajectories)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) <= computed else (middle, high)
    return high


def _rank(trajectories: Sequence[Trajectory]) -> float | None:
    """Mean over the steps of Spearman's correlation of `probe` and `velocity` among the trajectories.

    To first order the velocity's change ranks what it would cost to skip one step: that moves the latents by the step's
    length, which all trajectories share, times the change.
    """
    if len(trajectories) < LEAST_RANKED:
        return None
    pairs = (np.array([one.probe for one in trajectories]), np.array([one.velocity for one in trajectories]))
    ranks = [values.argsort(axis=0).argsort(axis=0) - (len(trajectories) - 1) / 2 for values in pairs]
    return float(((ranks[0] * ranks[1]).sum(axis=0) / (ranks[0] ** 2).sum(axis=0)).mean())


def calibrated(
    trajectories: Sequence[Trajectory], setting: Setting, *, model: str, variant: str, size: int, seed: int
) -> Calibration:
    """Both fits to the trajectories of dense edits. Raises InputError for too few steps, or what the fits do."""
    steps = len(trajectories[0].levels)
    if steps < LEAST_STEPS:
        raise InputError(f"a calibration needs at least {LEAST_STEPS} steps, got {steps}")
    curve = norm_curve(trajectories)
    return Calibration(
        model=model,
        variant=variant,
        setting=setting,
        steps=steps,
        size=size,
        tokens=trajectories[0].tokens,
        pairs=len(trajectories),
        seed=seed,
        curve=Curve(levels=curve.levels, norms=curve.norms),
        probe=probe_fit(trajectories),
        versions={name: importlib.metadata.version(name) for name in ("step1x-engine", "torch")},
        made=datetime.now(UTC).replace(microsecond=0),
    )
