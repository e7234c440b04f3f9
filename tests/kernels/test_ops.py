"""What holds for every operation of ours alike; what each of them computes is tested in a file of its own."""

import subprocess
import sys
from copy import deepcopy
from itertools import islice

import pytest
import torch
from torch import Tensor

from step1x.bench.battery_kernels import our_kernels, poisoned
from step1x.kernels.checks import tensors, tolerance, worst_row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPS = {op.name: op for op in our_kernels()}


@pytest.mark.parametrize("name", OPS)
def test_registration(name):
    for arguments in islice(OPS[name].examples(torch.device("cpu"), torch.float32), 2):
        torch.library.opcheck(OPS[name].call, arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_kernel_agrees_with_the_reference(name, dtype):
    """In every result and in every argument: both leave them as they were, or write the same to them."""
    torch.manual_seed(0)
    for arguments in OPS[name].examples(DEVICE, dtype):
        copies = deepcopy(arguments)  # with their strides
        with poisoned():
            results = tensors(OPS[name].kernel(*arguments))
        expected = tensors(OPS[name].reference(*copies))
        memory = {one.untyped_storage().data_ptr() for one in arguments if isinstance(one, Tensor) and one.numel()}
        assert not memory & {one.untyped_storage().data_ptr() for one in results}, "a result shares memory"
        for out, exact in zip((*results, *arguments), (*expected, *copies), strict=True):
            if not isinstance(out, Tensor):
                continue
            assert (out.shape, out.stride(), out.dtype) == (exact.shape, exact.stride(), exact.dtype)
            assert worst_row(out, exact) <= tolerance(OPS[name], dtype, out.dtype)


def test_without_triton():
    """On macOS there is none: every module can be imported, and the ops are their references."""
    code = """
import sys
sys.modules["triton"] = None
from itertools import islice
import torch
from step1x.kernels.aot import modules
for op in (op for module in modules() for op in module.OPS):
    for arguments in islice(op.examples(torch.device("cpu"), torch.float32), 2):
        torch.testing.assert_close(op.call(*arguments), op.reference(*arguments), rtol=0, atol=0)
    print(op.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(OPS)


def test_worst_row_sees_every_fault():
    expected = torch.tensor([[1e4, 1e4], [1e-4, 1e-4], [0, 0], [-torch.inf, 1]])
    assert worst_row(expected, expected) == worst_row(expected[:0], expected[:0]) == 0
    faults = ((0, 1, 1.1e4), (1, 0, 2e-4), (2, 1, 1e-9), (1, 1, torch.nan), (0, 0, torch.inf), (3, 0, 1), (3, 1, 1.1))
    for row, column, value in faults:
        out = expected.clone()
        out[row, column] = value
        assert worst_row(out, expected) > 0.05, (row, column, value)
