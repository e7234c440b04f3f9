"""Is a kernel right on this device? Each is run on its own examples before it is first used there, and compared.

Kernels are proved as programs without a GPU (docs/kernels.md); a chip, driver or compiler never tried may still spoil
one. What is found is kept for each device, driver and set of versions, so that this takes its second or so once.
A kernel that is wrong or raises is not used: its reference runs.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import RLock
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from step1x.kernels.launch import Example, Op, assuming, capability, lacking, triton

log = logging.getLogger(__name__)

SECONDS = 0.5  # after which no further example is begun; one of each dtype is always run, however long it compiles
# Relative error of a row against the reference in the same dtype: sums in another order, and a last bit now and then.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float8_e4m3fn: 2**-4}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the kernel of an operation is used on a device, and if not, why."""

    op: str
    reason: str = ""

    @property
    def right(self) -> bool:
        return not self.reason


_lock = RLock()
_known: dict[tuple[str, str], Verdict] = {}  # (place, operation) -> what this process has found or read


def right(op: Op, device: torch.device, folder: Path | None) -> bool:
    """Whether the kernel of an op may run on a CUDA device. folder: see `verdict`."""
    return verdict(op, device, folder).right


def verdict(op: Op, device: torch.device, folder: Path | None) -> Verdict:
    """What is known of a kernel on a CUDA device, or found out now. folder: where that is kept; None: in memory alone.

    Nothing is run while a CUDA graph is captured or torch.compile traces; what is not known then counts as wrong.
    """
    why = lacking(device, op)
    if why or assuming():
        return Verdict(op.name, why)
    here = place(device)
    key = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:16], op.name
    with _lock:
        if key in _known:
            return _known[key]
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return Verdict(op.name, "it was not checked before")
        file = None if folder is None else folder / f"{key[0]}.json"
        kept = _read(file)
        if op.name not in kept:
            kept[op.name] = check(op, device)
            _write(file, here, kept)
        found = _known[key] = Verdict(op.name, kept[op.name])
        if not found.right:
            log.warning("kernel %s is not used on %s, its reference runs: %s", op.name, here["device"], found.reason)
        return found


def examine(device: torch.device, folder: Path | None) -> list[Verdict]:
    """The verdict on every operation of kernels/ and on merged attention on a CUDA device."""
    from step1x.kernels.aot import modules
    from step1x.kernels.attention_backends import merged_op

    return [verdict(op, device, folder) for op in (*(op for one in modules() for op in one.OPS), merged_op)]


def check(op: Op, device: torch.device) -> str:
    """Why the kernel of an op is wrong on a device; empty if it is right. Running out of memory is no verdict."""
    try:
        with torch.no_grad(), torch.random.fork_rng([] if device.type == "cpu" else [device]):
            torch.manual_seed(0)
            return next(filter(None, _faults(op, device)), "")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a launch may raise: the reference does without them
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _faults(op: Op, device: torch.device) -> Iterator[str]:
    """What is wrong with example after example, of each dtype in turn, until the time is over."""
    began = monotonic()
    for index, examples in enumerate(zip(*(op.examples(device, dtype) for dtype in op.dtypes), strict=True)):
        for dtype, arguments in zip(op.dtypes, examples, strict=True):
            if index and monotonic() - began > SECONDS:
                return
            yield fault(op, dtype, arguments)


def fault(op: Op, dtype: torch.dtype, arguments: Example) -> str:
    """How a kernel differs from its reference, which runs on the CPU, where it is proved; empty if it does not.

    Compared are the results and the arguments, since an op may write to some.
    """
    copies = [one.to("cpu", copy=True) if isinstance(one, Tensor) else one for one in arguments]
    results, expected = tensors(op.kernel(*arguments)), tensors(op.reference(*copies))
    for out, exact in zip((*results, *arguments), (*expected, *copies), strict=True):
        if not isinstance(out, Tensor):
            continue
        if (out.shape, out.dtype) != (exact.shape, exact.dtype):
            return f"{tuple(out.shape)} in {out.dtype}, expected {tuple(exact.shape)} in {exact.dtype}"
        bound = tolerance(op, dtype, out.dtype)
        error = worst_row(out.cpu(), exact)
        if not error <= bound:
            return f"relative error {error:.2g} in {dtype}, at most {bound:.2g} is right"
    return ""


def tolerance(op: Op, *dtypes: torch.dtype) -> float:
    """The relative error of a row that an op may have in results of these dtypes."""
    return max(op.tolerance, *(BOUND.get(dtype, 0.0) for dtype in dtypes))


def tensors(result: Any) -> tuple[Tensor, ...]:
    """The results of an op, which returns a tensor, a tuple of them or, if it writes to its arguments, None."""
    if result is None:
        return ()
    return result if isinstance(result, tuple) else (result,)


def relative_errors(out: Tensor, expected: Tensor, dim: int | None = None) -> Tensor:
    """‖out - expected‖ / ‖expected‖ in float64, over all or along one axis.

    0 where they agree, also if both are zero or the same infinity; NaN counts as infinite.
    """
    out, expected = out.double(), expected.double()
    error = (out - expected).masked_fill_(out == expected, 0).norm(dim=dim)
    relative = error / expected.masked_fill(expected.isinf(), 0).norm(dim=dim)
    return relative.nan_to_num(inf, posinf=inf).masked_fill(error == 0, 0)


def worst_row(out: Tensor, expected: Tensor) -> float:
    """The relative error of the worst row (last axis), so that large rows do not hide small ones."""
    return max(relative_errors(out, expected, -1).flatten().tolist(), default=0.0)


def place(device: torch.device) -> dict[str, str]:
    """All that a verdict holds for."""
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": str(capability(device)),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "engine": _engine(),
        "kernels": _sources(),
    }


def _driver() -> str:
    with suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    return f"of CUDA {torch.version.cuda}"


def _engine() -> str:
    try:
        return version("step1x-engine")
    except PackageNotFoundError:  # run from a checkout
        return "none"


@cache
def _sources() -> str:
    """A digest of all kernels: they share device functions."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _read(file: Path | None) -> dict[str, str]:
    """Operation -> reason, of what is kept in a file; nothing where there is none, or none that can be read."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # anything may stand in it
        kept = json.loads(file.read_bytes())["verdicts"] if file else {}
        return {str(name): str(reason) for name, reason in kept.items()}
    return {}


def _write(file: Path | None, here: dict[str, str], kept: dict[str, str]) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with NamedTemporaryFile("w", dir=file.parent, suffix=".json.part", delete=False) as part:
            json.dump({"place": here, "verdicts": kept}, part, indent=1)
        os.replace(part.name, file)
    except OSError as error:  # a full or read-only disk costs the next start a second, not this edit
        log.info("what was found about kernels is not kept: %s: %s", file.parent, error.strerror)
