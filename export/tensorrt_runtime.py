"""TensorRT engines on torch tensors, in the order of torch's stream, and in memory that is all torch's.

What an engine works in is taken from torch's cache for each call, as large as the sizes of that call need, so engines
with wide profiles cost no more than narrow ones, and threads and engines share it.
"""

import mmap
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from step1x.engine.errors import InputError
from step1x.engine.parts import architecture
from step1x.export.core import Entry, Inputs, RowsInputs, RowsOutputs
from step1x.export.tensorrt_library import Library, Messages, logger_of

ALIGNMENT = 256  # bytes, of every address that a library is given
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}
Shape = tuple[int, ...]
Ranges = tuple[Shape, Shape, Shape]  # the least, the usual and the largest shape


class Context(Protocol):
    """What runs an engine for one thread: the part of the libraries' interface that is used here."""

    def set_optimization_profile_async(self, profile: int, stream: int, /) -> bool: ...
    def set_input_shape(self, name: str, shape: Shape, /) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def get_tensor_shape(self, name: str, /) -> Sequence[int]: ...
    def update_device_memory_size_for_shapes(self) -> int: ...
    def set_device_memory(self, address: int, size: int, /) -> None: ...
    def set_tensor_address(self, name: str, address: int, /) -> bool: ...
    def execute_async_v3(self, stream: int, /) -> bool: ...


class Engine(Protocol):
    """An engine that has been loaded: likewise."""

    num_io_tensors: int
    num_optimization_profiles: int
    weight_streaming_budget_v2: int

    def get_tensor_name(self, index: int, /) -> str: ...
    def get_tensor_mode(self, name: str, /) -> Any: ...
    def get_tensor_dtype(self, name: str, /) -> Any: ...
    def get_tensor_profile_shape(self, name: str, profile: int, /) -> Sequence[Sequence[int]]: ...
    def create_runtime_config(self) -> Any: ...
    def create_execution_context(self, config: Any, /) -> Context | None: ...


