"""Edits on CUDA machines that are not there (bench/fake_cuda.py): every profile, from loading to the saved picture."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from step1x.bench.cards import CARDS
from step1x.bench.counters import photograph
from step1x.bench.fake_cuda import Call, FakeCuda
from step1x.engine import Engine
from step1x.engine.planner import CONTEXT_BYTES
from step1x.profiles import load_profile, profile_names

WORDS = "make it black and white"
# A card that a profile is for.
PLACES = {
    "bf16-80gb": "H100",
    "fp8-80gb": "H200",
    "bf16-24gb": "RTX A6000",
    "fp8-24gb": "RTX 4090",
    "fp8-18gb": "RTX 5090",
    "int8-24gb": "RTX 3090",
    "int4-12gb": "RTX 4080",
}


def edited(engine: Engine, moved: int = 0, **options: object) -> np.ndarray:
    made = engine.edit(
        photograph(96, 80, moved), WORDS, **{"size": 96, "seed": 1, "steps": 2, "guidance": 2.0} | options
    )
    return np.asarray(made.image, dtype=np.float64)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((one - other) ** 2).mean(), 1e-9)))


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """By float32 on the CPU."""
    return edited(Engine.load(profile="cpu"))


def order(calls: list[Call]) -> list[str]:
    """What was asked for, each the first time."""
    return list(dict.fromkeys(call.what for call in calls))


def test_every_profile_has_its_card() -> None:
    assert {*PLACES, "cpu"} == {*profile_names()}


@pytest.mark.parametrize("name", PLACES)
def test_an_edit_with_each_profile(name: str, expected: np.ndarray, tmp_path: Path) -> None:
    """The picture, and what the driver was asked for, in order."""
    profile, target = load_profile(name), tmp_path / "made.png"
    with FakeCuda(CARDS[PLACES[name]]) as machine:
        engine = Engine.load(profile=name)
        assert engine.device == torch.device("cuda:0")
        loaded = len(machine.calls)
        made = engine.edit(photograph(96, 80), WORDS, size=96, seed=1, steps=2, guidance=2.0)
        made.save(target)
    with Image.open(target) as image:
        assert decibels(np.asarray(image, dtype=np.float64), expected) > 30
    assert "out_of_memory" not in made.metadata
    # The cap stands before anything is copied, and leaves the context its share.
    [cap] = machine.named("set_per_process_memory_fraction")
    assert order(machine.calls)[0] == cap.what
    total = CARDS[PLACES[name]].total_memory
    assert cap.about == pytest.approx(min(1.0, (profile.budget_gb * 1e9 - CONTEXT_BYTES) / total))
    # What stays on the host is pinned once, when it is loaded, and comes when it is its turn.
    away = profile.residency != type(profile.residency)()
    assert bool(machine.named("host_register")) == away
    assert all(call.about[1] == 0 for call in machine.named("host_register"))
    assert not [call for call in machine.calls[loaded:] if call.what == "host_register"]
    streams = "stream" in (profile.residency.text, profile.residency.vision, profile.residency.dit)
    assert ("stream_create" in order(machine.calls)) == streams == ("wait_event" in order(machine.calls))
    eight_bit = {"fp8": "_scaled_mm", "int8": "_int_mm"}.get(profile.weights.dit)
    assert {call.about for call in machine.named("product")} == ({eight_bit} if eight_bit else set())
    last = [call.what for call in machine.calls if call.what != "record_event"][-2:]
    assert last == ["copy_to_host", "synchronize"], "the picture comes last"


def test_the_processor_profile_asks_no_driver(expected: np.ndarray) -> None:
    with FakeCuda(CARDS["H100"]) as machine:
        made = edited(Engine.load(profile="cpu"))
    assert machine.calls == []
    assert np.array_equal(made, expected)


@pytest.mark.parametrize("options", [{}, {"compiled": True}])
def test_another_card_than_the_first(options: dict[str, object]) -> None:
    """Streams, events, captures and launches are the second card's, also from threads, which begin on the first."""
    with FakeCuda(CARDS["RTX 4090"], CARDS["H100"]) as machine:
        engine = Engine.load(profile="bf16-80gb", device="cuda:1", kernels="on", **options)
        thread = threading.Thread(target=lambda: edited(engine))
        thread.start()
        thread.join()
        made = edited(engine)
        assert torch.cuda.memory_allocated(0) == 0
    assert {call.device for call in machine.calls} == {"cuda:1"}
    assert machine.named("launch")
    with FakeCuda(CARDS["H100"]):
        assert np.array_equal(made, edited(Engine.load(profile="bf16-80gb", kernels="on", **options)))


def test_a_kernel_that_is_wrong_on_a_card_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """The edit goes on with its reference: the same picture, since here all kernels are their references."""
    wrong = ("qk_norm_rope", "attention_merged")
    made = []
    for planted in ((), wrong):
        with FakeCuda(CARDS["H100"], wrong=planted) as machine:
            made.append(edited(Engine.load(profile="bf16-80gb")))
        ran = {call.about for call in machine.named("launch")}
        assert "adaln" in ran
        assert ("qk_norm_rope" in ran, bool(machine.named("attention"))) == (not planted, not planted)
        assert len(machine.named("check")) == len({call.about for call in machine.named("check")}), "once each"
    assert decibels(*made) > 40
    said = [message for message in caplog.messages if "not used" in message]
    assert [name for name in wrong for message in said if f"kernel {name} " in message] == list(wrong)


def test_a_card_that_is_not_there_is_said() -> None:
    from step1x.engine.errors import InputError

    with FakeCuda(CARDS["H100"]), pytest.raises(InputError, match=r"device 'cuda:3' cannot be used here: .*ordinal"):
        Engine.load(profile="bf16-80gb", device="cuda:3")


def test_speeds_and_masks_run_there() -> None:
    with FakeCuda(CARDS["H100"]):
        engine = Engine.load(profile="bf16-80gb")
        mask = Image.new("L", (96, 80))
        mask.paste(255, (0, 0, 48, 40))
        for speed in ("balanced", "fast", "turbo"):
            made = edited(engine, steps=8, speed=speed, mask=mask)
            assert np.array_equal(made[40:, 48:], np.asarray(photograph(96, 80), dtype=np.float64)[40:, 48:])


def test_threads_share_an_engine_that_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of three threads are those of one after the other, whatever waits for whatever."""

    def run(start: Callable[[Callable[[], None]], None]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        with FakeCuda(CARDS["RTX 3090"]):
            engine = Engine.load(profile="bf16-24gb")
            for moved in range(3):
                start(lambda moved=moved: found.update({moved: edited(engine, moved).tobytes()}))  # type: ignore[misc]
            for thread in threads:
                thread.join()
        return found

    threads: list[threading.Thread] = []

    def begin(work: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=work))
        threads[-1].start()

    together = run(begin)
    threads.clear()
    assert together == run(lambda work: work())
    assert len(together) == 3
