from pathlib import Path

import numpy as np
import pytest

from step1x.bench.paired import Ratio, base, checkout, measure, ratio, record
from step1x.bench.record import git
from step1x.engine.errors import InputError


def repository(root: Path, commits: int) -> Path:
    git("init", "-q", "-b", "main", root=root)
    for number in range(commits):
        (root / "file").write_text(str(number))
        git("add", "file", root=root)
        commit(root)
    return root


def commit(root: Path) -> str:
    git("-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "-a", "-m", "x", root=root)
    return git("rev-parse", "HEAD", root=root)


def test_drift_cancels_in_pairs() -> None:
    """Both sides slow down by a factor of ten while they are measured; the ratio stays."""
    random = np.random.default_rng(1)
    drift = np.geomspace(1, 10, 20).reshape(4, 5)

    def noise() -> np.ndarray:
        return random.lognormal(0, 0.01, (4, 5))

    others = drift * noise()
    same = ratio("x", drift * noise(), others)
    assert not same.slower
    assert same.low < 1 < same.high
    slow = ratio("x", 1.3 * drift * noise(), others)
    assert slow.slower
    assert slow.median == pytest.approx(1.3, rel=0.02)
    assert slow.pairs == 20
    assert "SLOWER" in str(slow)


def test_noise_alone_does_not_fail() -> None:
    """A ratio above the limit is not enough; its whole interval must be."""
    noisy = ratio("x", [[1, 1.5, 0.8, 2, 1.2], [0.7, 1.6, 1.1, 1.3, 0.9]], np.ones((2, 5)))
    assert noisy.median > 1.1
    assert not noisy.slower


def test_one_process_that_is_slow_does_not_fail() -> None:
    """Its pairs agree with each other, but the other processes do not agree with it."""
    ours = np.ones((4, 3)) * np.array([[1.2], [1.21], [1.0], [0.98]])
    odd = ratio("x", ours, np.ones((4, 3)))
    assert odd.median > 1.05
    assert not odd.slower


def test_base_is_where_the_branch_left_main(tmp_path: Path) -> None:
    root = repository(tmp_path, 2)
    first, second = git("rev-parse", "HEAD~1", root=root), git("rev-parse", "HEAD", root=root)
    assert base(root) == first, "on main: the commit before"
    (root / "file").write_text("changed")
    assert base(root) == second, "with changes: the last commit"
    git("checkout", "-q", "-b", "topic", root=root)
    commit(root)
    (root / "file").write_text("more")
    commit(root)
    assert base(root) == second


def test_no_history(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no revision to compare with"):
        base(tmp_path)
    with pytest.raises(InputError, match="no revision"):
        base(repository(tmp_path, 1))


def test_checkout_leaves_nothing(tmp_path: Path) -> None:
    root = repository(tmp_path, 2)
    with checkout("HEAD~1", root) as tree:
        assert (tree / "file").read_text() == "0"
    assert not tree.exists()
    assert len(git("worktree", "list", root=root).splitlines()) == 1
    with pytest.raises(InputError, match="cannot check out revision 'none'"), checkout("none", root):
        pass


def test_a_side_that_dies_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match="ended in case edit, exit code 3"):
        measure(tmp_path, tmp_path, pairs=1, cases=["edit"])


def test_record_keeps_the_interval() -> None:
    kept = record([Ratio("a", 1.0, 0.9, 1.1, 0.5, 12)], "abc")
    assert {name: metric.value for name, metric in kept.metrics.items()} == {
        "a.ratio": 1.0,
        "a.ratio_low": 0.9,
        "a.ratio_high": 1.1,
        "a.seconds": 0.5,
    }
    assert kept.notes["against"] == "abc"
