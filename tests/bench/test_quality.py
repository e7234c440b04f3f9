"""The judge itself: its figures on known pictures, and one whole run at toy size."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from step1x.training.edits import FAMILIES, sample

BENCH = Path(__file__).parent.parent.parent / "bench"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return script("quality")


def test_psnr_of_a_known_error(quality: ModuleType) -> None:
    black, grey = np.zeros((8, 8, 3), np.float32), np.full((8, 8, 3), 0.1, np.float32)
    assert quality.psnr(black, grey) == pytest.approx(20)
    weight = np.zeros((8, 8), np.float32)
    weight[:4] = 1
    grey[4:] = 1
    assert quality.psnr(black, grey, weight) == pytest.approx(20)
    assert quality.ssim(black, black) == pytest.approx(1)


def test_scores_tell_a_good_edit_from_none(quality: ModuleType) -> None:
    picture = np.random.default_rng(0).random((48, 48, 3), dtype=np.float32)
    one = sample("add", picture, np.random.default_rng(0))
    good, none = quality.score("x", one, one.target), quality.score("x", one, one.source)
    assert good.psnr == pytest.approx(80)
    assert none.psnr == none.source_psnr < 30
    assert none.outside_psnr == pytest.approx(80)
    records, lines = quality.table([good, none])
    assert records[0]["family"] == "add"
    assert records[0]["n"] == 2
    assert len(lines) == 2


def test_a_whole_run(quality: ModuleType, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.jpg")
    words = ["--photos", str(tmp_path), "--size", "32", "--steps", "1", "--guidance", "1"]
    words += ["--json", str(tmp_path / "out.json"), "--sheet", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(quality.main, words)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert [record["family"] for record in found["families"]] == list(FAMILIES)
    assert found["summary"] == json.loads(result.output.splitlines()[-1])
    assert found["summary"]["edits"] == len(FAMILIES)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 16 * 100


def test_a_folder_without_photographs_is_refused(quality: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(quality.main, ["--photos", str(tmp_path)])
    assert result.exit_code == 2
    assert "no .jpg photographs" in result.output
