"""Results of 8-bit arithmetic that are none are seen, and made again without it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from step1x.bench.counters import photograph
from step1x.engine import Edit, Engine
from step1x.engine.health import first_lost, is_flat
from step1x.engine.weights import load
from step1x.quant import linear
from step1x.quant.linear import quantise_layers

STEPS = 3
PER_STEP = 33  # 8-bit products of a step of the bundled checkpoint


def edited(scheme: str | None) -> Edit:
    loaded = load(None, device="cpu", dtype=torch.float32)
    if scheme:
        quantise_layers(loaded.dit, "dit", scheme)
    return Engine(loaded).edit(photograph(), "make it black and white", size=96, seed=1, steps=STEPS)


def psnr(a: Edit, b: Edit) -> float:
    error = np.square(np.asarray(a.image, np.float64) - np.asarray(b.image, np.float64)).mean()
    return 10 * math.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize("lost", range(STEPS))
def test_steps_from_a_number_out_of_range_on_are_run_again(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    product, calls = linear.fp8_product, 0

    def failing(*given: object) -> Tensor:
        nonlocal calls
        calls += 1
        out = product(*given)
        return out * math.inf if calls == 1 + lost * PER_STEP else out

    monkeypatch.setattr(linear, "fp8_product", failing)
    found = edited("fp8")
    assert found.metadata["rerun"] == f"steps {lost + 1} to 3 without 8-bit arithmetic: it made a number out of range"
    assert psnr(found, edited(None)) > 35


def test_a_picture_of_one_colour_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    product, calls = linear.int8_product, 0

    def failing(*given: object) -> Tensor:
        nonlocal calls
        calls += 1
        return product(*given)

    monkeypatch.setattr(linear, "int8_product", failing)
    monkeypatch.setitem(Engine.edit.__globals__, "is_flat", lambda pixels: True)
    found = edited("int8")
    assert found.metadata["rerun"] == "steps 1 to 3 without 8-bit arithmetic: it made a picture of one colour"
    assert calls == STEPS * PER_STEP


def test_good_results_and_weights_alone_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rerun" not in edited("int8").metadata
    monkeypatch.setitem(Engine.edit.__globals__, "is_flat", lambda pixels: True)
    assert "rerun" not in edited("int8-weight").metadata
    assert "rerun" not in edited(None).metadata


def test_what_is_lost_and_what_is_flat() -> None:
    whole = torch.randn(2, 3)
    assert first_lost([whole, whole]) is None
    assert first_lost([whole, whole / 0, whole * math.nan]) == 1
    picture = torch.rand(2, 3, 4, 4)
    assert not is_flat(picture)
    picture[1] = torch.tensor([0.1, 0.5, -1.0])[:, None, None]
    assert is_flat(picture)
    picture[1, 2, 3, 3] = -0.9
    assert not is_flat(picture)


@pytest.mark.parametrize(("steps", "flat"), [(1.9, True), (2.1, False)])
def test_a_picture_is_flat_below_two_steps_of_a_byte(steps: float, flat: bool) -> None:
    picture = torch.zeros(1, 3, 2, 2)
    picture[0, 1, 0, 1] = steps / 255
    assert is_flat(picture) is flat
