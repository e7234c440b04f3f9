"""Writes the pytest-benchmark suite's figures as a record of ours; a cache folder of its own for every run."""

from contextlib import ExitStack

import pytest

from step1x.bench.own_cache import own_cache
from step1x.bench.record import Metric, Record, place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="Write the figures as a record (bench/record.py).")


def pytest_configure(config: pytest.Config) -> None:
    stack = ExitStack()
    stack.enter_context(own_cache())
    config.add_cleanup(stack.close)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--record")
    found = getattr(session.config, "_benchmarksession", None)
    if not path or found is None:
        return
    metrics = {}
    for one in found.benchmarks:
        name = f"{one.group}.{one.name.removeprefix('test_')}"
        metrics[name] = Metric(value=one.stats.median, unit="s", kind="stage")
    Record(suite="benchmarks", place=place(), profile="cpu", size="128x128", metrics=metrics).write(path)
