"""CUDA graphs on a machine that is not there: what is captured, what a replay reads, and what a failure leaves."""

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from PIL import Image
from torch import Tensor

from step1x.bench.cards import CARDS
from step1x.bench.counters import photograph
from step1x.bench.fake_cuda import FakeCuda
from step1x.engine import Engine
from step1x.engine.dit import DiT, Rope, Step
from step1x.engine.executor import (
    GRAPHS,
    Execution,
    Graphs,
    Replay,
    ReplayRows,
    assembled,
    captures,
    leaves,
    ran_out,
    stepper,
)
from step1x.engine.fused import Fused
from step1x.engine.kept import Active, Kept
from step1x.engine.request import Defaults
from step1x.engine.residency import Stream, dit_blocks
from step1x.engine.weights import load
from step1x.profiles import load_profile

COUNT = 6  # image rows of `step_arguments` that are kept
PLACE = torch.device("cuda", 0)
Arguments = Callable[..., tuple[Tensor, Step, Rope]]
There = tuple[DiT, tuple[Tensor, Step, Rope]]


@pytest.fixture
def machine() -> Iterator[FakeCuda]:
    with FakeCuda(CARDS["H100"]) as made:
        yield made


@pytest.fixture
def there(machine: FakeCuda, small_dit: Callable[..., DiT], step_arguments: Arguments) -> There:
    """A transformer on the card, and a step of it."""
    dit = small_dit(dtype=torch.float32)
    given = step_arguments(dit)
    return dit.to(PLACE), assembled([one.to(PLACE) for one in leaves(*given)], given[1])


def moved(given: tuple[Tensor, Step, Rope], by: float) -> tuple[Tensor, Step, Rope]:
    return assembled([one + by for one in leaves(*given)], given[1])


def test_a_replay_gives_what_the_step_gives_and_keeps_it(machine: FakeCuda, there: There) -> None:
    dit, given = there
    run, other = Replay(Fused(dit).velocity), moved(given, 0.1)
    outs = [run(*given, COUNT), run(*other, COUNT), run(*given, COUNT)]
    wanted = [Fused(dit).velocity(*one, COUNT) for one in (given, other)]
    assert torch.equal(outs[0], wanted[0]), "not overwritten by the replays after it"
    assert torch.equal(outs[1], wanted[1])
    assert torch.equal(outs[2], wanted[0])
    assert [call.what for call in machine.named("capture_begin", "replay")] == ["capture_begin", *["replay"] * 3]


def test_each_shape_and_each_stretch_of_biased_keys_has_a_graph_of_its_own(machine: FakeCuda, there: There) -> None:
    dit, (tokens, step, rope) = there
    bare = Step(step.text, step.mods, None, None)
    steps = [Step(step.text, step.mods, step.bias, 5), Step(step.text, step.mods, step.bias, 2), bare]
    run = Replay(Fused(dit).velocity)
    for _ in range(2):
        for one in steps:
            run(tokens, one, rope, COUNT)
        run(tokens, bare, rope, None)
    assert len(machine.named("capture_begin")) == 4
    assert len(machine.named("replay")) == 8


def test_all_graphs_share_one_pool_and_captures_mind_their_own_thread(machine: FakeCuda, there: There) -> None:
    dit, given = there
    run = Replay(Fused(dit).velocity)
    for kept in (None, *range(1, GRAPHS + 2)):
        run(*given, kept)
    pools, modes = zip(*(call.about for call in machine.named("capture_begin")), strict=True)
    assert len(pools) == GRAPHS + 2
    assert len({*map(id, pools)}) == 1
    assert {*modes} == {"thread_local"}
    assert len(run._captured) == GRAPHS, "the oldest are given back"


def test_two_devices_capture_in_one_process(small_dit: Callable[..., DiT], step_arguments: Arguments) -> None:
    """The stream that torch captures on by itself is of the device that captured first."""
    with FakeCuda(CARDS["H100"], CARDS["H100"]) as machine:
        for index in range(2):
            dit, place = small_dit(dtype=torch.float32), torch.device("cuda", index)
            given = step_arguments(dit)
            there = assembled([one.to(place) for one in leaves(*given)], given[1])
            dit.to(place)
            with torch.cuda.device(place):
                made = Replay(Fused(dit).velocity)(*there, COUNT)
                assert torch.equal(made, Fused(dit).velocity(*there, COUNT))
                assert torch.cuda.current_device() == index
    assert [call.device for call in machine.named("replay")] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("at", [1, 40])
def test_running_out_in_a_capture_is_running_out(machine: FakeCuda, there: There, at: int) -> None:
    """Also where torch reports it as an error of the capture; what was current before is current again."""
    dit, given = there
    run, before = Replay(Fused(dit).velocity), torch.cuda.current_stream()
    calls = 0

    def fails(*arguments: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # behind two runs that warm up
            machine.memory.fail_at(at)
        return Fused(dit).velocity(*arguments)  # type: ignore[arg-type]

    run._run = fails  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError, match="while a step was captured"):
        run(*given, COUNT)
    assert torch.cuda.current_stream() == before
    assert not run._captured
    assert torch.equal(run(*given, COUNT), Fused(dit).velocity(*given, COUNT))


def test_other_errors_of_a_capture_stay_what_they_are(machine: FakeCuda, there: There) -> None:
    _, given = there
    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        Graphs().capture(lambda tokens, *_: tokens.tolist(), leaves(*given), given[1])
    assert not ran_out(caught.value)


