"""Wall time of this tree against another revision, pair by pair, so that a machine's drift cancels.

Each side is a process of its own that stays alive; the cases of worker.py run A B B A on them. Two processes of the
same code differ too (where memory and threads came to lie), by up to 10 %, so both are started anew PROCESSES times,
and the bootstrap draws processes, then pairs. Slower means that the whole interval of the median lies above LIMIT.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from step1x.bench.record import ROOT, Metric, Record, git, place
from step1x.engine.errors import InputError

LIMIT = 1.10
PAIRS = 12
PROCESSES = 4
RESAMPLES = 4000
CASES = ("edit", "operations", "startup")
Seconds = dict[str, list[list[float]]]  # metric -> (processes, pairs)
MAIN_BRANCHES = ("origin/HEAD", "origin/main", "origin/master", "main")


@dataclass(frozen=True, slots=True)
class Ratio:
    """Seconds of this tree over the other's: the median of the pairs, and an interval (95 % for all metrics)."""

    name: str
    median: float
    low: float
    high: float
    seconds: float  # median of this tree's
    pairs: int

    @property
    def slower(self) -> bool:
        return self.low > LIMIT

    def __str__(self) -> str:
        mark = "SLOWER" if self.slower else ""
        interval = f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.name:24} {self.seconds * 1e3:9.2f} ms  {interval} {mark}".rstrip()


def ratio(name: str, ours: Sequence[Sequence[float]], others: Sequence[Sequence[float]], metrics: int = 1) -> Ratio:
    """The ratio of paired seconds, (processes, pairs) on each side.

    metrics: how many are judged at once. Of two dozen 95 % intervals one is wrong on most days, so they share the 5 %.
    """
    ratios = np.log(np.asarray(ours) / np.asarray(others))
    processes, pairs = ratios.shape
    random = np.random.default_rng(0)
    chosen = random.integers(processes, size=(RESAMPLES, processes, 1))
    draws = ratios[chosen, random.integers(pairs, size=(RESAMPLES, processes, pairs))]
    low, high = np.exp(np.quantile(np.median(draws, axis=(1, 2)), (0.025 / metrics, 1 - 0.025 / metrics)))
    middle = float(np.exp(np.median(ratios)))
    return Ratio(name, middle, float(low), float(high), float(np.median(ours)), ratios.size)


def measure(ours: Path, other: Path, *, pairs: int = PAIRS, cases: Sequence[str] = CASES) -> list[Ratio]:
    """Ratios of every metric that both trees (roots of checkouts) have; `pairs` is rounded up for the processes."""
    sides: tuple[Seconds, Seconds] = ({}, {})
    for _ in range(PROCESSES):
        with _worker(ours) as first, _worker(other) as second:
            for case in cases:
                _rounds((first, second), case, -(-pairs // PROCESSES), sides)
    both = [name for name in sides[0] if name in sides[1]]
    return [ratio(name, sides[0][name], sides[1][name], len(both)) for name in both]


def _rounds(workers: "tuple[_Worker, _Worker]", case: str, pairs: int, sides: tuple[Seconds, Seconds]) -> None:
    """Runs a case once to warm up and `pairs` times on both sides, and adds a row of seconds to each metric."""
    found: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    for index in range(pairs + 1):
        for side in (0, 1) if index % 2 else (1, 0):
            for name, value in workers[side].ask(case).items():
                if index:
                    found[side].setdefault(name, []).append(value)
    for seconds, rows in zip(sides, found, strict=True):
        for name, row in rows.items():
            seconds.setdefault(name, []).append(row)


@dataclass(frozen=True, slots=True)
class _Worker:
    process: "subprocess.Popen[str]"

    def ask(self, case: str) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the measured process ended in case {case}, exit code {self.process.wait()}")
        return json.loads(answer)


@contextmanager
def _worker(tree: Path) -> Iterator[_Worker]:
    """A process that imports step1x from `tree`."""
    with TemporaryDirectory() as folder:
        # The root of a checkout is the namespace package: a link of that name is all it takes to import from it.
        (Path(folder) / "step1x").symlink_to(tree.resolve())
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": folder},  # nothing kept by an earlier process
        )
        try:
            yield _Worker(process)
        finally:
            process.kill()
            process.communicate()


def base(root: Path = ROOT) -> str:
    """What to compare a checkout with: where it left the main branch; on the main branch, the commit before.

    With uncommitted changes on the main branch it is the last commit. Raises InputError without a history.
    """
    try:
        head = git("rev-parse", "HEAD", root=root)
        for branch in MAIN_BRANCHES:
            try:
                left = git("merge-base", "HEAD", branch, root=root)
                break
            except subprocess.CalledProcessError:
                continue
        else:
            left = head
        if left != head or git("status", "--porcelain", "--untracked-files=no", root=root):
            return left
        return git("rev-parse", "HEAD~1", root=root)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"{root}: no revision to compare with (no git history here); name one") from error


@contextmanager
def checkout(revision: str, root: Path = ROOT) -> Iterator[Path]:
    """The tree of a revision in a folder of its own. Raises InputError for an unknown one."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        tree = Path(folder) / "tree"
        try:
            git("worktree", "add", "--detach", "--quiet", str(tree), revision, root=root)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(f"{root}: cannot check out revision {revision!r}") from error
        stack.callback(git, "worktree", "remove", "--force", str(tree), root=root)
        yield tree


def record(ratios: Sequence[Ratio], revision: str) -> Record:
    """The ratios as a record; the interval's ends are kept beside each."""
    metrics = {}
    for one in ratios:
        metrics[f"{one.name}.ratio"] = Metric(value=one.median, unit="", kind="info")
        metrics[f"{one.name}.ratio_low"] = Metric(value=one.low, unit="", kind="info")
        metrics[f"{one.name}.ratio_high"] = Metric(value=one.high, unit="", kind="info")
        metrics[f"{one.name}.seconds"] = Metric(value=one.seconds, unit="s", kind="info")
    pairs = str(ratios[0].pairs) if ratios else "0"
    return Record(
        suite="paired",
        place=place(),
        profile="cpu",
        size="128x128",
        metrics=metrics,
        notes={"against": revision, "pairs": pairs, "limit": str(LIMIT)},
    )
