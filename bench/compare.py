"""Two records of one suite, metric by metric: how far each moved, and whether that is allowed."""

from collections.abc import Sequence
from dataclasses import dataclass

from step1x.bench.record import Kind, Record
from step1x.engine.errors import InputError

# How much worse a figure of each kind may be. GPU clocks move whole edits by a few per cent and short stages by more;
# memory hardly moves, and counters do not. None is never judged.
TOLERANCE: dict[Kind, float | None] = {
    "end-to-end": 0.05,
    "step": 0.05,
    "stage": 0.15,
    "memory": 0.01,
    "count": 0.0,
    "info": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One metric of two records; None where a record lacks it."""

    name: str
    unit: str
    kind: Kind
    old: float | None
    new: float | None
    worse_by: float | None  # relative; below 0 is better. None where it cannot be said

    @property
    def ratio(self) -> float | None:
        """New over old."""
        return self.new / self.old if self.old and self.new is not None else None

    @property
    def regressed(self) -> bool:
        """Gone, or worse by more than its kind may be."""
        allowed = TOLERANCE[self.kind]
        if allowed is None:
            return False
        if self.new is None:
            return True
        return self.worse_by is not None and self.worse_by > allowed


def compare(old: Record, new: Record) -> list[Row]:
    """Rows in the order of names; metrics that only the new record has are there, and pass.

    Raises InputError for records that are not of one suite, device, profile and size.
    """
    for what, (a, b) in {
        "suite": (old.suite, new.suite),
        "device": (old.place.device, new.place.device),
        "profile": (old.profile, new.profile),
        "size": (old.size, new.size),
    }.items():
        if a != b:
            raise InputError(f"these records cannot be compared: {what} {a!r} and {b!r}")
    return [_row(name, old, new) for name in sorted({*old.metrics, *new.metrics})]


def _row(name: str, old: Record, new: Record) -> Row:
    before, after = old.metrics.get(name), new.metrics.get(name)
    metric = after or before
    assert metric is not None
    worse_by = None
    if before is not None and after is not None:
        change = after.value - before.value
        worse = change if metric.better == "lower" else -change
        worse_by = worse / abs(before.value) if before.value else (0.0 if not worse else float("inf") * worse)
    return Row(
        name=name,
        unit=metric.unit,
        kind=metric.kind,
        old=before.value if before else None,
        new=after.value if after else None,
        worse_by=worse_by,
    )


def regressions(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.regressed]
