"""What stands where in torch.cuda while a CUDA machine that is not there is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from step1x.bench.fake_streams import FakeEvent, FakeGraph

if TYPE_CHECKING:
    from step1x.bench.fake_cuda import FakeCuda


def names(machine: "FakeCuda") -> dict[str, Any]:
    """What stands where in torch.cuda."""

    def figure(name: str) -> Callable[..., int]:
        return lambda device=None: int(getattr(machine.memory.of[machine.index(device)], name))

    def free(device: Any = None) -> tuple[int, int]:
        own = machine.memory.of[machine.index(device)]
        return own.total - own.reserved, own.total

    return {
        "is_available": lambda: bool(machine.cards),
        "device_count": lambda: len(machine.cards),
        "current_device": lambda: machine.index(),
        "set_device": machine.set_device,
        "device": machine.device_context,
        "get_device_properties": machine.properties,
        "get_device_name": lambda device=None: machine.properties(device).name,
        "get_device_capability": lambda device=None: machine.cards[machine.index(device)].capability,
        "is_bf16_supported": lambda *_, **__: machine.cards[machine.index()].capability >= (8, 0),
        "Stream": machine.stream_type,
        "Event": type("Event", (FakeEvent,), {"machine": machine}),
        "CUDAGraph": type("CUDAGraph", (FakeGraph,), {"machine": machine}),
        "graph": machine.capture,
        "graph_pool_handle": object,
        "is_current_stream_capturing": lambda: machine.is_capturing,
        "stream": machine.on_stream,
        "current_stream": machine.current_stream,
        "default_stream": lambda device=None: machine.defaults[machine.index(device)],
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "set_stream": machine.set_stream,
        "synchronize": lambda device=None: machine.synchronized(machine.current_stream(device)),
        "empty_cache": machine.empty_cache,
        "memory_allocated": figure("allocated"),
        "max_memory_allocated": figure("peak"),
        "memory_reserved": figure("reserved"),
        "max_memory_reserved": figure("peak_reserved"),
        "reset_peak_memory_stats": lambda device=None: machine.memory.reset_peak(machine.index(device)),
        "mem_get_info": free,
        "set_per_process_memory_fraction": machine.set_share,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=machine.register, cudaHostUnregister=machine.memory.unregister
        ),
        "check_error": check_error,
    }


def check_error(code: int) -> None:
    """As torch.cuda.check_error."""
    if code:
        raise RuntimeError(f"CUDA error {code}")
