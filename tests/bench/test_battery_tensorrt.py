"""What of the battery's part about TensorRT runs without a GPU; engines themselves are built by its smoke run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from step1x.bench import battery_tensorrt
from step1x.bench.battery import Run
from step1x.bench.battery_tensorrt import TARGETS, blocks, compare, step_of, targets_of, tensorrt
from step1x.engine.dit import Modulations, Step
from step1x.engine.errors import InputError
from step1x.engine.executor import Execution, stepper
from step1x.engine.image import Canvas
from step1x.export.core import Inputs
from step1x.export.tensorrt_library import Library

CPU = torch.device("cpu")


def test_an_engines_step_is_compared_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(CPU, smoke=True)
    model = blocks(run, "plain")
    assert (len(model.double_blocks), len(model.single_blocks)) == (1, 1)
    given, exact = step_of(model, Canvas(64, 64)), stepper(model, Execution(kernels="off"))
    assert given[0].shape == (2, 32, model.config.in_channels)
    assert given[3] == 16
    monkeypatch.setattr(battery_tensorrt, "stepper", lambda *_: exact)  # nothing is compiled here

    def step(inputs: Inputs) -> Tensor:
        mods = [inputs.image_mods.split(1, 1), inputs.text_mods.split(1, 1), inputs.single_mods.split(1, 1)]
        vectors = Modulations(list(zip(*mods[:2], strict=True)), list(mods[2]), inputs.final_mods[:, None])
        tokens = torch.cat((inputs.target, inputs.reference), 1)
        return 1.5 * exact.velocity(tokens, Step(inputs.text, vectors, inputs.bias, None), inputs[7:9], 16)

    with torch.no_grad():
        compare(run, "engine", SimpleNamespace(step=step), (model, exact), given)
    assert run.metrics["engine.error"].value == pytest.approx(0.5, rel=1e-4)
    assert run.metrics["engine.seconds"].unit == "s"
    assert run.metrics["engine.of_compiled"].value > 0


def test_targets_are_the_gpus_own_or_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(library: Library, target: str) -> Any:
        if target == "sm_90":
            raise InputError("not for sm_90")

    monkeypatch.setattr(Library, "target", target)
    run = Run(torch.device("cuda"), smoke=False)
    for own, wanted in (("sm_89", {"sm_89"}), ("sm_90", {*TARGETS})):
        monkeypatch.setattr(battery_tensorrt, "architecture", lambda device, own=own: own)
        assert targets_of(run) == wanted
    assert run.notes == {"tensorrt": "not for sm_90"}


def test_without_a_library_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "installed", property(lambda library: False))
    run = Run(CPU, smoke=True)
    tensorrt(run)
    assert not run.metrics
    assert run.notes["tensorrt"].startswith("not measured: neither TensorRT nor TensorRT-RTX is installed")
