"""An ONNX graph -> an engine, in a process of its own: `python -m step1x.export.tensorrt_compile`, an order on stdin.

The library's compiler writes to standard error past its logger, and may end the process it runs in. Here that costs
neither the caller's terminal nor the caller. Torch is not loaded.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from step1x.engine.errors import InputError
from step1x.export.tensorrt_library import LIBRARIES, NO_REASON, Library, Messages, logger_of, one_line

Range = tuple[int, int, int]  # the least, the usual and the largest
Sizes = Mapping[str, Range]  # of the free axes of a graph, by their names in it
FAILED = 3  # exit code after an error that is told

# Layers of a network through which an operand keeps its precision.
SAME = {"CAST", "IDENTITY", "SHUFFLE"}
PRODUCTS = {"MATRIX_MULTIPLY", "CONVOLUTION"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One engine to build. profiles: of shapes that it is to serve; streamed: its weights may stay in host memory."""

    graph: str
    plan: str
    library: str
    target: str
    profiles: Sequence[Sizes]
    streamed: bool = False
    times: str | None = None  # file of kernel times, where the library keeps them


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was built, as the library tells it."""

    library: str
    version: str
    target: str
    layers: int  # of the network
    products: Mapping[str, int]  # matrix products and convolutions of the network, by the type of both operands
    kernels: Mapping[str, int]  # of the finished engine, by kind and type of the first operand; empty: it does not say
    activation_bytes: int  # that it works in, besides weights, at the largest shapes
    bytes: int  # of the engine
    seconds: float
    peak_bytes: int  # of host memory

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)


def compile_apart(order: Order) -> Report:
    """Builds an engine in another process. Raises InputError, one line, if it cannot be built."""
    words = [sys.executable, "-m", __name__]
    done = subprocess.run(words, input=json.dumps(asdict(order)), capture_output=True, encoding="utf-8", check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:  # the process came to its end before it could answer
        Path(order.plan).unlink(missing_ok=True)
        last = done.stderr.strip().splitlines()[-1:] or [NO_REASON]
        raise InputError(
            f"{order.graph}: {order.library} stopped with code {done.returncode}: {one_line(last[0])}"
        ) from None
    if done.returncode:
        raise InputError(answer["error"])
    return Report.of(answer)


def compiled(order: Order, library: Library) -> Report:
    """Builds an engine in this process. Raises InputError."""
    trt, messages, start = library.load(), Messages(), time.perf_counter()
    logger = logger_of(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(trt, network, logger, order.graph)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if order.streamed:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if not library.timed:
        config.num_compute_capabilities = 1
        config.set_compute_capability(library.target(order.target), 0)
    for sizes in order.profiles:
        config.add_optimization_profile(profile(builder, network, sizes, order.graph))
    times = restore_times(config, order.times) if library.timed and order.times else None
    with open(order.plan, "wb") as file:
        built = builder.build_serialized_network_to_stream(network, config, writer_to(trt, file))
    if not built:
        Path(order.plan).unlink()
        raise InputError(f"{order.graph}: {library.name} cannot build this for {order.target}: {messages.first}")
    if times is not None:
        times.write_bytes(config.get_timing_cache().serialize())
    return Report(
        library=library.name,
        version=trt.__version__,
        target=order.target,
        layers=network.num_layers,
        products=products(network),
        kernels=kernels(messages.layers),
        activation_bytes=messages.activations,
        bytes=Path(order.plan).stat().st_size,
        seconds=time.perf_counter() - start,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def parse(trt: Any, network: Any, logger: Any, graph: str) -> None:
    """Reads a graph, its external data beside it, into a network. Raises InputError with the first node refused."""
    if not Path(graph).is_file():
        raise InputError(f"{graph}: no such file")
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(graph):
        return
    error = parser.get_error(0)
    node = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    raise InputError(f"{graph}: refused: {node}{one_line(error.desc())}")


def profile(builder: Any, network: Any, sizes: Sizes, graph: str) -> Any:
    """The library's form of the sizes that an engine serves. Raises InputError for a graph with other free axes."""
    made = builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        ranges: list[Range] = []
        for axis, size in enumerate(tensor.shape):
            name = tensor.get_dimension_name(axis)
            if size < 0 and name not in sizes:
                raise InputError(f"{graph}: free axis {name!r} of {tensor.name} is none of this version's exports")
            ranges.append((size, size, size) if size >= 0 else sizes[name])
        made.set_shape(tensor.name, *zip(*ranges, strict=True))
    return made


def writer_to(trt: Any, file: BinaryIO) -> Any:
    """Takes an engine piece by piece, so that it is never whole in memory."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, piece: bytes) -> int:
            return file.write(piece)

    return Writer()


def restore_times(config: Any, path: str) -> Path:
    """Gives the library the kernel times of earlier builds; those of another GPU or version it leaves out itself."""
    place = Path(path)
    config.set_timing_cache(config.create_timing_cache(place.read_bytes() if place.is_file() else b""), False)
    return place


def products(network: Any) -> dict[str, int]:
    """How many products a network has of each type of operands: what dequantised ones were quantised to."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    source = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}

    def precision(tensor: Any) -> str:
        layer = source.get(tensor.name)
        while layer is not None and layer.type.name in SAME:
            layer = source.get(layer.get_input(0).name)
        kind = layer.get_input(0) if layer is not None and layer.type.name == "DEQUANTIZE" else tensor
        return str(kind.dtype.name)

    found: Counter[str] = Counter()
    for layer in layers:
        if layer.type.name in PRODUCTS:
            inputs = [layer.get_input(index) for index in range(min(layer.num_inputs, 2))]
            found[" x ".join(dict.fromkeys(precision(tensor) for tensor in inputs if tensor is not None))] += 1
    return dict(found)


def kernels(layers: str) -> dict[str, int]:
    """Kinds of kernels in the list of layers that a library gives of a finished engine; fused attention is a kind."""
    found: Counter[str] = Counter()
    for line in layers.splitlines():
        name, mark, rest = line.partition("LayerType: ")
        if mark:
            kind, operands = rest.split(",", 1)
            kind = "attention" if "_mha_" in name else kind
            _, typed, first = operands.partition("Datatype: ")
            found[f"{kind} {first.split(',')[0]}" if typed else kind] += 1
    return dict(found)


def main() -> None:
    """One order on standard input, one report or error on standard output; all that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order = Order(**json.load(sys.stdin))
    try:
        report = compiled(order, LIBRARIES[order.library])
    except InputError as error:
        json.dump({"error": str(error)}, answers)
        answers.flush()
        sys.exit(FAILED)
    json.dump(asdict(report), answers)
    answers.flush()


if __name__ == "__main__":
    main()
