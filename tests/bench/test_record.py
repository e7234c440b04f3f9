import json
from pathlib import Path

import pytest

from step1x.bench.record import Metric, Record, git, place, revision
from step1x.engine.errors import InputError


def record(**metrics: float) -> Record:
    values = {name: Metric(value=value, unit="s", kind="step") for name, value in metrics.items()}
    return Record(suite="edit", place=place(), profile="cpu", size="64x64", metrics=values, notes={"model": "x"})


def test_round_trip_with_one_metric_a_line(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    one = record(b=2.5, a=1)
    one.write(path)
    assert Record.read(path) == one
    lines = [line for line in path.read_text().splitlines() if '"value"' in line]
    assert [json.loads(line.strip().rstrip(",").partition(": ")[2])["value"] for line in lines] == [1.0, 2.5]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 2}', '{"summary": {}}'])
def test_other_files_are_refused_in_a_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"r\.json: not a record of a measurement") as caught:
        Record.read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Record.read(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be written"):
        record().write(tmp_path / "none" / "r.json")


def test_numbers_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        Metric(value=float("nan"), unit="s", kind="step")


def test_place_says_where_and_when() -> None:
    here = place()
    assert here.cpu
    assert here.versions["torch"].startswith("2.")
    assert here.date.endswith("+00:00")


def test_revision(tmp_path: Path) -> None:
    assert revision(tmp_path / "none") == ("", False)
    git("init", "-q", root=tmp_path)
    git("-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "x", root=tmp_path)
    commit, dirty = revision(tmp_path)
    assert len(commit) == 40
    assert not dirty
    (tmp_path / "new").touch()
    assert revision(tmp_path) == (commit, True)
