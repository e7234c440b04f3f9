import tomllib
from pathlib import Path

import pytest
from PIL import Image

from step1x.bench.record import ROOT, Metric, Record, place
from step1x.bench.report import NOT_YET, SIZES, edit_flops, load, page, plots, shares

PUBLISHED = tomllib.loads((ROOT / "bench" / "published.toml").read_text(encoding="utf-8"))


def battery(size: str = "full") -> Record:
    metrics = {}
    for side in SIZES:
        metrics[f"e2e.{side}.edit"] = Metric(value=side / 100, unit="s", kind="end-to-end")
        metrics[f"e2e.{side}.peak_reserved"] = Metric(value=6e10, unit="B", kind="memory")
        metrics[f"dit.{side}.plain.seconds"] = Metric(value=side / 1000, unit="s", kind="step")
    here = place("NVIDIA H200").model_copy(update={"commit": "abcdef0123456789", "date": "2026-11-21T00:00:00+00:00"})
    return Record(suite="battery", place=here, profile="bf16-80gb", size=size, metrics=metrics)


def row(text: str, start: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return line


def test_nothing_measured_is_said_so() -> None:
    text = page([], PUBLISHED)
    assert row(text, "**ours, bf16**").count(NOT_YET) == 3
    assert row(text, "ours, bf16, plain").count(NOT_YET) == 3
    assert row(text, "official, bf16 |").split("|")[4].strip() == "22 (49.8 GB)"
    assert row(page([battery("smoke")], PUBLISHED), "**ours, bf16**").count(NOT_YET) == 3, (
        "a smoke run is no measurement"
    )


def test_measured_figures_have_their_device_and_commit() -> None:
    text = page([battery()], PUBLISHED)
    line = row(text, "**ours, bf16**")
    assert "NVIDIA H200, commit abcdef012345, 2026-11-21" in line
    assert line.endswith("| 5.12 (60.0 GB) | 7.68 (60.0 GB) | 10.24 (60.0 GB) |")
    assert "0.5120" in row(text, "ours, bf16, plain")
    assert row(text, "diffusers' Flux blocks, bf16, eager").count(NOT_YET) == 3


def test_the_arithmetic() -> None:
    assert edit_flops(1024) == pytest.approx(9.48e15, rel=0.001)
    assert sum(shares(1024).values()) == pytest.approx(1)
    assert shares(1024)["attention"] == pytest.approx(54.64 / 169.2, rel=0.01)


def test_only_records_are_read(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    battery().write(tmp_path / "b.json")
    assert [one.suite for one in load(tmp_path)] == ["battery"]


def test_plots(tmp_path: Path) -> None:
    plots([battery()], PUBLISHED, tmp_path)
    for name in ("performance-sizes.png", "performance-step.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size[0] > 600


def test_the_committed_page_is_of_the_committed_records() -> None:
    text = page(load(ROOT / "bench" / "results"), PUBLISHED)
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == text, "run python bench/report.py"
