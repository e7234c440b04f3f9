import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from step1x.engine import plan_commands, planner
from step1x.engine.cli import program
from step1x.engine.planner import PHASES
from step1x.profiles import profile_names

TINY = str(Path(plan_commands.__file__).parent / "bundled" / "step1x-tiny")


def run(*words: str) -> tuple[int, list[str], str]:
    """Exit code, lines of standard output, standard error."""
    result = CliRunner().invoke(program, list(words))
    return result.exit_code, result.stdout.splitlines(), result.stderr


def test_a_table_of_phases_and_items() -> None:
    code, lines, errors = run("plan", "--model", TINY, "--profile", "fp8-18gb", "--size", "512", "--batch", "2")
    assert (code, errors) == (0, "")
    assert lines[0] == "step1x-tiny with fp8-18gb: 512 x 512, batch 2, 2 steps, guided"
    assert lines[2].split() == ["GB", *PHASES]
    assert all(len(line) <= 100 and line.isascii() for line in lines)
    kinds = [line.split()[0] for line in lines[3 : lines.index("", 3)]]
    assert kinds == sorted(kinds, key=[*plan_commands.ORDER, "together"].index)
    together = next(line for line in lines if line.startswith("together")).split()[1:]
    bars = [line for line in lines if "#" in line]
    assert [bar.split()[0] for bar in bars] == list(PHASES)
    assert [bar.split()[-1] for bar in bars] == together
    assert all(bar.index("|") == 13 + plan_commands.BAR for bar in bars), "the budget's end"
    assert lines[-3].startswith("GPU memory: ")
    assert re.search(r" of 18\.00 GB \(16\.76 GiB\): fits, \d+\.\d\d GB to spare$", lines[-3])
    assert lines[-2].startswith("pinned host memory: 0.0")
    assert lines[-1].startswith("  modulations 0.0")


def test_over_the_budget_is_an_error_after_the_table(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    gpu = 'device = "cuda:0"\nbudget_gb = 1.22\ndtype = "bfloat16"\nvae_dtype = "bfloat16"\n'
    own.write_text(f'description = ""\n{gpu}')
    code, lines, errors = run("plan", "--model", TINY, "--profile", str(own), "--size", "384")
    assert code == 2
    assert lines[-1].endswith(" GB over")
    name = lines[-1].split(" in ")[1].split()[0]
    bar = next(line for line in lines if line.startswith(name)).split()[1]
    assert re.fullmatch(r"#+\|#+", bar), "it goes on behind the budget's end"
    assert errors.count("\n") == 1
    assert errors.startswith("error: step1x-tiny with own, 384x384, batch 1, is ")
    assert re.search(rf"over its 1.22 GB in {name} \(.*\); (size \d+|no shipped profile and no size) fits\n$", errors)


def test_json_is_the_plan() -> None:
    code, lines, _ = run("plan", "--model", TINY, "--profile", "fp8-18gb", "--size", "64", "--json")
    facts = json.loads("\n".join(lines))
    assert code == 0
    assert (facts["profile"], facts["canvas"]) == ("fp8-18gb", {"width": 64, "height": 64})
    assert facts["peak_bytes"] < facts["budget_bytes"] == 18e9


def test_speed_brings_keys_and_values() -> None:
    """Of another speed than exact they are kept: in the table, in the sums, and in the message of what is over."""

    def denoise(*words: str) -> dict[str, int]:
        _, lines, _ = run("plan", "--model", TINY, "--profile", "fp8-18gb", "--size", "256", *words, "--json")
        phase = next(one for one in json.loads("\n".join(lines))["phases"] if one["name"] == "denoise")
        return {item["name"]: item["bytes"] for item in phase["items"]} | {"together": phase["bytes"]}

    exact, fast = denoise(), denoise("--speed", "fast")
    assert "keys and values" not in exact
    assert denoise("--speed", "exact") == exact
    kept = fast.pop("keys and values")
    assert kept > 0
    assert fast == exact | {"together": exact["together"] + kept}
    assert denoise("--speed", "fast", "--batch", "2")["keys and values"] == 2 * kept
    _, lines, _ = run("plan", "--model", TINY, "--profile", "fp8-18gb", "--size", "256", "--speed", "fast")
    assert any(line.startswith("kept        keys and values") for line in lines)


def test_all_profiles_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["cpu", "fp8-18gb", "int4-12gb"]
    monkeypatch.setattr(planner, "SIZES", (64, 128))
    monkeypatch.setattr("step1x.profiles.profile_names", lambda: names)
    code, lines, _ = run("plan", "--model", TINY, "--all")
    assert code == 0
    assert lines[2].split() == ["profile", "budget", "batch", "64", "x", "64", "128", "x", "128"]
    assert [line.split()[0] for line in lines[3:]] == names
    assert all(line.count("fits") == 2 for line in lines[3:])
    _, listed, _ = run("plan", "--model", TINY, "--all", "--json")
    assert [one["canvas"]["width"] for one in json.loads("\n".join(listed))] == [64, 128] * len(names)
    code, _, errors = run("plan", "--all", "--size", "512")
    assert (code, "leave out --profile and --size" in errors) == (2, True)


@pytest.mark.parametrize("words", [("plan", "--profile", "fp9"), ("profiles", "fp9")])
def test_an_unknown_profile(words: tuple[str, ...]) -> None:
    code, lines, errors = run(*words)
    assert (code, lines) == (2, [])
    assert errors.startswith("error: unknown profile 'fp9'; known: bf16-24gb, ")
    assert errors.count("\n") == 1


def test_an_unknown_model() -> None:
    code, _, errors = run("plan", "--model", "v1.3")
    assert (code, errors) == (2, "error: v1.3: no such folder, and not a Hub id (ORG/NAME or ORG/NAME@REVISION)\n")


def test_profiles_one_a_line() -> None:
    code, lines, _ = run("profiles")
    assert code == 0
    assert [line.split()[0] for line in lines] == profile_names()
    eighteen = next(line for line in lines if line.startswith("fp8-18gb"))
    assert eighteen.startswith("fp8-18gb    18 GB (16.8 GiB)       fp8               18 GB and 8-bit tensor cores: ")


@pytest.mark.parametrize("name", profile_names())
def test_every_field_of_a_profile_is_explained(name: str) -> None:
    code, lines, _ = run("profiles", name)
    assert code == 0
    assert lines[0] == name
    assert all(len(line) <= 100 and "{" not in line for line in lines)
    named = [match[1] for line in lines[1:] if (match := re.match(r"  (\S.*?) {2,}\S", line))]
    assert len(named) == 18


def test_words_of_a_profile() -> None:
    text = " ".join(" ".join(run("profiles", "int4-12gb")[1]).split())
    for words in (
        "budget 12 GB (11.2 GiB) of GPU memory",
        "transformer weights in 4-bit integers, multiplied in bfloat16; on the device all the time",
        "modulations in bfloat16; in host memory, copied once an edit, layer by layer",
        "guidance the two forwards of a step one after the other",
    ):
        assert words in text
