"""Runs pytest in forks of a process that has loaded the libraries once: most of a short test is their import.

Reads a line of JSON for each run from standard input: pytest's arguments, the file for what is printed, and the seconds
that it may take. Answers with the exit code; a run that takes longer is killed and has failed.
"""

import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress

# None of the tree under test, and nothing that reads variables which conftest.py sets (triton).
LIBRARIES = ("pytest", "numpy", "PIL.Image", "torch", "safetensors.torch", "click.testing", "pydantic")
POLL_SECONDS = 0.05
FAILED = 1


def work(arguments: list[str], output: str) -> int:
    """In the fork."""
    import pytest

    os.setsid()  # so that what a test has started can be killed with it
    printed, nothing = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(source, target)
    return int(pytest.main(arguments))


def waited(child: int, seconds: float) -> int:
    """The exit code of a fork; below 0: the signal that ended it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return FAILED


def main() -> None:
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    while line := sys.stdin.readline():
        arguments, output, seconds = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.exit(work(arguments, output))
        print(waited(child, seconds), flush=True)


if __name__ == "__main__":
    main()
