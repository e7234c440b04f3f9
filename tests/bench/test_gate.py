from pathlib import Path

import pytest
from click.testing import CliRunner

from step1x.bench import counters, gate
from step1x.bench.gate import Baseline, accept, differences, group_of, of_groups, verdict
from step1x.bench.record import Metric, Record, counts, place
from step1x.engine.cli import program
from step1x.engine.errors import InputError


def record(**values: float) -> Record:
    metrics = counts({name.replace("_", "."): value for name, value in values.items()}, "B")
    return Record(suite="counters", place=place(), profile="cpu", size="all", metrics=metrics)


def test_every_kind_of_difference() -> None:
    old = counts({"same": 1, "up": 1, "down": 2, "gone": 1})
    new = counts({"same": 1, "up": 1.5, "down": 1, "fresh": 7})
    found = {one.name: (one.change, one.fails) for one in differences(old, new)}
    assert found == {
        "up": ("worse", True),
        "down": ("better", False),
        "gone": ("missing", True),
        "fresh": ("new", True),
    }


def test_of_what_should_be_high_less_is_worse() -> None:
    def share(value: float) -> dict[str, Metric]:
        return {"share": Metric(value=value, unit="", kind="count", better="higher")}

    assert differences(share(0.9), share(0.8))[0].change == "worse"
    assert differences(share(0.8), share(0.9))[0].change == "better"


def test_the_verdict_names_metric_values_and_command() -> None:
    found = differences(counts({"edit.dit_forwards": 8}), counts({"edit.dit_forwards": 9}))
    here = place()
    holds, lines = verdict(found, here.model_copy(update={"versions": {"torch": "2.0"}}), here)
    assert not holds
    assert lines[0] == "edit.dit_forwards: worse, 8 -> 9"
    assert 'step1x-engine bench accept --why "..."' in lines[1]
    assert "other versions: torch 2.0 -> " in lines[2]


def test_what_is_better_passes_and_asks_to_be_locked_in() -> None:
    holds, lines = verdict(differences(counts({"a": 2}), counts({"a": 1})), place(), place())
    assert holds
    assert "lock it in" in lines[-1]
    assert verdict([], place(), place()) == (True, [])


def test_accepting_keeps_the_reasons(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    accept(record(a_b=1), "the first", path)
    changes = accept(record(a_b=2), "  worth it ", path)
    assert [str(one) for one in changes] == ["a.b: worse, 1 -> 2 B"]
    kept = Baseline.read(path)
    assert [(reason.why, reason.changed) for reason in kept.reasons] == [
        ("worth it", {"a.b": (1.0, 2.0)}),
        ("the first", {}),
    ]
    assert kept.metrics["a.b"].value == 2


def test_what_cannot_be_accepted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--why is empty"):
        accept(record(a=1), " ", tmp_path / "cpu.json")
    with pytest.raises(InputError, match="no such folder"):
        accept(record(a=1), "why", tmp_path / "none" / "cpu.json")
    with pytest.raises(InputError, match="accept"):
        Baseline.read(tmp_path / "cpu.json")
    assert not list(tmp_path.iterdir())


def test_the_committed_baseline_is_of_the_groups_that_are_measured() -> None:
    kept = Baseline.read()
    assert {group_of(name) for name in kept.metrics} == set(counters.GROUPS)
    assert kept.reasons[-1].why


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accept, then a gate that holds, then one that does not; the groups measured are stand-ins."""
    path, value = tmp_path / "cpu.json", 5.0
    monkeypatch.setattr(gate, "BASELINE", path)
    monkeypatch.setattr(counters, "measure", lambda groups=(): record(edit_waits=value))
    run = CliRunner().invoke
    accepted = run(program, ["bench", "accept", "--why", "a start"])
    assert (accepted.exit_code, accepted.stdout.strip()) == (0, str(path))
    fine = run(program, ["bench", "gate", "--group", "edit", "--json", "-"])
    assert fine.exit_code == 0
    assert Record.model_validate_json(fine.stdout).metrics["edit.waits"].value == 5
    assert "1 counters, none worse" in fine.stderr
    value = 6.0
    bad = run(program, ["bench", "gate", "--group", "edit"])
    assert bad.exit_code == 1
    assert "edit.waits: worse, 5 -> 6 B" in bad.stderr
    assert run(program, ["bench", "accept"]).exit_code == 2
    assert run(program, ["bench", "accept", "--why", ""]).exit_code == 2


def test_groups() -> None:
    metrics = counts({"full.encode_text.flops": 1, "full.512x512.decode.flops": 1, "edit.waits": 0})
    assert set(of_groups(metrics, ["text"])) == {"full.encode_text.flops"}
    assert set(of_groups(metrics, ["full", "edit"])) == {"full.512x512.decode.flops", "edit.waits"}
