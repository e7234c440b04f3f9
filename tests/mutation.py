"""Breaks one line of the code at a time and sees whether the tests that should notice do.

    python tests/mutation.py                     all mutants of mutations.toml; exit 0 only if every one is killed
    python tests/mutation.py --sample 600        as many as fit in 600 seconds, others every day (or --seed)
    python tests/mutation.py --only 36 --only 44

A row of the table has a number, a file, a piece of its text that occurs once, what stands there instead, the tests that
must fail then, and why it matters. Each job works in a copy of the tree of its own, which subprocesses of tests import
too. The named tests are run on the unbroken code first: a test that fails anyway kills nothing.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent
TABLE, SERVER = (Path(__file__).resolve().with_name(name) for name in ("mutations.toml", "mutation_server.py"))
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
TIMEOUT = 300  # seconds; a mutant that makes a test wait for ever is killed
BATCH = 12  # mutants whose tests are run together on the unbroken code
PASSED, FAILED = 0, 1  # pytest's exit codes; all others say that a test could not run
FIRST_MTIME = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    """A row of the table."""

    number: int
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str

    def stale(self, root: Path) -> str:
        """What keeps the row from being tried in the tree at `root`; nothing if it can be."""
        path = root / self.file
        count = path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0
        if count != 1:
            return f"its text occurs {count} times in {self.file}"
        if self.old == self.new:
            return "it changes nothing"
        missing = [test for test in self.tests if not (root / test.partition("::")[0]).is_file()]
        return f"{missing[0]} is not there" if missing else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What came of a mutant. word: killed, survived, stale, or broken (a test could not run)."""

    mutant: Mutant
    word: str
    seconds: float = 0.0
    detail: str = ""

    @property
    def line(self) -> str:
        head = f"{self.mutant.number:4} {self.word:9} {self.seconds:6.1f} s  {self.mutant.file}: {self.mutant.why}"
        return f"{head}\n     {self.detail}" if self.detail else head


