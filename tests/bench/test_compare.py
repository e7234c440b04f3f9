from pathlib import Path

import pytest
from click.testing import CliRunner

from step1x.bench.compare import compare, regressions
from step1x.bench.record import Kind, Metric, Record, place
from step1x.engine.cli import program
from step1x.engine.errors import InputError

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def record(value: float | None, kind: Kind = "step", better: str = "lower", size: str = "64x64") -> Record:
    metrics = {} if value is None else {"x": Metric(value=value, unit="s", kind=kind, better=better)}  # type: ignore[arg-type]
    return Record(suite="edit", place=place(), profile="cpu", size=size, metrics=metrics)


@pytest.mark.parametrize(
    ("kind", "new", "fails"),
    [
        ("step", 1.049, False),
        ("step", 1.051, True),
        ("end-to-end", 1.06, True),
        ("stage", 1.14, False),
        ("stage", 1.16, True),
        ("memory", 1.005, False),
        ("memory", 1.02, True),
        ("count", 1.0001, True),
        ("count", 0.5, False),
        ("info", 9.0, False),
    ],
)
def test_tolerances(kind: Kind, new: float, fails: bool) -> None:
    assert bool(regressions(compare(record(1.0, kind), record(new, kind)))) is fails


def test_higher_may_be_better() -> None:
    old = record(1.0, "step", "higher")
    assert not regressions(compare(old, record(2.0, "step", "higher")))
    assert regressions(compare(old, record(0.9, "step", "higher")))


def test_a_missing_metric_fails_and_a_new_one_does_not() -> None:
    (row,) = regressions(compare(record(1.0), record(None)))
    assert row.new is None
    assert not regressions(compare(record(None), record(1.0)))
    assert not regressions(compare(record(1.0, "info"), record(None)))


def test_from_nothing_to_something_is_worse() -> None:
    assert regressions(compare(record(0.0, "count"), record(1.0, "count")))
    assert not regressions(compare(record(0.0, "count"), record(0.0, "count")))


def test_unlike_records_are_refused() -> None:
    with pytest.raises(InputError, match="size '64x64' and '128x128'"):
        compare(record(1.0), record(1.0, size="128x128"))


def test_command_line(tmp_path: Path) -> None:
    old, same, worse = tmp_path / "old.json", tmp_path / "same.json", tmp_path / "worse.json"
    record(1.0).write(old)
    record(1.01).write(same)
    record(1.2).write(worse)
    fine = CliRunner().invoke(program, ["bench", "compare", str(old), str(same)])
    assert fine.exit_code == 0
    assert fine.stdout.splitlines()[1].split() == ["x", "step", "1", "s", "1.01", "s", "1.010"]
    bad = CliRunner().invoke(program, ["bench", "compare", str(old), str(worse)])
    assert bad.exit_code == 1
    assert "1 of 1 figures regressed: x" in bad.stderr
    gone = CliRunner().invoke(program, ["bench", "compare", str(old), str(tmp_path / "none.json")])
    assert gone.exit_code == 2
    assert "none.json: cannot be read" in gone.stderr