class Plan:
    """An engine on a GPU. Threads may call it at once: each has a context of its own.

    kernels: a file in which TensorRT-RTX keeps the kernels that it makes on the GPU when a size first comes.
    weight_bytes: how much of the weights may stay on the GPU, of an engine built with streamed weights.
    graphs: the library replays launches as a CUDA graph, where it offers that.
    """

    def __init__(
        self,
        path: Path,
        library: Library,
        device: torch.device,
        *,
        kernels: Path | None = None,
        weight_bytes: int | None = None,
        graphs: bool = False,
    ) -> None:
        """Raises InputError, one line: no library, no GPU, or an engine that is damaged or made for another one."""
        self.trt, self.messages = library.load(), Messages()
        self.path, self.device, self.kernels = path, device, kernels
        self.name, self.version = library.name, self.trt.__version__
        check_device(device, path)
        with on(device):
            self.runtime = self.trt.Runtime(logger_of(self.trt, self.messages))
            self.engine = self._load()
            if weight_bytes is not None:
                self.engine.weight_streaming_budget_v2 = weight_bytes
            self.config = self._configured(graphs)
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.dtypes = {name: DTYPES[self.engine.get_tensor_dtype(name).name] for name in names}
        self.inputs = [name for name in names if self.engine.get_tensor_mode(name).name == "INPUT"]
        self.outputs = [name for name in names if name not in self.inputs]
        self.profiles = [
            {name: ranges(self.engine.get_tensor_profile_shape(name, index)) for name in self.inputs}
            for index in range(self.engine.num_optimization_profiles)
        ]
        self._own = threading.local()

    def _load(self) -> Engine:
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if hasattr(self.runtime, "get_engine_validity"):  # TensorRT-RTX says what is wrong
                self._check(*self.runtime.get_engine_validity(data))
            engine: Engine | None = self.runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise InputError(f"{self.path}: {self.name} {self.version} cannot load it: {self.messages.first}; {AGAIN}")
        return engine

    def _check(self, validity: Any, diagnostics: int) -> None:
        if validity.name != "INVALID":
            return
        card = architecture(str(self.device))
        for name, fault in FAULTS.items():
            if diagnostics & int(getattr(self.trt.EngineInvalidityDiagnostics, name)):
                said = fault.format(library=f"{self.name} {self.version}", card=card)
                raise InputError(f"{self.path}: {said}")

    def _configured(self, graphs: bool) -> Any:
        """How contexts are made: in memory of ours, and TensorRT-RTX with the kernels of earlier processes."""
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if graphs and hasattr(config, "cuda_graph_strategy"):
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self.kernels is not None and hasattr(config, "create_runtime_cache"):
            cache = config.create_runtime_cache()
            with suppress(FileNotFoundError):
                cache.deserialize(self.kernels.read_bytes())  # what does not fit here is left out
            config.set_runtime_cache(cache)
            weakref.finalize(self, keep, cache, self.kernels)  # at the latest when the process ends
        return config

    def __call__(self, **given: Tensor) -> dict[str, Tensor]:
        """Its outputs, by name. Raises InputError for sizes that no profile holds."""
        held = {name: self._laid(given[name], self.dtypes[name]) for name in self.inputs}
        shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        profile = self.profile_of(shapes)
        with on(self.device):
            context, stream = self._context(), stream_of(self.device, self._own)
            if getattr(self._own, "profile", None) != profile:
                self._want(context.set_optimization_profile_async(profile, stream.cuda_stream))
                self._own.profile = profile
            for name, shape in shapes.items():
                self._want(context.set_input_shape(name, shape))
            self._want(not context.infer_shapes())
            for name in self.outputs:
                shape = tuple(context.get_tensor_shape(name))
                held[name] = torch.empty(shape, dtype=self.dtypes[name], device=self.device)
            size = context.update_device_memory_size_for_shapes()
            place = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
            context.set_device_memory(place.data_ptr(), size)
            empty = torch.empty(ALIGNMENT, dtype=torch.uint8, device=self.device)
            for name, tensor in held.items():
                self._want(context.set_tensor_address(name, (tensor if tensor.numel() else empty).data_ptr()))
            # Now that all is allocated: until then, what other threads gave torch's stream may have used that memory.
            with ordered(stream, self.device):
                self._want(context.execute_async_v3(stream.cuda_stream))
        return {name: held[name] for name in self.outputs}

    def _laid(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor as the library takes it."""
        laid = tensor.to(self.device, dtype).contiguous()
        return laid.clone() if laid.data_ptr() % ALIGNMENT else laid

    def profile_of(self, shapes: Mapping[str, Shape]) -> int:
        """The profile that holds the shapes, whose usual ones are nearest."""
        fitting = {}
        for index, profile in enumerate(self.profiles):
            if all(within(shape, profile[name]) for name, shape in shapes.items()):
                fitting[index] = sum(abs(prod(shape) - prod(profile[name][1])) for name, shape in shapes.items())
        if not fitting:
            sizes = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise InputError(f"{self.path}: not built for these sizes: {sizes}; use --backend torch for them")
        return min(fitting, key=fitting.__getitem__)

    def _context(self) -> Context:
        """This thread's."""
        if not hasattr(self._own, "context"):
            context = self.engine.create_execution_context(self.config)
            self._want(context is not None)
            self._own.context = context
        found: Context = self._own.context
        return found

    def _want(self, done: bool) -> None:
        if not done:
            raise RuntimeError(f"{self.path}: {self.name}: {self.messages.last}")


AGAIN = "build the engine again"
# What TensorRT-RTX says of an engine that it will not load, in the order in which it is told.
FAULTS = {
    "MALFORMED_ENGINE": f"damaged; {AGAIN}",
    "VERSION_MISMATCH": f"made by another version than {{library}}, which is installed; {AGAIN}",
    "UNSUPPORTED_CC": "not made for this GPU, {card}; build it with --target {card}, or --backend onnx",
    "OLD_CUDA_DRIVER": "the GPU's driver is too old for {library}; update it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for {library}; update it",
    "INSUFFICIENT_GPU_MEMORY": "too large for the memory of this GPU; build it with streamed weights",
    "CUDA_ERROR": "CUDA does not work here; step1x-engine doctor says more",
}


def check_device(device: torch.device, path: Path) -> None:
    """Raises InputError if there is no GPU to run on, or no engine."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise InputError(f"{path}: TensorRT engines run on a GPU, and there is none here; use --backend onnx or torch")
    if not path.is_file() or not path.stat().st_size:
        raise InputError(f"{path}: missing or empty; {AGAIN}")


def ranges(given: Sequence[Sequence[int]]) -> Ranges:
    least, usual, largest = (tuple(one) for one in given)
    return least, usual, largest


def within(shape: Shape, held: Ranges) -> bool:
    least, _, largest = held
    return all(low <= size <= high for low, size, high in zip(least, shape, largest, strict=True))


def keep(cache: Any, path: Path) -> None:
    """Writes the kernels that were made, for the next process."""
    with suppress(OSError):  # a full disk costs the next start its warmth
        fresh = path.with_suffix(".new")
        fresh.write_bytes(cache.serialize())
        fresh.replace(path)


def on(device: torch.device) -> Any:
    """Within it, CUDA calls are of this device."""
    return torch.cuda.device(device)


def stream_of(device: torch.device, own: Any) -> torch.cuda.Stream:
    """Torch's current stream; the thread's own where that is the default, on which libraries wait for the device."""
    current = torch.cuda.current_stream(device)
    if current.cuda_stream:
        return current
    if not hasattr(own, "stream"):
        own.stream = torch.cuda.Stream(device)
    found: torch.cuda.Stream = own.stream
    return found


@contextmanager
def ordered(stream: torch.cuda.Stream, device: torch.device) -> Iterator[None]:
    """What `stream` is given within runs after all of torch's current stream, and before what comes on that next."""
    current = torch.cuda.current_stream(device)
    if stream == current:
        yield
        return
    stream.wait_stream(current)
    yield
    current.wait_stream(stream)


class TensorRT:
    """The entries of an exported engine as calls, by their plans."""

    def __init__(self, plans: Mapping[Entry, Plan]) -> None:
        self.plans = plans

    @classmethod
    def load(
        cls, files: Mapping[Entry, Path], library: Library, device: torch.device, kernels: Path | None, **how: Any
    ) -> Self:
        """kernels: a folder in which kernels are kept. how: as for `Plan`. Raises InputError as that does."""
        kept = {entry: kernels and kernels / f"{entry}.kernels" for entry in files}
        return cls({entry: Plan(path, library, device, kernels=kept[entry], **how) for entry, path in files.items()})

    def step(self, inputs: Inputs) -> Tensor:
        """Velocity (B, N, C) of the target."""
        return self._plan("step")(**inputs._asdict())["velocity"]

    def rows(self, inputs: RowsInputs) -> RowsOutputs:
        """Velocity of some rows, and the caches with what they changed."""
        return RowsOutputs(**self._plan("rows")(**inputs._asdict()))

    def encode(self, pixels: Tensor) -> Tensor:
        """Moments (B, 2 z, H / 8, W / 8) of pixels (B, 3, H, W)."""
        return self._plan("encoder")(pixels=pixels)["moments"]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, 8 h, 8 w) of latents (B, z, h, w)."""
        return self._plan("decoder")(latents=latents)["pixels"]

    def _plan(self, entry: Entry) -> Plan:
        if entry not in self.plans:
            raise InputError(f"this engine has no exported {entry}: build it again with it, or use --backend torch")
        return self.plans[entry]