def table(path: Path = TABLE) -> list[Mutant]:
    """The rows, by number. Raises ValueError for two rows of one number."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    found = sorted((Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows), key=lambda one: one.number)
    numbers = [one.number for one in found]
    if len({*numbers}) != len(numbers):
        raise ValueError(f"{path}: a number is given twice")
    return found


class Copy:
    """A copy of the tree, in which one file at a time is broken."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        shutil.copytree(ROOT, self.root, ignore=LEFT_OUT, symlinks=True)
        packages = folder / "packages"
        packages.mkdir()
        (packages / "step1x").symlink_to(self.root)
        paths = [str(packages), os.environ.get("PYTHONPATH", "")]
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self._mtime = FIRST_MTIME
        self._check()
        self._printed = folder / "printed"
        self._server: subprocess.Popen[str] | None = None  # it takes seconds to start

    def _check(self) -> None:
        """Raises RuntimeError if the code that tests import is not the copy's."""
        said, _ = self._started("-c", "import step1x.engine; print(step1x.engine.__file__)").communicate()
        if not Path(said.strip()).resolve().is_relative_to(self.root.resolve()):
            raise RuntimeError(f"step1x is not imported from the copy but as {said.strip() or 'nothing'}")

    def close(self) -> None:
        """Ends the process that runs the tests."""
        if self._server is not None:
            self._server.communicate()

    def _started(self, *words: str) -> "subprocess.Popen[str]":
        """A Python process in the copy, which is asked on its standard input and answers on its output."""
        return subprocess.Popen(
            [sys.executable, "-P", *words],
            cwd=self.root,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pytest(self, tests: Sequence[str], *, stop: bool) -> tuple[int, str]:
        """Exit code and what was printed. A run that takes too long has failed."""
        options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", *(["-x"] if stop else [])]
        self._server = self._server or self._started(str(SERVER))
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([[*options, *tests], str(self._printed), TIMEOUT]) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError("the process that runs the tests has ended")
        return int(answer), self._printed.read_text(encoding="utf-8", errors="replace")

    def attempt(self, mutant: Mutant) -> Verdict:
        """Breaks the code, runs the tests, mends it."""
        if reason := mutant.stale(self.root):
            return Verdict(mutant=mutant, word="stale", detail=reason)
        path, start = self.root / mutant.file, time.monotonic()
        whole = path.read_text(encoding="utf-8")
        try:
            self._put(path, whole.replace(mutant.old, mutant.new))
            code, said = self.pytest(mutant.tests, stop=True)
        finally:
            self._put(path, whole)
        word = {PASSED: "survived", FAILED: "killed"}.get(code, "broken")
        detail = said.strip()[-1500:] if word == "broken" else ""
        return Verdict(mutant=mutant, word=word, seconds=time.monotonic() - start, detail=detail)

    def _put(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        self._mtime += 1  # compiled code is told by the whole second of its source's time
        os.utime(path, (self._mtime, self._mtime))


class Run:
    """The mutants of one call, until its time is up."""

    def __init__(self, seconds: float | None) -> None:
        self._start, self._seconds = time.monotonic(), seconds
        self._longest = {"clean": 0.0, "mutant": 0.0}  # seconds of a run
        self._printing = Lock()

    @property
    def spent(self) -> float:
        return time.monotonic() - self._start

    def _is_over(self, what: str) -> bool:
        """Whether another run would take too long."""
        return self._seconds is not None and self.spent + self._longest[what] > self._seconds

    def _took(self, what: str, seconds: float) -> None:
        self._longest[what] = max(self._longest[what], seconds)

    def tried(self, copy: Copy, mutants: Sequence[Mutant]) -> list[Verdict]:
        """The verdicts of a batch, or of as much of it as there is time for."""
        ready = [one for one in mutants if not one.stale(copy.root)]
        found = [copy.attempt(one) for one in mutants if one not in ready]
        start = time.monotonic()
        tests = sorted({test for one in ready for test in one.tests})
        if self._is_over("clean"):
            return found
        if tests:
            code, said = copy.pytest(tests, stop=False)
            if code != PASSED:
                raise RuntimeError(f"the tests fail on the code as it is:\n{said.strip()[-3000:]}")
            self._took("clean", time.monotonic() - start)
        for one in ready:
            if self._is_over("mutant"):
                break
            verdict = copy.attempt(one)
            self._took("mutant", verdict.seconds)
            found.append(verdict)
            with self._printing:
                print(verdict.line, flush=True)
        return found


@contextmanager
def copied(jobs: int) -> Iterator[list[Copy]]:
    """A copy of the tree for each job."""
    made: list[Copy] = []
    with tempfile.TemporaryDirectory(prefix="step1x-mutation-") as folder:
        try:
            for job in range(jobs):
                place = Path(folder, str(job))
                place.mkdir()
                made.append(Copy(place))
            yield made
        finally:
            for copy in made:
                copy.close()


def run(mutants: Sequence[Mutant], seconds: float | None, jobs: int) -> list[Verdict]:
    """Each job takes every n-th batch in a copy of its own."""
    going = Run(seconds)
    size = max(1, min(BATCH, -(-len(mutants) // jobs)))
    batches = [mutants[at : at + size] for at in range(0, len(mutants), size)]

    def work(index: int, copy: Copy) -> list[Verdict]:
        return list(chain.from_iterable(going.tried(copy, batch) for batch in batches[index::jobs]))

    with copied(jobs) as copies, ThreadPoolExecutor(jobs) as pool:
        return list(chain.from_iterable(pool.map(work, range(jobs), copies)))


def chosen(mutants: Sequence[Mutant], only: Sequence[int], seed: int | None) -> list[Mutant]:
    """Those that are asked for, in another order for each seed. Raises SystemExit for a number that is none."""
    if unknown := {*only} - {one.number for one in mutants}:
        raise SystemExit(f"no such mutant: {', '.join(map(str, sorted(unknown)))}")
    found = [one for one in mutants if not only or one.number in only]
    if seed is not None:
        random.Random(seed).shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=float, metavar="SECONDS", help="stop in time, and take others every day")
    parser.add_argument("--seed", type=int, help="of the sample (default: the number of the day)")
    parser.add_argument("--only", type=int, action="append", default=[], metavar="NUMBER", help="this one; repeatable")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="how many at once (default: 1)")
    wanted = parser.parse_args()
    if wanted.jobs < 1:
        parser.error("--jobs must be at least 1")
    seed = int(time.time() // 86400) if wanted.seed is None and wanted.sample is not None else wanted.seed
    mutants, start = chosen(table(), wanted.only, seed), time.monotonic()
    verdicts = run(mutants, wanted.sample, wanted.jobs)
    bad = [one for one in verdicts if one.word != "killed"]
    for one in sorted(bad, key=lambda verdict: verdict.mutant.number):
        print(f"NOT KILLED {one.line.lstrip()}")
    of = "" if seed is None else f", seed {seed}"
    killed = len(verdicts) - len(bad)
    print(f"{killed} of {len(verdicts)} killed in {time.monotonic() - start:.0f} s ({len(mutants)} chosen{of})")
    raise SystemExit(1 if bad or not verdicts else 0)


if __name__ == "__main__":
    main()
