"""The table of mutants is of the tree as it is; whether they are killed, mutation.py finds out."""

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
LEAST = 77  # mutants: the 47 of the first review and 30 more


@pytest.fixture(scope="module")
def mutation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step1x_mutation", Path(__file__).with_name("mutation.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_can_be_tried(mutation: ModuleType) -> None:
    stale = {one.number: reason for one in mutation.table() if (reason := one.stale(ROOT))}
    assert not stale


def test_every_row_leaves_code_and_names_tests_that_are_there(mutation: ModuleType) -> None:
    for one in mutation.table():
        ast.parse((ROOT / one.file).read_text(encoding="utf-8").replace(one.old, one.new))
        for test in one.tests:
            file, _, name = test.partition("::")
            assert name.partition("[")[0] in functions(file), f"{one.number}: no test {test}"
        assert one.why


def test_the_table_does_not_shrink(mutation: ModuleType) -> None:
    assert len(mutation.table()) >= LEAST


@pytest.fixture
def tree(tmp_path: Path, mutation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs mutants of a tree of one function and one test; returns their verdicts."""
    root = tmp_path / "root"
    (root / "engine").mkdir(parents=True)
    (root / "engine" / "__init__.py").write_text("")
    (root / "engine" / "sums.py").write_text("def total(a, b):\n    return a + b\n")
    tests = "from step1x.engine.sums import total\n\n\ndef test_sum():\n    assert total(2, 3) == 5\n"
    tests += "\n\ndef test_zeros():\n    assert total(0, 0) == 0\n\n\ndef test_wrong():\n    assert total(0, 0) == 1\n"
    (root / "test_sums.py").write_text(tests)
    monkeypatch.setattr(mutation, "ROOT", root)

    def run(*rows: tuple[str, str, str], seconds: float | None = None, jobs: int = 1) -> list[str]:
        mutants = [
            mutation.Mutant(
                number=n, file="engine/sums.py", old=old, new=new, tests=(f"test_sums.py::{test}",), why="w"
            )
            for n, (old, new, test) in enumerate(rows)
        ]
        return [one.word for one in sorted(mutation.run(mutants, seconds, jobs), key=lambda one: one.mutant.number)]

    return run


def test_verdicts(tree: Callable[..., list[str]]) -> None:
    rows = [("a + b", "a - b", "test_sum"), ("a + b", "a - b", "test_zeros"), ("a * b", "a", "test_sum")]
    assert tree(*rows, ("a + b", "a +", "test_sum"), jobs=2) == ["killed", "survived", "stale", "broken"]


def test_a_test_that_fails_anyway_kills_nothing(tree: Callable[..., list[str]]) -> None:
    with pytest.raises(RuntimeError, match="fail on the code as it is"):
        tree(("a + b", "a - b", "test_wrong"))


def test_no_mutant_is_begun_without_time(tree: Callable[..., list[str]]) -> None:
    assert tree(("a + b", "a - b", "test_sum"), seconds=0.0) == []


def test_samples_differ_by_their_seed(mutation: ModuleType) -> None:
    table = mutation.table()
    first, again, other = (mutation.chosen(table, [], seed) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(one.number for one in other) == [one.number for one in table]
    assert [one.number for one in mutation.chosen(table, [36, 3], None)] == [3, 36]
    with pytest.raises(SystemExit, match="no such mutant: 1000"):
        mutation.chosen(table, [1000], None)
