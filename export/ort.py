"""Runs the ONNX graphs of an engine folder with onnxruntime: torch tensors in and out, in the memory they lie in."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from step1x.engine.errors import InputError
from step1x.export.core import ENTRIES, Entry, Inputs, RowsInputs, RowsOutputs
from step1x.export.onnx import AXES, INSTALL, SUFFIX, externals, read

BFLOAT16 = 16  # as ONNX numbers types
WHERE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+ ")  # in messages: of no use to who reads


class OrtRunner:
    """The entries of an engine folder that were exported to ONNX, as functions of tensors on one device."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu", which: Sequence[Entry] = ENTRIES) -> None:
        """Opens the graphs of `which` that are there, with as many threads as torch has.

        Raises InputError, one line: onnxruntime is not installed or has no provider for the device, a graph or the
        weights that it points to are missing or damaged, or it needs what this onnxruntime does not have.
        """
        self.device = torch.device(device)
        self.entries = tuple(entry for entry in which if (folder / f"{entry}{SUFFIX}").exists())
        if not self.entries:
            raise InputError(f"{folder}: holds no ONNX graph of {', '.join(which)}; build it with --backend onnx")
        self._sessions = {entry: opened(folder / f"{entry}{SUFFIX}", self.device) for entry in self.entries}

    def step(self, inputs: Inputs) -> Tensor:
        """Velocity (B, N, C)."""
        return self._run("step", inputs._asdict())[0]

    def rows(self, inputs: RowsInputs) -> RowsOutputs:
        """The velocity of some rows, and the caches as they are then."""
        return RowsOutputs(*self._run("rows", inputs._asdict()))

    def encode(self, pixels: Tensor) -> Tensor:
        """Moments (B, 2 z, H / 8, W / 8) of pixels (B, 3, H, W)."""
        return self._run("encoder", {"pixels": pixels})[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, 8 h, 8 w) of latents (B, z, h, w)."""
        return self._run("decoder", {"latents": latents})[0]

    def _run(self, entry: Entry, given: dict[str, Tensor]) -> list[Tensor]:
        if entry not in self._sessions:
            raise InputError(f"{entry} was not exported to ONNX; there are {', '.join(self.entries)}")
        ort, session = needed(), self._sessions[entry]
        held = {name: tensor.detach().to(self.device).contiguous() for name, tensor in given.items()}
        values = {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in held.items()}
        try:
            out = session.run_with_ort_values([name for name in AXES[entry] if name not in given], values)
        except Exception as error:  # onnxruntime's errors have no base of their own
            raise InputError(f"{entry}{SUFFIX}: onnxruntime failed: {said(error)}") from None
        return [from_dlpack(value) for value in out]


def needed() -> Any:
    """onnxruntime. Raises InputError if it is not there."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError(INSTALL) from None
    return onnxruntime


def opened(path: Path, device: torch.device) -> Any:
    """A session of a graph."""
    ort = needed()
    model = read(path)
    if device.type == "cpu" and model.graph.input[0].type.tensor_type.elem_type == BFLOAT16:
        raise InputError(
            f"{path}: onnxruntime has no bfloat16 products on a CPU; build with dtype float32, or use another backend"
        )
    check_weights(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    # Else rows that the graph quantises are left as they are: an optimisation that changes results.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    where = provider(ort, device)
    try:
        return ort.InferenceSession(path, options, providers=[where])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise InputError(
            f"{path}: onnxruntime {ort.__version__} cannot open it: {said(error)}; build the engine again, or use "
            "another backend"
        ) from None


def provider(ort: Any, device: torch.device) -> Any:
    """Where the session runs. Raises InputError if this onnxruntime does not run there."""
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type)
    if name not in ort.get_available_providers():
        have = "onnxruntime-gpu runs on CUDA" if device.type == "cuda" else "there are cpu and cuda"
        raise InputError(f"this onnxruntime {ort.__version__} does not run on {device}; {have}")
    return (name, {"device_id": device.index or 0}) if device.type == "cuda" else name


def check_weights(path: Path) -> None:
    """Raises InputError if a file that the graph points into is not there or too short."""
    ends: dict[str, int] = {}
    for one in externals(path):
        ends[one.file] = max(ends.get(one.file, 0), one.offset + one.length)
    for file, end in ends.items():
        weights = path.parent / file
        if not weights.is_file():
            raise InputError(f"{path}: needs {file} beside it, which is not there; build the engine again")
        if weights.stat().st_size < end:
            raise InputError(f"{path}: needs {end:,} bytes of {file}, which is shorter; build the engine again")


def said(error: Exception) -> str:
    """The first line of a message of onnxruntime's."""
    return WHERE.sub("", str(error).strip().splitlines()[0])
