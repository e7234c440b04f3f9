"""What of the battery can be wrong without a GPU; its parts themselves run in `.ci/run` with --smoke."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from torch import Tensor

from step1x.bench import battery, battery_kernels
from step1x.bench.battery import Run, done_already, merged, run_all, table
from step1x.bench.battery_model import covered
from step1x.bench.record import ROOT, Metric, Record, place, revision
from step1x.bench.worker import kernel_names
from step1x.kernels.launch import Op
from step1x.profiles import profile_names

CPU = torch.device("cpu")


def op(name: str, run: Callable[[Tensor], object], reference: Callable[[Tensor], object]) -> Op:
    def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor]]:
        for rows in (3, 17):
            yield (torch.randn(rows, 5, device=device, dtype=dtype),)

    return Op(name=name, call=run, reference=reference, kernel=run, examples=examples)


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


def to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float() / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def test_every_result_of_a_kernel_is_checked() -> None:
    run = Run(CPU, smoke=True)
    assert battery_kernels.check_kernels(run, [op("quantise", to_e4m3, to_e4m3)]) == 1

    def wrong_scale(x: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = to_e4m3(x)
        return values, scale * 1.1

    def wrong_values(x: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = to_e4m3(x)
        return (values.float() * 1.1).to(values.dtype), scale

    for wrong in (wrong_scale, wrong_values):
        with pytest.raises(RuntimeError, match="kernel quantise: relative error"):
            battery_kernels.check_kernels(run, [op("quantise", wrong, to_e4m3)])


def test_fp8_arguments_stay_as_they_are() -> None:
    def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, int]]:
        yield (*to_e4m3(torch.randn(3, 5, device=device, dtype=dtype)), 2)

    def product(values: Tensor, scale: Tensor, factor: int) -> Tensor:
        assert (values.dtype, scale.dtype, factor) == (torch.float8_e4m3fn, torch.float32, 2)
        return values.float() * scale * factor

    run = Run(CPU, smoke=True)
    one = Op(name="dequantise", call=product, reference=product, kernel=product, examples=examples)
    assert battery_kernels.check_kernels(run, [one]) == 1


def test_what_a_kernel_writes_to_its_arguments_is_checked() -> None:
    def examples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.randn(3, 5, device=device, dtype=dtype), torch.zeros(4, 5, device=device, dtype=dtype)

    def store(x: Tensor, rows: Tensor) -> None:
        rows[: len(x)] = x

    def store_elsewhere(x: Tensor, rows: Tensor) -> None:
        rows[1:] = x

    run = Run(CPU, smoke=True)
    one = Op(name="store", call=store, reference=store, kernel=store, examples=examples)
    assert battery_kernels.check_kernels(run, [one]) == 1
    with pytest.raises(RuntimeError, match="kernel store: relative error"):
        battery_kernels.check_kernels(run, [replace(one, call=store_elsewhere)])


def test_relative_error() -> None:
    one, none = torch.ones(2, 3), torch.zeros(2, 3)
    assert battery_kernels.relative_error(1.5 * one, one) == pytest.approx(0.5)
    assert battery_kernels.relative_error(none, none) == battery_kernels.relative_error(one[:0], one[:0]) == 0
    hidden = torch.tensor([-torch.inf, 1.0, 1.0])  # a row that attends to nothing has this logarithm
    assert battery_kernels.relative_error(hidden, hidden) == 0
    assert battery_kernels.relative_error(torch.tensor([-torch.inf, 1.0, 1.5]), hidden) == pytest.approx(0.5 / 2**0.5)
    for wrong, exact in (
        (one, none),
        (one[0], hidden),
        (torch.nan * one, one),
        (torch.nan * one, none),
        (torch.inf * one, one),
    ):
        assert battery_kernels.relative_error(wrong, exact) == float("inf")


def test_names_of_our_kernels_are_distinct() -> None:
    names = [op.name for op in battery_kernels.our_kernels()]
    assert len(set(names)) == len(names)
    assert kernel_names(ROOT) == names


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
    monkeypatch.setattr(battery, "LIMITS", {"dit": 0.01, "none": 60})
    part(tmp_path, "dit", commit="0" * 40)  # of another commit: must not pass for this run's
    assert run_all(["dit", "none"], tmp_path, revision()[0], smoke=True, again=False) == ["dit", "none"]
    assert not list(tmp_path.glob("*.json"))
    assert "'none' is not one of" in (tmp_path / battery.LOG).read_text()


def test_profiles_are_compared_with_all_resident() -> None:
    def seconds(value: float) -> Metric:
        return Metric(value=value, unit="s", kind="end-to-end")

    found = battery.ratios(
        {"fp8-18gb.512.edit": seconds(2.1), "fp8-80gb.512.edit": seconds(2.0), "int8-24gb.512.edit": seconds(1.0)}
    )
    assert {name: metric.value for name, metric in found.items()} == {"fp8-18gb.512.of_80gb": pytest.approx(1.05)}
    assert set(battery.PROFILES) == set(profile_names()) - {"cpu"}
