import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from step1x.bench.counters import photograph
from step1x.engine.calibration import Calibration
from step1x.engine.calibration_pairs import instructions, pictures
from step1x.engine.cli import program
from step1x.engine.errors import InputError

SMALL = ("--size", "64", "--steps", "8", "--pairs", "2", "--guidance", "2", "--device", "cpu")


def run(*words: object) -> Result:
    return CliRunner().invoke(program, [str(word) for word in words])


def test_it_writes_what_edit_takes_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.json", "two.json", "three.json")]
    done = run("calibrate", *SMALL, "-o", paths[0])
    assert (done.exit_code, done.stdout) == (0, f"{paths[0]}\n"), done.stderr
    assert done.stderr.startswith("fitted to 2 edits by v1.1 weights ")
    assert "TeaCache's probe: R2 " in done.stderr
    again = run("calibrate", *SMALL, "-o", paths[1], "--json", "-q")
    assert again.stderr == ""
    facts = json.loads(again.stdout)
    one, two = (Calibration.read(path).model_dump(mode="json", exclude={"made"}) for path in paths[:2])
    assert one == two
    assert facts == {"output": str(paths[1]), **two, "made": facts["made"]}
    assert (one["steps"], one["size"], one["tokens"], one["pairs"]) == (8, 64, 16, 2)
    assert one["setting"]["guidance"] == 2
    assert run("calibrate", *SMALL, "-o", paths[2], "-q", "--seed", 1).exit_code == 0
    assert Calibration.read(paths[2]).curve != Calibration.read(paths[0]).curve

    photograph().save(tmp_path / "in.png")
    edit = ("edit", tmp_path / "in.png", "make it darker", "--size", 64, "--steps", 8, "--speed", "fast", "-q")
    fitting = run(*edit, "--guidance", 2, "--calibration", paths[0], "-o", tmp_path / "a.png")
    assert (fitting.exit_code, fitting.stderr) == (0, "")
    other = run(*edit, "--guidance", 3, "--calibration", paths[0], "-o", tmp_path / "b.png")
    assert other.exit_code == 0
    assert other.stderr.startswith("note: speed goes by constants fitted to v1.1 weights ")
    assert other.stderr.count("\n") == 1
    refused = run(*edit, "--variant", "official-v1.1", "--calibration", paths[0], "-o", tmp_path / "c.png")
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"error: {paths[0]}: fitted to v1.1 with guidance norm-rescaled at every step")
    assert not (tmp_path / "c.png").exists()


def test_own_pictures_and_instructions(tmp_path: Path) -> None:
    for index, sides in enumerate([(40, 60), (90, 50)]):
        photograph(*sides, moved=40 * index).save(tmp_path / f"{index}.png")
    (tmp_path / "words.txt").write_text("invert the colours\n\n  make it darker \n")
    out = tmp_path / "c.json"
    own = ("--images", tmp_path, "--instructions", tmp_path / "words.txt")
    done = run("calibrate", *SMALL, *own, "-o", out, "-q")
    assert done.exit_code == 0, done.stderr
    assert Calibration.read(out).tokens == 16, "squares, whatever the pictures are"
    assert instructions(tmp_path / "words.txt") == ["invert the colours", "make it darker"]
    assert [path.name for path in pictures(tmp_path)] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "there.json"), "there.json exists; --force replaces it"),
        (("-o", "none/c.json"), "none/c.json: there is no such folder"),
        (("--images", "none"), "none: cannot be read: no such file"),
        (("--images", "empty"), "empty: no pictures in it"),
        (("--instructions", "none.txt"), "none.txt: cannot be read: no such file"),
        (("--instructions", "blank.txt"), "blank.txt: no instructions in it"),
        (("--steps", "7"), "7 is not in the range"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "empty").mkdir()
    done = run("calibrate", "--model", "no/such/model/anywhere", *words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_instructions_are_text(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        instructions(tmp_path / "w.txt")
