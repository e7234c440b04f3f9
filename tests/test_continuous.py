"""What `.ci/run` is made of: the README's commands, constraints, lower ends of ranges, and which tests run."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanted(*extras: str) -> list[Requirement]:
    """Direct dependencies, and those of the named extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_extras = [one for extra in extras for one in project["optional-dependencies"][extra]]
    found = [Requirement(one) for one in [*project["dependencies"], *of_extras]]
    return [one for one in found if one.name != project["name"]]


def test_both_commands_of_the_readme_are_constrained() -> None:
    first, second = script("readme_commands").commands((ROOT / "README.md").read_text())
    assert first.endswith('edit docs/pictures/coffee.jpg "make it black and white"')
    assert second.endswith(".venv/bin/pytest -q")
    for line in (first, second):
        assert "pip install -c constraints.txt -e " in line


def test_a_readme_without_its_commands_is_refused() -> None:
    text = "```sh\npython3 -m venv .venv && a\n```\n```sh\npython3 -m venv .venv && b\n```\n"
    commands = script("readme_commands").commands
    assert commands(text) == ["python3 -m venv .venv && a", "python3 -m venv .venv && b"]
    with pytest.raises(SystemExit, match="1 set-up commands"):
        commands(text.replace("python3", "python", 1))
    with pytest.raises(SystemExit, match="one line"):
        commands(text.replace("&& a", "\na"))


def test_every_dependency_has_one_version_inside_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines), lines
    versions = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert len(versions) == len(lines)
    for one in wanted("onnx", "tensorrt-rtx", "dev"):
        assert one.specifier.contains(versions[canonicalize_name(one.name)]), one


def test_lower_ends() -> None:
    oldest = script("oldest")
    assert oldest.pins(["a>=1.2,<3", "b[c]>=2; sys_platform == 'linux'", "d==4", "torch>=2.11"]) == [
        "a==1.2",
        "b==2",
        "torch==2.13.0",
    ]
    with pytest.raises(SystemExit, match="two lower ends of a"):
        oldest.pins(["a>=1", "a>=2"])
    pinned = {line.split("==")[0] for line in oldest.pins(oldest.requirements())}
    assert {one.name for one in wanted()} == pinned & {one.name for one in wanted()}


TESTS = """
import os
import pytest

def test_short():
    assert os.environ["XDG_CACHE_HOME"].startswith(os.environ["TMPDIR"])
    assert os.environ["OMP_NUM_THREADS"] == "1"

@pytest.mark.long
@pytest.mark.parametrize("number", range(4))
def test_long(number):
    pass
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tests with our conftest."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    long: minutes\n    dependencies: both ends\n")
    return folder


def run(suite: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *words],
        cwd=suite,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(suite)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_long_proofs_run_when_asked_for(suite: Path) -> None:
    assert "1 passed, 4 deselected" in run(suite, "tests/test_it.py")
    assert "4 passed, 1 deselected" in run(suite, "tests/test_it.py", "-m", "long")
    assert "1 passed" in run(suite, "tests/test_it.py::test_long[2]")


def test_a_folder_runs_on_every_core_and_a_file_on_one(suite: Path) -> None:
    assert re.search(r"^created: \d+/\d+ worker", run(suite, "tests"), re.MULTILINE)
    assert "worker" not in run(suite, "tests/test_it.py")
    assert "worker" not in run(suite, "tests", "-n", "0")


def test_a_sample_stops_at_its_time_and_says_so(suite: Path) -> None:
    assert "4 passed" in run(suite, "tests", "-n0", "-m", "long", "--sample", "60")
    late = run(suite, "tests", "-n0", "-m", "long", "--sample", "0")
    assert "4 skipped" in late
    assert "the 0 s of --sample are over" in late


def test_samples_begin_everywhere(pytestconfig: pytest.Config) -> None:
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert conftest is not None
    starts = [conftest.first_of_sample(20, commit) for commit in range(1, 61)]
    assert {starts.count(index) for index in range(20)} <= {2, 3, 4}
    assert all(abs(a - b) > 3 for a, b in pairwise(starts))


def test_every_file_of_the_quick_selection_is_there(pytestconfig: pytest.Config) -> None:
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert conftest is not None
    assert [name for name in conftest.DEPENDENCIES if not (ROOT / "tests" / name).is_file()] == []
