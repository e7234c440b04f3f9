"""Which device runs the kernels, whose launch settings it takes, and that the rest falls back to the reference."""

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from step1x.kernels import launch
from step1x.kernels.launch import (
    CHIPS,
    OLDEST,
    Op,
    adjacent,
    assumed,
    assuming,
    by_default,
    capability,
    define,
    lacking,
    nearest,
)

CPU = torch.device("cpu")
numbers = itertools.count()


REFERENCE, KERNEL = [2.0, 2.0], [3.0, 3.0]  # of ones


def reference(x: Tensor) -> Tensor:
    return x * 2


def kernel(x: Tensor) -> Tensor:
    return x * 3  # another answer, so that a test sees which one ran


@pytest.fixture
def op() -> Op:
    return define(f"test_launch_{next(numbers)}", reference, kernel, torch.empty_like, lambda *_: [(torch.ones(2),)])


@pytest.fixture
def gpu(monkeypatch):
    """Makes device 0 a GPU of a compute capability."""

    def make(found: int) -> None:
        monkeypatch.setattr(launch, "capability", lambda _: found)

    launch._say_once.cache_clear()
    yield make
    launch._say_once.cache_clear()


def test_nearest_is_not_newer():
    assert [nearest(chip) for chip in CHIPS] == list(CHIPS)
    assert [nearest(chip) for chip in (86, 87, 103, 110, 121, 200)] == [80, 80, 100, 100, 120, 120]
    assert nearest(0) == nearest(75) == OLDEST


def test_chips():
    assert min(CHIPS) == OLDEST
    assert {chip: limits.shared_bytes // 1024 for chip, limits in CHIPS.items()} == {
        80: 163,
        89: 99,
        90: 227,
        100: 227,
        120: 99,
    }
    assert [chip for chip, limits in CHIPS.items() if not limits.fp8] == [80]


def test_capability(monkeypatch):
    assert capability(CPU) == capability(torch.device("meta")) == 0
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 1))
    assert capability(torch.device("cuda", 0)) == 121


def on_cuda(op: Op) -> list[float]:
    """What the CUDA implementation of the op makes of ones; it gets a CPU tensor, which stands for device 0."""
    return op.call._backend_fns["cuda"](torch.ones(2)).tolist()


def test_the_kernel_is_for_new_gpus(op, gpu, caplog):
    assert op.call(torch.ones(2)).tolist() == REFERENCE, "on the CPU"
    for chip in (*CHIPS, 121):
        gpu(chip)
        assert on_cuda(op) == KERNEL, chip
    assert not caplog.records


def test_an_old_gpu_takes_the_reference_and_says_so_once(op, gpu, caplog):
    gpu(75)
    assert on_cuda(op) == on_cuda(op) == REFERENCE
    assert [(one.levelno, one.getMessage()) for one in caplog.records] == [
        (logging.WARNING, "GPU 0 uses the reference operations, which are slower: sm_75 is older than sm_80")
    ]


def test_without_triton_the_reference_is_taken(op, gpu, monkeypatch, caplog):
    gpu(90)
    monkeypatch.setattr(launch, "triton", None)
    assert on_cuda(op) == on_cuda(op) == REFERENCE
    assert [(one.levelno, one.getMessage()) for one in caplog.records] == [
        (logging.WARNING, "GPU 0 uses the reference operations, which are slower: Triton is not installed")
    ]
    assert launch.jit(reference) is reference


def test_kernels_are_on_by_default_but_for_the_exceptions(op, gpu, monkeypatch):
    assert launch.EXCEPTIONS == {}, "none was measured"
    assert not by_default(op, CPU)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "EXCEPTIONS", {80: frozenset({op.name}), 90: frozenset({"another"})})
    found = {}
    for chip in (70, 75, 80, 86, 89, 90, 100, 120):
        gpu(chip)
        found[chip] = by_default(op, device)
    assert found == {70: False, 75: False, 80: False, 86: False, 89: True, 90: True, 100: True, 120: True}


def test_fp8_needs_a_chip_that_has_it(gpu):
    fp8 = define(f"test_launch_{next(numbers)}", reference, kernel, torch.empty_like, lambda *_: [], fp8=True)
    for chip, runs in ((80, False), (86, False), (89, True), (120, True)):
        gpu(chip)
        assert on_cuda(fp8) == (KERNEL if runs else REFERENCE), chip
        assert lacking(torch.device("cuda", 0), fp8) == ("" if runs else f"sm_{chip} has no e4m3")


def test_a_chip_can_be_assumed(monkeypatch, op):
    monkeypatch.setattr(launch, "triton", None)
    device = torch.device("cuda", 0)
    with assumed(90):
        assert (capability(device), capability(CPU), assuming()) == (90, 0, True)
        assert by_default(op, device)
        with assumed(75):
            assert not by_default(op, device)
    assert not assuming()


def strided(*strides: int, first: int = 0, width: int = 32) -> Tensor:
    return torch.zeros(4096).as_strided((2, 3, width), strides, first)


@pytest.mark.parametrize(
    ("x", "kept"),
    [
        (strided(160, 48, 1), True),
        (strided(0, 48, 1), True),
        (strided(160, 48, 1, first=4), True),
        (strided(160, 48, 1, first=1), False),
        (strided(160, 40, 1), False),
        (strided(1, 48, 1), False),
        (strided(160, 2, 2), False),
        (strided(161, 49, 1, first=1, width=31), True),
        (strided(161, 2, 2, width=31), False),
    ],
)
def test_what_a_kernel_reads_is_aligned(x: Tensor, kept: bool) -> None:
    """Rows of a model's widths; others are never aligned, and are read as they lie."""
    found: Any = adjacent(x)
    assert (found is x) == kept
    assert torch.equal(found, x)
    assert found.stride(-1) == 1
    if x.shape[-1] % 16 == 0:
        assert all(number % 16 == 0 for number in (found.data_ptr(), *found.stride()[:-1]))


def test_an_op_is_registered_whole(op):
    torch.library.opcheck(op.call, (torch.randn(3, 5),))
    qualified = getattr(torch.ops.step1x, op.name)
    assert torch.equal(qualified(torch.ones(2)), torch.full((2,), 2.0))
    (arguments,) = op.examples(CPU, torch.float32)
    assert torch.equal(op.call(*arguments), op.reference(*arguments))
