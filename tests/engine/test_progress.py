"""Ctrl-C while something is running."""

import contextlib
import signal

import pytest

from step1x.engine.progress import Progress


@pytest.fixture(autouse=True)
def _as_in_a_terminal():
    """Background jobs of a shell ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("go_on", [lambda progress: progress.stage("denoise"), lambda progress: progress.step(1, 2)])
def test_an_interrupt_that_was_swallowed_comes_again(go_on):
    with Progress(None) as progress:
        with contextlib.suppress(KeyboardInterrupt):  # as some libraries do
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            go_on(progress)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_one_nothing_happens():
    before = signal.getsignal(signal.SIGINT)
    with Progress(None) as progress:
        progress.stage("load")
        progress.step(1, 2)
    assert signal.getsignal(signal.SIGINT) is before
