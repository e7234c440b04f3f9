"""Which device runs the kernels, whose launch settings it takes, and that the rest falls back to the reference."""

import itertools
import logging

import pytest
import torch
from torch import Tensor

from step1x.kernels import launch
from step1x.kernels.launch import CHIPS, OLDEST, Op, capability, define, nearest, runs_kernels

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
        runs_kernels.cache_clear()

    yield make
    runs_kernels.cache_clear()


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
        (logging.WARNING, "GPU 0 (sm_75) is older than sm_80: it uses the reference operations")
    ]


def test_without_triton_the_reference_is_taken(op, gpu, monkeypatch, caplog):
    gpu(90)
    monkeypatch.setattr(launch, "triton", None)
    assert on_cuda(op) == on_cuda(op) == REFERENCE
    assert [(one.levelno, one.getMessage()) for one in caplog.records] == [
        (logging.WARNING, "Triton is not installed: GPU 0 uses the reference operations, which are slower")
    ]
    assert launch.jit(reference) is reference


def test_an_op_is_registered_whole(op):
    torch.library.opcheck(op.call, (torch.randn(3, 5),))
    qualified = getattr(torch.ops.step1x, op.name)
    assert torch.equal(qualified(torch.ones(2)), torch.full((2,), 2.0))
    (arguments,) = op.examples(CPU, torch.float32)
    assert torch.equal(op.call(*arguments), op.reference(*arguments))
