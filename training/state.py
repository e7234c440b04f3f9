"""What a training run remembers: averaged weights, and a state on disk that survives a kill at any moment."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a module's parameters and buffers, warming up over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in module.state_dict().items():
            mine = self.values[name]
            if mine.is_floating_point():
                mine.lerp_(value, 1 - decay)
            else:
                mine.copy_(value)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that `path` is at every moment absent, the old state or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state at `path`, None when there is none. Only tensors and plain values are read."""
    if not path.exists():
        return None
    return torch.load(path, map_location=device, weights_only=True)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
