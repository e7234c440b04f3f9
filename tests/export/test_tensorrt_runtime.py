"""The runner of TensorRT engines, against a library that checks how it is called and computes on the CPU."""

import ctypes
import threading
from contextlib import contextmanager, nullcontext
from enum import Enum
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from step1x.engine.errors import InputError
from step1x.export import tensorrt_runtime
from step1x.export.core import Inputs, RowsInputs
from step1x.export.tensorrt_library import TENSORRT_RTX, Library
from step1x.export.tensorrt_runtime import Plan, TensorRT, keep, ordered, stream_of

STREAM = 7
ORDERED = threading.local()  # active: what a thread runs is in order with torch's stream
CPU = torch.device("cpu")
Mode = Enum("Mode", ["INPUT", "OUTPUT"])
Type = Enum("Type", ["FLOAT", "BF16"])
Validity = Enum("Validity", ["VALID", "INVALID"])
# What the engines take, by name: dtype, and shapes for each of two profiles.
SHAPES = {
    "tokens": (Type.BF16, [((1, 0, 4), (2, 8, 4), (2, 48, 4)), ((1, 4, 4), (2, 64, 4), (2, 128, 4))]),
    "bias": (Type.FLOAT, [((1, 1), (2, 4), (2, 8))] * 2),
}


