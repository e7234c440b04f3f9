"""Variables that are read when things are imported; which tests run, and on how many processes."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Nothing of the user's is read or written: caches live in a folder of this run.
_caches = tempfile.TemporaryDirectory(prefix="step1x-tests-")
os.environ["XDG_CACHE_HOME"] = _caches.name
os.environ["HF_HOME"] = os.path.join(_caches.name, "huggingface")
os.environ["TRITON_CACHE_DIR"] = os.path.join(_caches.name, "triton")
# The small matrices of most tests are slower on several threads; the cores get a process each instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

GOLDEN_RATIO = 0.6180339887
# Files with the marker `dependencies`: they touch transformers, Pillow, click, the Hub or Triton's compiler.
DEPENDENCIES = frozenset(
    (
        "bench/test_formula.py",
        "bench/test_measure.py",
        "bench/test_own_cache.py",
        "engine/test_cli.py",
        "engine/test_folder.py",
        "engine/test_image.py",
        "engine/test_named_profile.py",
        "engine/test_options.py",
        "engine/test_picture.py",
        "engine/test_picture_saving.py",
        "engine/test_pixels.py",
        "engine/test_plan_commands.py",
        "engine/test_planner.py",
        "engine/test_prefix.py",
        "engine/test_progress.py",
        "engine/test_qwen.py",
        "engine/test_text.py",
        "engine/test_text_ids.py",
        "engine/test_tokens.py",
        "engine/test_vision_size.py",
        "kernels/test_aot.py",
        "kernels/test_ops.py",
        "training/test_pictures.py",
        "training/test_tiny.py",
        "training/test_tokenizer.py",
        "test_continuous.py",
    )
)


def pytest_addoption(parser: pytest.Parser) -> None:
    help_ = "Begin no test after so many seconds, and begin at another one with each commit."
    parser.addoption("--sample", type=float, metavar="SECONDS", help=help_)


@pytest.hookimpl(tryfirst=True)  # before xdist reads them
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A process for each core if whole folders are run, one process for single files and tests; -n says otherwise."""
    option = config.option
    folders = any(Path(name).is_dir() for name in config.args)
    inside = "PYTEST_XDIST_WORKER" in os.environ
    if (
        not inside
        and getattr(option, "numprocesses", 0) is None
        and folders
        and not (option.usepdb or option.collectonly)
    ):
        option.numprocesses, option.dist = "auto", "worksteal"


@pytest.hookimpl(wrapper=True)  # around -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Marks DEPENDENCIES; leaves long proofs out unless -m or a test's own name asks for them; --sample's order."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.path.relative_to(here).as_posix() in DEPENDENCIES:
            item.add_marker("dependencies")
    yield
    named = any("::" in name for name in config.args)
    if not config.option.markexpr and not named:
        long = [item for item in items if item.get_closest_marker("long")]
        if long:
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if not item.get_closest_marker("long")]
    if config.getoption("--sample") is not None and items:
        start = first_of_sample(len(items), commits())
        items[:] = items[start:] + items[:start]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BEGAN] = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--sample")
    if seconds is not None and time.monotonic() - item.config.stash[_BEGAN] > seconds:
        pytest.skip(f"the {seconds:g} s of --sample are over; another commit's sample begins here")


_BEGAN = pytest.StashKey[float]()


def commits() -> int:
    """How many commits led here; days since 1970 where git cannot tell (a shallow clone has one)."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-list", "--count", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    count = int(done.stdout) if done.returncode == 0 else 1
    return count if count > 1 else int(time.time() // 86400)


def first_of_sample(tests: int, commit: int) -> int:
    """Index of the first test: consecutive commits begin far apart, and many of them everywhere equally often."""
    return int(commit * GOLDEN_RATIO % 1 * tests)
