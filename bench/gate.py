"""The gate: counters against the accepted baseline, with no tolerance.

A figure that is worse, a figure that is gone and a figure that was never accepted all fail, each with the command that
accepts it on purpose; what is better is said, so that it can be locked in.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from step1x.bench.record import ROOT, Metric, Place, Record, one_metric_a_line, place, write_text
from step1x.engine.errors import InputError

BASELINE = ROOT / "bench" / "baselines" / "cpu.json"
ACCEPT = 'step1x-engine bench accept --why "..."'
KEPT = 50  # reasons, newest first

Change = Literal["worse", "better", "missing", "new"]


class Reason(BaseModel):
    """Why figures were accepted, when, and which."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: str
    commit: str
    why: str
    changed: dict[str, tuple[float | None, float | None]]  # metric -> (before, after)


class Baseline(BaseModel):
    """What was accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    place: Place
    reasons: list[Reason]
    metrics: dict[str, Metric]

    @classmethod
    def read(cls, path: Path | None = None) -> Self:
        """The committed baseline, or another. Raises InputError if there is none or it is broken."""
        path = path or BASELINE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: cannot be read; `{ACCEPT}` in a checkout of the project makes it") from error
        except ValidationError as error:
            raise InputError(f"{path}: not a baseline: {error.errors(include_url=False)[0]['msg']}") from error


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric that is not what was accepted."""

    name: str
    change: Change
    old: float | None
    new: float | None
    unit: str = ""

    @property
    def fails(self) -> bool:
        return self.change != "better"

    def __str__(self) -> str:
        old, new = (f"{value:,.10g}" if value is not None else "none" for value in (self.old, self.new))
        return f"{self.name}: {self.change}, {old} -> {new} {self.unit}".rstrip()


def differences(accepted: Mapping[str, Metric], measured: Mapping[str, Metric]) -> list[Difference]:
    """Every metric that differs, in the order of names."""
    found = []
    for name in sorted({*accepted, *measured}):
        old, new = accepted.get(name), measured.get(name)
        if old is None or new is None:
            change: Change = "new" if old is None else "missing"
            unit = (new or old).unit  # type: ignore[union-attr]
            found.append(Difference(name, change, old.value if old else None, new.value if new else None, unit))
        elif old.value != new.value:
            worse = (new.value > old.value) == (new.better == "lower")
            found.append(Difference(name, "worse" if worse else "better", old.value, new.value, new.unit))
    return found


def of_groups(metrics: Mapping[str, Metric], groups: Iterable[str]) -> dict[str, Metric]:
    """The metrics that the named groups of counters.py measure."""
    chosen = set(groups)
    return {name: metric for name, metric in metrics.items() if group_of(name) in chosen}


def group_of(metric: str) -> str:
    """The group of counters.py that measures a metric."""
    if metric.startswith("full.encode_text."):
        return "text"
    return metric.split(".")[0]


def verdict(found: Iterable[Difference], accepted: Place, here: Place) -> tuple[bool, list[str]]:
    """Whether the gate holds, and what to say."""
    ordered = sorted(found, key=lambda one: (not one.fails, one.name))
    failed = [one for one in ordered if one.fails]
    lines = [str(one) for one in ordered]
    if failed:
        lines.append(f"{len(failed)} figures are worse or not accepted. If that is meant: {ACCEPT}")
        other = [f"{name} {accepted.versions.get(name)} -> {version}" for name, version in here.versions.items()
                 if version != accepted.versions.get(name)]  # fmt: skip
        if other:
            lines.append(f"The baseline was made with other versions: {', '.join(other)}")
    elif ordered:
        lines.append(f"Better than accepted; lock it in: {ACCEPT}")
    return not failed, lines


def accept(record: Record, why: str, path: Path | None = None) -> list[Difference]:
    """Makes the record's figures the baseline and keeps the reason; returns what changed.

    Raises InputError for an empty reason, or if the folder of baselines is not there.
    """
    path = path or BASELINE
    if not why.strip():
        raise InputError("--why is empty; say why these figures are right")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder; accept figures in a checkout of the project")
    before = Baseline.read(path) if path.exists() else None
    changes = differences(before.metrics if before else {}, record.metrics)
    here = place()
    reason = Reason(
        date=here.date,
        commit=here.commit,
        why=why.strip(),
        changed={one.name: (one.old, one.new) for one in changes} if before else {},
    )
    reasons = [reason, *(before.reasons if before else [])][:KEPT]
    write_text(path, one_metric_a_line(Baseline(place=here, reasons=reasons, metrics=record.metrics)))
    return changes
