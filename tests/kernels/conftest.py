"""Mends Triton's interpreter (3.6 to 3.8) where it computes other numbers than a GPU and does not say so.

It multiplies the raw bits of bfloat16 operands, in `tl.dot` and in plain arithmetic, which is refused here since our
kernels compute in float32; it truncates to bfloat16 instead of rounding; and some casts to fp8 are wrong. What it says
and a GPU does not, numpy's warnings of infinities, is silenced.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from step1x.kernels.launch import Compilation, tl, triton

TORCH_TYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """Bits of `values`, given as bits of `source`, in `target`: to nearest even; fp8 saturates as `cvt.satfinite`."""
    if rounding is not None and rounding.name != "RTNE":
        raise NotImplementedError(f"the tests' interpreter rounds to nearest even, not {rounding.name}")
    given = torch.frombuffer(bytearray(values.tobytes()), dtype=TORCH_TYPES[source.name])
    wanted = TORCH_TYPES[target.name]
    if wanted.itemsize == 1:
        limit = torch.finfo(wanted).max
        given = given.float().clamp(-limit, limit)
    bits = given.to(wanted).view(torch.uint8).numpy().view(f"uint{8 * wanted.itemsize}")
    return bits.reshape(values.shape)


def float_operand(operand: Any) -> Any:
    """bfloat16 as float32, which holds every product exactly; other types as they are."""
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = convert_float(operand.data, tl.bfloat16, tl.float32, None)
    return type(operand)(bits.view(np.float32), tl.float32)


@pytest.fixture(scope="session", autouse=True)
def right_interpreter() -> Iterator[None]:
    if triton is None or not triton.knobs.runtime.interpret:
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, binary, launch = builder.create_dot, builder.binary_op, interpreter.GridExecutor.__call__

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, float_operand(a), float_operand(b), *rest)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            raise NotImplementedError("the interpreter has no bfloat16 arithmetic: compute in float32")
        return binary(self, a, b, op)

    def silent_launch(self: Any, *arguments: Any, **constants: Any) -> None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of arrays of one number, where a loop has a bound
            launch(self, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patch:  # it raises AttributeError where Triton has renamed one of them
        patch.setattr(interpreter, "_convert_float", convert_float)
        patch.setattr(builder, "create_dot", create_dot)
        patch.setattr(builder, "binary_op", binary_op)
        patch.setattr(interpreter.GridExecutor, "__call__", silent_launch)
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN; random numbers are the same each time."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(8).isnan().all()
    assert torch.ones(1).new_empty(8, dtype=torch.float8_e4m3fn).float().isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def unspecialised(kernel: Any) -> set[str]:
    """Arguments of a kernel, interpreted or not, whose values make no difference to what is compiled."""
    return {*((kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize) or ())}


class Launched:
    """What launches ask for: (signature, constants, warps) each."""

    NAMES: ClassVar = {
        torch.bfloat16: "*bf16",
        torch.float32: "*fp32",
        torch.float8_e4m3fn: "*fp8e4nv",
        torch.int64: "*i64",
        int: "i32",
        float: "fp32",
    }

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, str], dict[str, Any], int]] = []

    def record(self, kernel: Any, *given: Any, grid: Any, warmup: bool, num_warps: int, **constants: Any) -> None:
        arguments = dict(zip(kernel.arg_names, given, strict=False))
        for name in set(arguments) - unspecialised(kernel):
            number = arguments[name]
            number = number.data_ptr() if isinstance(number, torch.Tensor) else number
            assert not isinstance(number, int) or number % 16 == 0, f"{kernel.__name__} is compiled anew for {name}"
        for option in ("num_stages", "enable_fp_fusion"):
            constants.pop(option, None)
        constants |= {name: None for name, value in arguments.items() if value is None}
        signature = {
            name: self.NAMES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
            for name, value in arguments.items()
            if value is not None
        }
        self.seen.append((signature, constants, num_warps))

    def described(self, compilations: Iterable[Compilation]) -> list[tuple[dict[str, str], dict[str, Any], int]]:
        """The same of what is compiled ahead of time, where every integer is aligned or makes no difference."""
        compiled = list(compilations)
        for one in compiled:
            integers = {name for name, kind in one.signature.items() if kind == "i32"}
            assert integers <= one.aligned | unspecialised(one.kernel)
        return [(dict(one.signature), dict(one.constants), one.num_warps) for one in compiled]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Launched]:
    """Launches of a kernel are recorded instead of run."""

    def start(kernel: Any) -> Launched:
        launched = Launched()
        monkeypatch.setattr(type(kernel), "run", lambda *given, **words: launched.record(*given, **words))
        return launched

    return start