def memory(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor at an address."""
    size = prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


class FakeContext:
    """velocity = tokens + the sum of bias; every call is checked to come when the libraries allow it."""

    def __init__(self, engine: "FakeEngine", config: Any) -> None:
        assert config.strategy == "user managed"
        self.engine, self.config, self.thread = engine, config, threading.get_ident()
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.place = (0, 0)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile, self.shapes = profile, {}  # shapes are to be set again
        self.engine.calls.append(f"profile {profile}")
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, _, largest = SHAPES[name][1][self.profile]
        self.shapes[name], self.place = shape, (0, 0)
        return all(low <= size <= high for low, size, high in zip(least, shape, largest, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in SHAPES if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "velocity"
        assert not self.infer_shapes()
        return self.shapes["tokens"]

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes()
        return 1024 * prod(self.shapes["tokens"])

    def set_device_memory(self, address: int, size: int) -> None:
        assert size == self.update_device_memory_size_for_shapes()
        self.place = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % tensorrt_runtime.ALIGNMENT == 0
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert threading.get_ident() == self.thread
        assert ORDERED.active
        assert self.addresses.keys() == {*SHAPES, "velocity"}
        address, size = self.place
        assert address
        memory(address, (size,), torch.uint8).fill_(255)  # whatever else lies there is lost
        if self.engine.failing:
            self.engine.logger.log(SimpleNamespace(name="ERROR"), "out of luck In enqueue at /_src/a.cpp:1")
            return False
        tokens = memory(self.addresses["tokens"], self.shapes["tokens"], torch.bfloat16)
        bias = memory(self.addresses["bias"], self.shapes["bias"], torch.float32)
        out = memory(self.addresses["velocity"], self.shapes["tokens"], torch.bfloat16)
        out.copy_(tokens + bias.sum().to(torch.bfloat16))
        self.engine.calls.append(f"run {self.shapes['tokens']}")
        return True


class FakeConfig:
    strategy = ""
    cuda_graph_strategy = "off"
    cache: "FakeCache | None" = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "FakeCache":
        return FakeCache()

    def set_runtime_cache(self, cache: "FakeCache") -> None:
        self.cache = cache


class FakeCache:
    content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = content
        return True

    def serialize(self) -> bytes:
        return self.content + b"+"


class FakeEngine:
    num_io_tensors = 3
    num_optimization_profiles = 2
    weight_streaming_budget_v2 = -1
    failing = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.calls: list[str] = []
        self.contexts: list[FakeContext] = []
        self.budget_of_contexts: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return ["velocity", *SHAPES][index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in SHAPES else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Type:
        return SHAPES[name][0] if name in SHAPES else Type.BF16

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return SHAPES[name][1][profile]

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(self, config: FakeConfig) -> FakeContext:
        self.budget_of_contexts.append(self.weight_streaming_budget_v2)
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]


class Diagnostics:
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER, OLD_CUDA_RUNTIME = 1, 2, 4, 8
    INSUFFICIENT_GPU_MEMORY, MALFORMED_ENGINE, CUDA_ERROR = 16, 32, 64


class FakeLibrary(Library):
    """TensorRT-RTX, whose plans are the word `plan`, or a diagnosis."""

    def load(self) -> Any:
        class ILogger:
            pass

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def get_engine_validity(self, data: Any) -> tuple[Validity, int]:
                word = bytes(data)
                if word.isdigit():
                    return Validity.INVALID, int(word)
                return Validity.VALID, 0

            def deserialize_cuda_engine(self, data: Any) -> FakeEngine | None:
                if bytes(data) == b"plan":
                    return FakeEngine(self.logger)
                self.logger.log(SimpleNamespace(name="ERROR"), "Serialization failed.\nIn load at /_src/r.cpp:48")
                return None

        return SimpleNamespace(
            __version__="1.7",
            ILogger=ILogger,
            Runtime=Runtime,
            EngineInvalidityDiagnostics=Diagnostics,
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
            CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        )


FAKE = FakeLibrary("TensorRT-RTX", ("fake",), "tensorrt-rtx", timed=False)


@pytest.fixture
def plan_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan, on a machine that takes the CPU for its GPU."""

    @contextmanager
    def ordered(stream: Any, device: torch.device) -> Any:
        ORDERED.active = True
        yield
        ORDERED.active = False

    monkeypatch.setattr(tensorrt_runtime, "check_device", lambda device, path: None)
    monkeypatch.setattr(tensorrt_runtime, "on", lambda device: nullcontext())
    monkeypatch.setattr(tensorrt_runtime, "stream_of", lambda device, own: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(tensorrt_runtime, "ordered", ordered)
    monkeypatch.setattr(tensorrt_runtime, "ALIGNMENT", 64)  # as torch lays tensors on a CPU
    path = tmp_path / "step.engine"
    path.write_bytes(b"plan")
    return path


def given(rows: int, batch: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {"tokens": torch.randn(batch, rows, 4, generator=generator).to(dtype), "bias": torch.arange(6.0).view(2, 3)}


def check(out: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    assert out.keys() == {"velocity"}
    torch.testing.assert_close(out["velocity"], inputs["tokens"].to(torch.bfloat16) + inputs["bias"].sum().bfloat16())


def test_a_call_computes_on_the_tensors_that_it_is_given(plan_file):
    plan, inputs = Plan(plan_file, FAKE, CPU), given(8)
    first = plan(**inputs)
    check(first, inputs)
    again = plan(**given(12))
    check(first, inputs)  # outputs are the caller's
    check(again, given(12))
    assert plan.engine.calls == ["profile 0", "run (2, 8, 4)", "run (2, 12, 4)"]


def test_the_profile_is_the_nearest_that_holds_the_sizes(plan_file):
    plan = Plan(plan_file, FAKE, CPU)
    for rows in (3, 10, 40, 16, 128, 5):
        check(plan(**given(rows)), given(rows))
    # All but 3 and 128 are in both profiles: 40 nearer to 64 rows, the others to 8.
    changes = [call for call in plan.engine.calls if call.startswith("profile")]
    assert changes == ["profile 0", "profile 1", "profile 0", "profile 1", "profile 0"]


def test_sizes_that_no_profile_holds_are_named(plan_file):
    plan = Plan(plan_file, FAKE, CPU)
    with pytest.raises(InputError, match=r"not built for these sizes: tokens \[2, 129, 4\], bias \[2, 3\]; use"):
        plan(**given(129))
    with pytest.raises(InputError, match=r"tokens \[3, 8, 4\]"):
        plan(**given(8, batch=3))
    assert not plan.engine.calls


def test_tensors_that_lie_badly_are_copied(plan_file):
    plan = Plan(plan_file, FAKE, CPU)
    whole = given(17)["tokens"]
    for tokens in (whole[:, 1:9], whole[:1, 1:9], whole[..., [3, 2, 1, 0]].transpose(0, 1)[:2, :2].repeat(1, 4, 1)):
        inputs = given(8) | {"tokens": tokens}
        check(plan(**inputs), inputs)
    check(plan(**given(8, dtype=torch.float32)), given(8, dtype=torch.float32))


def test_no_rows_are_sizes_too(plan_file):
    check(Plan(plan_file, FAKE, CPU)(**given(0)), given(0))


def test_each_thread_has_a_context_of_its_own(plan_file):
    plan, found = Plan(plan_file, FAKE, CPU), {}

    def run(rows: int) -> None:
        for _ in range(3):
            found[rows] = plan(**given(rows))

    threads = [threading.Thread(target=run, args=(rows,)) for rows in (4, 8, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plan.engine.contexts) == 3
    for rows, out in found.items():
        check(out, given(rows))


def test_an_execution_that_fails_says_why(plan_file):
    plan = Plan(plan_file, FAKE, CPU)
    plan.engine.failing = True
    with pytest.raises(RuntimeError, match=r"step\.engine: TensorRT-RTX: out of luck$"):
        plan(**given(8))


def test_the_budget_of_weights_is_set_before_contexts_are_made(plan_file):
    plan = Plan(plan_file, FAKE, CPU, weight_bytes=123)
    plan(**given(8))
    assert plan.engine.budget_of_contexts == [123]


def test_graphs_are_the_librarys(plan_file):
    assert Plan(plan_file, FAKE, CPU).config.cuda_graph_strategy == "off"
    assert Plan(plan_file, FAKE, CPU, graphs=True).config.cuda_graph_strategy == "whole"


def test_kernels_are_kept_for_the_next_process(plan_file, tmp_path):
    kernels = tmp_path / "step.kernels"
    for content in (b"+", b"++"):
        plan = Plan(plan_file, FAKE, CPU, kernels=kernels)
        plan(**given(8))
        del plan
        assert kernels.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.engine", "step.kernels"]


def test_kernels_that_cannot_be_kept_do_not_matter(tmp_path):
    keep(FakeCache(), tmp_path / "nowhere" / "step.kernels")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (b"32", "damaged; build the engine again"),
        (b"1", r"made by another version than TensorRT-RTX 1\.7, which is installed; build the engine again"),
        (b"2", "not made for this GPU, .*; build it with --target"),
        (b"4", r"driver is too old for TensorRT-RTX 1\.7; update it"),
        (b"16", "too large for the memory of this GPU"),
        (b"64", "CUDA does not work here"),
        (b"0", r"TensorRT-RTX 1\.7 cannot load it: Serialization failed; build the engine again"),
        (b"cut", r"cannot load it: Serialization failed"),
    ],
)
def test_an_engine_that_cannot_be_loaded(plan_file, word, said):
    plan_file.write_bytes(word)
    with pytest.raises(InputError, match=rf"step\.engine: .*{said}") as error:
        Plan(plan_file, FAKE, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu(tmp_path):
    for device in ("cuda", "cpu"):
        with pytest.raises(InputError, match=r"run on a GPU, and there is none here; use --backend onnx or torch"):
            Plan(tmp_path / "step.engine", FAKE, torch.device(device))


@pytest.mark.skipif(not TENSORRT_RTX.installed, reason="needs pip install 'step1x-engine[tensorrt-rtx]'")
@pytest.mark.parametrize("content", [b"x" * 200, b"vtrt"])
def test_what_the_library_says_of_a_damaged_plan(plan_file, content, capfd):
    plan_file.write_bytes(content)
    with pytest.raises(InputError, match=r"step\.engine: damaged; build the engine again"):
        Plan(plan_file, TENSORRT_RTX, CPU)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not TENSORRT_RTX.installed, reason="needs pip install 'step1x-engine[tensorrt-rtx]'")
def test_the_library_has_what_is_used_of_it():
    trt = TENSORRT_RTX.load()
    pairs = [
        (FakeContext, trt.IExecutionContext),
        (FakeEngine, trt.ICudaEngine),
        (FakeConfig, trt.IRuntimeConfig),
        (FakeCache, trt.IRuntimeCache),
        (Diagnostics, trt.EngineInvalidityDiagnostics),
    ]
    own = {"calls", "contexts", "failing", "budget_of_contexts", "content", "cache", "strategy", "engine", "logger"}
    for fake, real in pairs:
        assert {name for name in vars(fake) if not name.startswith("_")} - own <= {*dir(real)}, real
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def test_streams_wait_for_each_other(monkeypatch):
    said: list[str] = []

    class Stream:
        def __init__(self, handle: int) -> None:
            self.cuda_stream = handle

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    current, own = Stream(0), SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(5))
    for _ in range(2):
        stream = stream_of(CPU, own)
        with ordered(stream, CPU):
            said.append(f"work on {stream.cuda_stream}")
    assert said == ["5 waits for 0", "work on 5", "0 waits for 5"] * 2
    current.cuda_stream, said[:] = 9, []
    with ordered(stream_of(CPU, own), CPU):
        assert stream_of(CPU, own) is current
    assert not said


def test_entries_are_calls():
    def plan(*outputs: str) -> Any:
        return lambda **inputs: dict.fromkeys(outputs, next(iter(inputs.values())))

    runner = TensorRT({"step": plan("velocity"), "rows": plan("velocity", "new_keys", "new_values")})
    tensors = [torch.full((1,), float(index)) for index in range(12)]
    assert runner.step(Inputs(*tensors[:10])) is tensors[0]
    assert runner.rows(RowsInputs(*tensors)) == (tensors[0],) * 3
    with pytest.raises(InputError, match="no exported decoder"):
        runner.decode(tensors[0])
