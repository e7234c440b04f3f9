"""The CUDA machine that is not there: it refuses what CUDA refuses, and says in which order it was asked."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from step1x.bench.cards import CARDS
from step1x.bench.fake_cuda import FakeCuda
from step1x.bench.fake_memory import ALREADY_REGISTERED, NOT_REGISTERED, PAGE
from step1x.bench.fake_streams import Race
from step1x.kernels.cfg_step import cfg_step_op

H100, L4 = CARDS["H100"], CARDS["L4"]
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def test_a_device_is_the_current_one_or_has_an_index() -> None:
    with FakeCuda(H100, L4):
        assert torch.empty(1, device="cuda").device == FIRST
        assert torch.zeros(2).cuda(1).device == SECOND
        with torch.cuda.device(1):
            assert torch.empty(1, device="cuda").device == SECOND
            assert torch.cuda.get_device_name() == L4.name
        assert torch.cuda.get_device_properties(SECOND).total_memory == L4.total_memory
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.empty(1, device="cuda:2")
        with pytest.raises(ValueError, match="specified index"):
            torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))
        with pytest.raises(RuntimeError, match="operands on"):
            torch.zeros(2, device=FIRST) + torch.zeros(2, device=SECOND)
    assert not torch.cuda.is_available()


def test_threads_begin_on_the_first_device() -> None:
    seen: list[int] = []
    with FakeCuda(H100, L4), torch.cuda.device(1):
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
        assert (seen, torch.cuda.current_device()) == ([0], 1)


def test_host_memory_is_registered_by_whole_pages_and_once() -> None:
    with FakeCuda(H100) as machine:
        register, unregister = torch.cuda.cudart().cudaHostRegister, torch.cuda.cudart().cudaHostUnregister
        assert register(PAGE + 8, 16, 0) == 0
        assert register(PAGE + 64, 16, 0) == ALREADY_REGISTERED, "other bytes of one page"
        assert register(2 * PAGE, 16, 0) == 0
        assert (unregister(PAGE + 8), unregister(PAGE + 8)) == (0, NOT_REGISTERED)
        with pytest.raises(RuntimeError, match="712"):
            torch.cuda.check_error(ALREADY_REGISTERED)
        register(2 * PAGE, 16, 0)
        there = torch.ones(1, device=FIRST)
        with pytest.raises(RuntimeError, match="712 of an earlier call"):
            there + 1
        assert (there + 1).tolist() == [2.0], "one launch is told, no other"
    assert [call.about[1] for call in machine.named("host_register")] == [0, ALREADY_REGISTERED, 0, ALREADY_REGISTERED]


def test_memory_is_counted_capped_and_given_back() -> None:
    with FakeCuda(H100) as machine:
        kept = torch.zeros(1000, device=FIRST)
        made = kept + 1
        del made
        assert torch.cuda.memory_allocated(FIRST) == 4000
        assert torch.cuda.max_memory_allocated(FIRST) == 8000
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(FIRST)
        assert torch.cuda.max_memory_reserved(FIRST) == 4000
        torch.cuda.set_per_process_memory_fraction(6000 / H100.total_memory, FIRST)
        with pytest.raises(torch.OutOfMemoryError):
            kept + 1
        torch.cuda.set_per_process_memory_fraction(1.0, FIRST)
        machine.memory.fail_at(2)
        fine = kept + 1
        with pytest.raises(torch.OutOfMemoryError):
            fine + 1
        assert (fine + 1)[0] == 2, "one fails, no other"


def test_a_kernel_is_launched_on_its_own_device() -> None:
    with FakeCuda(H100, L4) as machine:
        there, velocities = torch.zeros(1, 2, 4, device=SECOND), torch.ones(2, 2, 4, device=SECOND)
        given = (there, velocities, 2.0, 0.1, False, "pure")
        with pytest.raises(RuntimeError, match="while device 0 is current"):
            cfg_step_op.call(*given)
        with torch.cuda.device(1):
            assert cfg_step_op.call(*given).device == SECOND
    assert [(call.device, call.about) for call in machine.named("launch")] == [("cuda:1", "cfg_step")]


def copies(wait: bool) -> float:
    """A copy on a stream of its own, and its result read on the current one."""
    place, host = torch.zeros(4, device=FIRST), torch.ones(4)
    stream = torch.cuda.Stream(FIRST)
    stream.wait_stream(torch.cuda.current_stream(FIRST))
    with torch.cuda.stream(stream):
        place.copy_(host, non_blocking=True)
    if wait:
        torch.cuda.current_stream(FIRST).wait_event(stream.record_event())
    return float(place.sum())


def test_streams_that_nothing_puts_in_order_are_refused() -> None:
    with FakeCuda(H100):
        assert copies(wait=True) == 4
    with pytest.raises(Race, match="reads what stream"), FakeCuda(H100):
        copies(wait=False)


def test_memory_given_back_while_another_stream_uses_it_is_a_fault() -> None:
    def use(machine: FakeCuda) -> None:
        with machine:
            place, stream = torch.zeros(4, device=FIRST), torch.cuda.Stream(FIRST)
            stream.wait_stream(torch.cuda.current_stream(FIRST))
            with torch.cuda.stream(stream):
                place.copy_(torch.ones(4), non_blocking=True)
            del place

    with pytest.raises(RuntimeError, match="given back while stream"):
        use(FakeCuda(H100))


def captured(
    run: Callable[[Tensor], Tensor], given: Tensor, mode: str = "thread_local"
) -> tuple[Tensor, torch.cuda.CUDAGraph]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        out = run(given)
    return out, graph


def test_a_replay_runs_the_operators_again_where_they_were() -> None:
    def run(x: Tensor) -> Tensor:
        halves = (2 * x).view(2, 2)
        halves[0].add_(torch.ones(2, device=FIRST))
        return halves.sum(0)

    with FakeCuda(H100):
        given = torch.arange(4.0, device=FIRST)
        out, graph = captured(run, given)
        assert out.tolist() == [5.0, 9.0]
        first = out.clone()
        given.copy_(torch.ones(4))
        graph.replay()
        assert out.tolist() == [5.0, 5.0]
        assert first.tolist() == [5.0, 9.0]


@pytest.mark.parametrize(
    "act", [lambda x: x.tolist(), lambda x: x.copy_(torch.ones(4)), lambda x: torch.cuda.synchronize()]
)
def test_what_a_capture_refuses(act: Callable[[Tensor], object]) -> None:
    with FakeCuda(H100):
        given = torch.zeros(4, device=FIRST)
        before = torch.cuda.current_stream()
        with pytest.raises(RuntimeError, match="previous error during capture"):
            captured(lambda x: (act(x), x)[1], given)
        assert torch.cuda.current_stream() != before, "as torch leaves it"


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_other_threads_reserve_during_a_capture(mode: str) -> None:
    found: list[object] = []

    def reserve() -> None:
        try:
            found.append(torch.zeros(4, device=FIRST).device)
        except RuntimeError as error:
            found.append(error)

    def run(x: Tensor) -> Tensor:
        thread = threading.Thread(target=reserve)
        thread.start()
        thread.join()
        return x + 1

    with FakeCuda(H100):
        captured(run, torch.zeros(4, device=FIRST), mode)
    assert isinstance(found[0], RuntimeError) if mode == "global" else found == [FIRST]


def test_products_that_cuda_has_not_got() -> None:
    with FakeCuda(H100):
        few, weight = torch.zeros(16, 32, dtype=torch.int8), torch.zeros(8, 32, dtype=torch.int8)
        with pytest.raises(RuntimeError, match="_int_mm"):
            torch._int_mm(few.to(FIRST), weight.to(FIRST).t())
        rows = torch.zeros(17, 32).to(torch.float8_e4m3fn).to(FIRST)
        scales, others = torch.ones(17, 1, device=FIRST), torch.ones(1, 16, device=FIRST)
        matrix = torch.zeros(16, 32).to(torch.float8_e4m3fn).to(FIRST).t()
        assert torch._scaled_mm(rows, matrix, scales, others, out_dtype=torch.bfloat16).shape == (17, 16)
        with pytest.raises(RuntimeError, match="bfloat16 results only"):
            torch._scaled_mm(rows, matrix, scales, others, out_dtype=torch.float32)
