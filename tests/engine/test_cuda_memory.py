"""Memory of a card that is not there: the cap, pinned stretches, streams that wait, and what running out leads to."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from step1x.bench.cards import CARDS
from step1x.bench.counters import photograph
from step1x.bench.fake_cuda import FakeCuda
from step1x.bench.fake_streams import FakeStream
from step1x.engine import Engine
from step1x.engine import pipeline as pipelines
from step1x.engine.errors import InputError
from step1x.engine.loading import checked_device
from step1x.engine.planner import CONTEXT_BYTES
from step1x.engine.residency import PAGE, Packed, Stream, limit, pinned

PLACE = torch.device("cuda", 0)


@pytest.fixture
def machine() -> Iterator[FakeCuda]:
    with FakeCuda(CARDS["RTX 4090"], CARDS["H100"]) as made:
        yield made


def edited(engine: Engine, **options: object) -> tuple[bytes, str]:
    given = {"size": 96, "seed": 1, "steps": 2, "guidance": 2.0} | options
    made = engine.edit(photograph(96, 80), "make it black and white", **given)
    return made.image.tobytes(), str(made.metadata.get("out_of_memory", ""))


# The device and the cap.


def test_a_device_gets_the_index_of_the_current_one(machine: FakeCuda) -> None:
    assert checked_device("cuda") == PLACE
    with torch.cuda.device(1):
        assert checked_device("cuda") == torch.device("cuda", 1)
    assert checked_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(("budget", "index"), [(18, 0), (24, 0), (0, 0), (24, 1), (1, 0)])
def test_the_cap_is_the_budget_less_the_context(machine: FakeCuda, budget: float, index: int) -> None:
    limit(budget, torch.device("cuda", index))
    [call] = machine.named("set_per_process_memory_fraction")
    total = machine.cards[index].total_memory
    assert call.device == f"cuda:{index}"
    assert call.about * total == pytest.approx(max(budget * 1e9 - CONTEXT_BYTES, 0) if budget else total)


def test_nothing_is_capped_elsewhere(machine: FakeCuda) -> None:
    limit(24, torch.device("cpu"))
    assert not machine.calls


# Pinned memory.


@pytest.mark.parametrize("size", [1, 300, PAGE, PAGE + 1, 1 << 20])
def test_pinned_stretches_share_no_page(machine: FakeCuda, size: int) -> None:
    held = [pinned(size) for _ in range(20)]
    assert all(one.numel() == size and one.data_ptr() % PAGE == 0 for one in held)
    assert [call.about for call in machine.named("host_register")] == [(-(-size // PAGE) * PAGE, 0)] * 20
    assert len(machine.memory.registered) == 20
    view = held[0].view(torch.uint8)[:1]
    held.clear()
    assert len(machine.memory.registered) == 1, "what is still seen stays registered"
    del view
    assert not machine.memory.registered
    assert pinned(0).numel() == 0


def test_what_cuda_will_not_register_serves_unpinned(
    machine: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine.memory, "register", lambda *_: 2)
    with caplog.at_level(logging.WARNING):
        block = nn.Linear(4, 4)
        before = block.weight.clone()
        Packed(block)
    assert torch.equal(block.weight, before)
    assert "not pinned" in caplog.text
    there = torch.ones(2, device=PLACE)
    assert (there + there).tolist() == [2.0, 2.0], "no launch is told of the refusal"
    assert not machine.memory.registered


# Streams.


class Adds(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((300,), number), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def streamed(passes: int = 2) -> list[float]:
    """Sums of blocks that come one after the other."""
    blocks = [Adds(float(10**index)) for index in range(5)]
    stream, found = Stream(blocks, PLACE, around=True), []
    with stream.running():
        for _ in range(passes):
            x = torch.zeros(300, device=PLACE)
            for block in blocks:
                with stream.present(block):
                    x = block(x)
            found.append(float(x.max()))
    return found


def test_a_copy_waits_for_its_place_and_a_block_for_its_copy(machine: FakeCuda) -> None:
    """The copy stream waits for what ran in the place, copies, marks it; the block's stream waits for that mark."""
    assert streamed() == [11111.0] * 2
    names = ("wait_event", "copy_to_device", "record_event", "wait_stream")
    calls = [call for call in machine.named(*names) if call.stream or call.what == "wait_event"]
    copying = next(call.stream for call in calls if call.what == "copy_to_device")
    own = [call.what for call in calls if call.stream == copying]
    assert own == ["wait_event", "copy_to_device", "record_event"] * (len(own) // 3)
    assert len(own) // 3 == 5 * 2 + 1, "a copy for each block and pass, and the first of a next pass"
    arrived = [call.about for call in calls if call.stream == copying and call.what == "record_event"]
    assert [call.about for call in calls if call.stream != copying and call.what == "wait_event"] == arrived[:-1]


@pytest.mark.parametrize(("name", "copying"), [("wait_event", True), ("wait_event", False), ("wait_stream", False)])
def test_a_wait_left_out_is_seen(name: str, copying: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that do not wait for their place, blocks for their copies, or the end for the last copy."""
    wait = getattr(FakeStream, name)

    def deaf(self: FakeStream, other: object) -> None:
        if bool(self.number) != copying:
            wait(self, other)

    monkeypatch.setattr(FakeStream, name, deaf)
    with pytest.raises(RuntimeError, match=r"may still be using|given back while stream"), FakeCuda(CARDS["L4"]):
        streamed()


# Running out.


def ladder(machine: FakeCuda, engine: Engine, monkeypatch: pytest.MonkeyPatch, often: int, **options: object) -> str:
    """The easings taken when the first `often` tries run out."""
    sample, tries = Engine._sample, 0

    def fails(self: Engine, *given: object) -> object:
        nonlocal tries
        tries += 1
        if tries <= often:
            machine.memory.fail_at(3)
        return sample(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "_sample", fails)
    return edited(engine, **options)[1]


def test_easings_are_taken_in_turn(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(profile="bf16-24gb", compiled=True, cache=False)
    taken = ladder(machine, engine, monkeypatch, 3, branches="batched")
    assert taken == "autoencoder in strips, steps without CUDA graphs, guidance one by one"
    assert machine.named("empty_cache")
    assert not [call for call in machine.named("capture_begin")]


def test_a_bare_engine_has_its_own_turns(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(profile="bf16-80gb", cache=False)
    taken = ladder(machine, engine, monkeypatch, 5, speed="fast", steps=8, branches="batched")
    assert taken.split(", ") == [
        "autoencoder in strips",
        "text model evicted",
        "keys and values in 8 bits",
        "guidance one by one",
        "blocks streamed",
    ]


def test_when_nothing_helps_it_is_one_line(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(profile="bf16-80gb", cache=False)
    with pytest.raises(InputError, match=r"out of GPU memory at 96 x \d+, also after: .*; take a smaller size"):
        ladder(machine, engine, monkeypatch, 99)


@pytest.mark.parametrize("at", [1, 100, 400])
def test_loading_that_runs_out_proposes_what_fits(machine: FakeCuda, at: int) -> None:
    machine.memory.fail_at(at)
    with pytest.raises(
        InputError, match=r"^out of GPU memory while loading .* bf16-80gb on cuda:0; --profile \S+ fits"
    ):
        Engine.load(profile="bf16-80gb", cache=False)
    assert torch.cuda.memory_allocated(0) == 0, "what was loaded is given back"
    assert edited(Engine.load(profile="bf16-80gb", cache=False))[1] == ""


def test_a_card_that_is_full_by_the_cap(machine: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap, not an injected failure: fewer bytes than the weights take."""
    monkeypatch.setattr(pipelines, "limit", lambda *_: torch.cuda.set_per_process_memory_fraction(1e-4, 0))
    with pytest.raises(InputError, match="out of GPU memory while loading"):
        Engine.load(profile="bf16-80gb", cache=False)


@pytest.mark.parametrize("at", [5, 60, 300, 900])
def test_running_out_anywhere_in_an_edit_is_eased(machine: FakeCuda, at: int) -> None:
    """The n-th allocation of an edit fails: a picture comes of it, and the first easing is said."""
    engine = Engine.load(profile="bf16-80gb", cache=False)
    machine.memory.fail_at(at)
    assert edited(engine)[1] == "autoencoder in strips"
    assert len(machine.named("out_of_memory")) == 1