def test_steps_are_captured_where_weights_stay(machine: FakeCuda, there: There) -> None:
    dit, given = there
    compiled = Execution(compiled=True)
    assert captures(dit, compiled)
    assert not captures(dit, Execution())
    stepper(dit, compiled).velocity(*given, COUNT)
    assert machine.named("capture_begin")
    machine.calls.clear()
    wanted = stepper(dit, compiled, graphs=False).velocity(*given, COUNT)
    assert not machine.named("capture_begin")
    stream = Stream(dit_blocks(dit)[:2], PLACE, around=True)
    dit.present = stream.present
    assert not captures(dit, compiled)
    with stream.running():
        made = stepper(dit, compiled).velocity(*given, COUNT)
    assert not machine.named("capture_begin")
    assert torch.equal(made, wanted)


def edited(engine: Engine, moved: int = 0, **options: object) -> tuple[bytes, str]:
    shown = photograph(96, 80, moved)
    given = {"size": 96, "seed": 1, "steps": 3, "guidance": 2.0} | options
    made = engine.edit(shown, "make it black and white", **given)
    return made.image.tobytes(), str(made.metadata.get("out_of_memory", ""))


def test_an_edit_by_graphs_is_the_edit_without(machine: FakeCuda) -> None:
    engine = Engine.load(profile="bf16-80gb", compiled=True)
    made = [edited(engine), edited(engine)]
    assert machine.named("replay")
    engine._runner = stepper(engine.dit, engine._execution, graphs=False)
    replayed = len(machine.named("replay"))
    assert made == [edited(engine)] * 2
    assert len(machine.named("replay")) == replayed


def test_a_kind_of_regional_step_runs_once_before_it_is_captured(machine: FakeCuda, there: There) -> None:
    """What compiles and reserves must not meet a capture; another request's keys and values begin anew."""
    dit, (tokens, step, rope) = there
    capturing: list[bool] = []

    def run(tokens: Tensor, *_: object) -> Tensor:
        capturing.append(torch.cuda.is_current_stream_capturing())
        return tokens + 1

    rows = ReplayRows(run, Graphs())
    for _ in range(2):
        active = Active.all(Kept(dit, len(tokens), 17), step.text.shape[1])
        for _ in range(4):
            assert torch.equal(rows(tokens, step, rope, None, active), tokens + 1)
    assert capturing == [False, True] * 2
    assert len(machine.named("replay")) == 6


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8"])
def test_regional_steps_are_captured_for_their_request(machine: FakeCuda, kv_dtype: str) -> None:
    """Each kind of step is captured when it comes again, and its graph dies with the request's keys and values."""
    profile = load_profile("bf16-80gb").changed({"kv_dtype": kv_dtype, "compiled": True})
    engine = Engine(
        load(None, device="cuda:0", dtype=torch.bfloat16), Execution.of(profile), defaults=Defaults.of(profile)
    )
    mask = Image.new("L", (96, 80))
    mask.paste(255, (0, 0, 48, 40))
    options = {"speed": "fast", "mask": mask, "steps": 16}
    made = edited(engine, **options)
    captured, replayed = len(machine.named("capture_begin")), len(machine.named("replay"))
    assert captured >= 2
    assert replayed > 2 * captured
    rows = engine._runner.rows
    assert isinstance(rows, ReplayRows)
    gc.collect()
    assert not rows._met
    held = torch.cuda.memory_allocated(0)
    assert edited(engine, **options) == made
    gc.collect()
    assert torch.cuda.memory_allocated(0) == held
    engine._runner = stepper(engine.dit, engine._execution, graphs=False)
    assert edited(engine, **options) == made


def test_references_do_not_wait_in_a_capture(machine: FakeCuda) -> None:
    """Without kernels of ours, regional steps are captured as well: no reference looks at a number."""
    engine = Engine.load(profile="bf16-80gb", compiled=True, kernels="off", cache=False)
    mask = Image.new("L", (96, 80))
    mask.paste(255, (0, 0, 48, 40))
    edited(engine, speed="fast", mask=mask, steps=16)
    assert len(machine.named("replay")) > 2 * len(machine.named("capture_begin")) > 2


def test_an_edit_whose_capture_runs_out_goes_on_without_graphs(machine: FakeCuda) -> None:
    engine = Engine.load(profile="bf16-80gb", compiled=True)
    engine.vae.strip_pixels = 0
    expected, _ = edited(engine)
    engine._runner = stepper(engine.dit, engine._execution)
    begin = torch.cuda.graph

    def short(*given: object, **words: object) -> object:
        machine.memory.fail_at(5)
        return begin(*given, **words)  # type: ignore[arg-type]

    torch.cuda.graph = short  # type: ignore[assignment, misc]
    try:
        made, eased = edited(engine)
    finally:
        torch.cuda.graph = begin  # type: ignore[misc]
    assert made == expected
    assert eased == "steps without CUDA graphs"
    assert edited(engine) == (expected, ""), "and stays so"


def test_threads_edit_while_one_captures(machine: FakeCuda) -> None:
    engine = Engine.load(profile="bf16-80gb", compiled=True)
    expected = [edited(Engine.load(profile="bf16-80gb", compiled=True), moved) for moved in range(3)]
    found: dict[int, tuple[bytes, str]] = {}
    threads = [threading.Thread(target=lambda m=m: found.update({m: edited(engine, m)})) for m in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[moved] for moved in range(3)] == expected
