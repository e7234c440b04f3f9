"""What of the battery can be wrong without a GPU; its parts themselves run in `.ci/run` with --smoke."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from torch import Tensor

from step1x.bench import battery, battery_kernels
from step1x.bench.battery import Run, done_already, merged, run_all, table
from step1x.bench.battery_model import covered
from step1x.bench.record import Metric, Record, place, revision

CPU = torch.device("cpu")


def op(name: str, run: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor]) -> ModuleType:
    """A kernel module as kernels/ has them."""
    module = ModuleType(f"step1x.kernels.{name}")

    def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor]]:
        for rows in (3, 17):
            yield (torch.randn(rows, 5, device=device, dtype=dtype),)

    vars(module).update({name: run, f"{name}_reference": reference, "examples": examples})
    return module


def unfinished(x: Tensor) -> Tensor:
    """Forgets the last row."""
    out = torch.empty_like(x)
    out[:-1] = x[:-1] * 2
    return out


def test_right_and_wrong_kernels() -> None:
    run = Run(CPU, smoke=True)
    assert battery_kernels.check_kernels(run, [op("double", lambda x: x + x, lambda x: x * 2)]) == 1
    assert run.metrics["kernel.double"].unit == "s"
    with pytest.raises(RuntimeError, match="kernel triple: relative error"):
        battery_kernels.check_kernels(run, [op("triple", lambda x: x * 3, lambda x: x * 2)])
    with pytest.raises(RuntimeError, match="relative error inf"):
        battery_kernels.check_kernels(run, [op("unfinished", unfinished, lambda x: x * 2)])
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_kernel_of_ours_can_be_checked() -> None:
    for module in battery_kernels.our_kernels():
        name = module.__name__.rpartition(".")[2]
        assert {name, f"{name}_reference", "examples"} <= set(vars(module)), name


def test_covered_is_the_union() -> None:
    assert covered([(0, 4), (1, 2), (3, 5), (7, 8)]) == 5 + 1
    assert covered([]) == 0


def part(out: Path, name: str, commit: str | None = None) -> None:
    here = place() if commit is None else place().model_copy(update={"commit": commit})
    metrics = {f"{name}.x": Metric(value=1, unit="s", kind="step")}
    Record(suite="battery", place=here, profile="cpu", size="smoke", metrics=metrics, notes={name: "fine"}).write(
        out / f"{name}.json"
    )


def test_parts_become_one_record(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="no part"):
        merged(tmp_path, revision()[0], "smoke")
    part(tmp_path, "dit")
    part(tmp_path, "e2e")
    part(tmp_path, "peers", commit="f" * 40)
    record = merged(tmp_path, revision()[0], "smoke")
    assert set(record.metrics) == {"dit.x", "e2e.x"}
    assert record.notes["kernels"] == "no record: it failed or was not run"
    assert record.notes["peers"] == "its record is of another commit: ffffffffffff"
    shown = table(record)
    assert "dit.x" in shown
    assert "dit: fine" in shown
    with pytest.raises(click.ClickException, match="no part"):
        merged(tmp_path, revision()[0], "full")


def test_done_already(tmp_path: Path) -> None:
    part(tmp_path, "dit")
    commit, _ = revision()
    assert done_already(tmp_path / "dit.json", commit, "smoke")
    assert not done_already(tmp_path / "dit.json", commit, "full")
    assert not done_already(tmp_path / "dit.json", "0" * 40, "smoke")
    assert not done_already(tmp_path / "none.json", commit, "smoke")
    (tmp_path / "bad.json").write_text(json.dumps([]))
    assert not done_already(tmp_path / "bad.json", commit, "smoke")


def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(battery, "PARTS", {"dit": 0.01, "none": 60})
    part(tmp_path, "dit", commit="0" * 40)  # of another commit: must not pass for this run's
    assert run_all(["dit", "none"], tmp_path, revision()[0], smoke=True, again=False) == ["dit", "none"]
    assert not list(tmp_path.glob("*.json"))
    assert "'none' is not one of" in (tmp_path / battery.LOG).read_text()
