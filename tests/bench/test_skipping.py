"""The measurement and its report on one pair: what is written, that it goes on, and how pairs are summed up."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from step1x.bench import skipping
from step1x.bench.skipping import main, policies, summary
from step1x.engine.plan import spelled
from step1x.engine.schedule import timesteps

PHOTOS = Path(__file__).parents[2] / "docs" / "pictures"
STEPS = 4
FIGURES = {"psnr", "ssim", "success", "plan", "work", "seconds"}


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one pair, at the smallest size that has an aspect."""
    path = tmp_path_factory.mktemp("skipping") / "records.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skipping, "LEVEL", 48)
        patch.setattr(skipping, "SIZES", ((64, 32),))
        words = ("measure", "--photos", PHOTOS, "--records", path, "--pairs", 1, "--steps", STEPS)
        assert run(*words).stderr.startswith("0 ")
        before = path.read_bytes()
        assert run(*words).stderr == "", "the pair is there"
    assert path.read_bytes() == before
    return path


def test_a_pair_is_edited_by_every_policy(records: Path) -> None:
    [line] = [json.loads(text) for text in records.read_text().splitlines()]
    assert (line["pair"], line["steps"], line["guidance"]) == (0, STEPS, 2.0)
    assert line["bfloat16"]["psnr"] > 30
    assert line["policies"].keys() == policies(STEPS).keys()
    schedule = timesteps(STEPS, 64 * 32 // 256).tolist()
    for name, found in line["policies"].items():
        assert found.keys() >= FIGURES, name
        assert found["plan"] == spelled(policies(STEPS)[name].plan(schedule, True))
        dense = found["plan"] == "F" * STEPS
        assert (found["work"] == 1) == dense, name
        assert (found["psnr"] == 80) == dense, name
    assert "R" in line["policies"]["regione"]["plan"]
    assert 0 < line["policies"]["regione"]["active"] <= 1
    assert 0 <= line["policies"]["regione"]["recall"] <= 1


def test_a_share_is_every_nth_pair(records: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.jsonl"
    again.write_bytes(records.read_bytes())
    words = ("measure", "--photos", PHOTOS, "--records", again, "--pairs", 2, "--steps", STEPS, "--share", "0/2")
    assert run(*words).stderr == ""


def test_some_policies_alone(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipping, "LEVEL", 48)
    monkeypatch.setattr(skipping, "SIZES", ((64, 32),))
    some = tmp_path / "some.jsonl"
    words = ("measure", "--photos", PHOTOS, "--records", some, "--pairs", 2, "--share", "1/2", "--steps", STEPS)
    run(*words, "--only", "step-mask", "--only=--speed")
    [line] = [json.loads(text) for text in some.read_text().splitlines()]
    assert {name[:7] for name in line["policies"]} == {"step-ma", "--speed"}
    rows = summary([json.loads(records.read_text()), line])
    assert {row["policy"]: row["n"] for row in rows} == {
        name: 2 if name.startswith(("step-mask", "--speed")) else 1 for name in policies(STEPS)
    }


def test_report(records: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "table.json", tmp_path / "figure.png"
    shown = run("report", records, "--json", out, "--figure", figure).stdout.splitlines()
    assert shown[0] == f"1 pairs, {STEPS} steps, guidance 2.0"
    assert shown[-2].startswith("noise floor: bfloat16 is ")
    facts = json.loads(out.read_text())
    assert (facts["pairs"], facts["steps"]) == (1, STEPS)
    works = [row["work"] for row in facts["rows"]]
    assert works == sorted(works)
    assert {row["policy"] for row in facts["rows"]} == set(policies(STEPS))
    assert all(row["local"] is None for row in facts["rows"]), "of the one pair, which is a global edit"
    assert [line[:26].strip() for line in shown[2:-2]] == [row["policy"] for row in facts["rows"]]
    with Image.open(figure) as image:
        assert image.size == (880, 550)


def test_work_of_many_pairs_is_that_of_their_sum() -> None:
    def line(work: float, psnr: float, local: bool) -> dict[str, Any]:
        values = {"work": work, "psnr": psnr, "ssim": 1.0, "success": True, "seconds": 1.0}
        return {"local": local, "policies": {"one": values}}

    [row] = summary([line(1, 30, False), line(3, 50, True), line(3, 40, True)])
    assert row["work"] == pytest.approx(9 / 5)
    assert (row["n"], row["psnr"], row["worst"], row["recall"]) == (3, 40, 30, None)
    assert (row["local"]["n"], row["local"]["work"], row["local"]["psnr"]) == (2, pytest.approx(3), 45)
