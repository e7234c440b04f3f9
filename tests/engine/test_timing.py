import time

import pytest
import torch

from step1x.engine import timing
from step1x.engine.timing import Recorder

CPU = torch.device("cpu")


def test_stages_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    began: list[str] = []
    recorder = Recorder(CPU, began.append)
    for name in ("preprocess", "denoise", "preprocess"):
        with recorder.stage(name):
            if name == "denoise":
                recorder.step()
                ended = recorder.listening(None)
                ended(1, 2)
                ended(2, 2)
    assert began == ["preprocess", "denoise", "preprocess"]
    assert recorder.seconds == {"preprocess": 2.0, "denoise": 4.0}
    assert recorder.steps == [1.0, 1.0]


def test_a_stage_must_be_known() -> None:
    with pytest.raises(AssertionError, match="warmup"), Recorder(CPU).stage("warmup"):
        pass


def test_the_callback_still_hears_of_every_step() -> None:
    heard: list[tuple[int, int]] = []
    ended = Recorder(CPU).listening(lambda *step: heard.append(step))
    ended(1, 2)
    ended(2, 2)
    assert heard == [(1, 2), (2, 2)]


def test_a_step_costs_little_when_nobody_listens() -> None:
    """At most 20 microseconds; measured over the best of many rounds, for the machine may be busy."""
    best = 1.0
    for _ in range(200):
        ended = Recorder(CPU).listening(None)
        start = time.perf_counter()
        for step in range(28):
            ended(step, 28)
        best = min(best, (time.perf_counter() - start) / 28)
    assert best < 20e-6
