"""A device that is not there: run on the CPU as if the model lay on an accelerator, and count what crosses.

Tensors are marked as being on the device, operators pass the mark on, and whatever asks for a tensor's device is told
so. The arithmetic is the CPU's, so data-dependent code runs for real. What a GPU would refuse (operands in two places)
is refused here, and what would make the host wait for it is counted. `fake_cuda.py` makes a CUDA machine of it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

CPU = torch.device("cpu")
# What it is called: transformers and this project know the name, and treat it as no special case.
DEVICE = torch.device("mps")
FROM_HOST = (torch.tensor, torch.as_tensor)  # factories that copy values of the host
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")  # operators whose result the host needs
INDEXING = ("index", "_unsafe_index", "index_put", "index_put_")  # operators that take indices from the host


class Mismatch(RuntimeError):
    """An operator got tensors of two devices."""


def tensors(values: Any) -> list[Tensor]:
    """The tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Pretend:
    """Within `with`, tensors of adopted modules, and all that is computed from them, are on DEVICE.

    to_device: bytes copied there, by stage; from_device: the same back. waits: how often the host had to wait for the
    device, by stage and reason. The stage is what `stage` was last told.
    """

    def __init__(self, device: torch.device = DEVICE) -> None:
        self.to_device: Counter[str] = Counter()
        self.from_device: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._device = device
        self._stage = ""
        self._there = WeakIdKeyDictionary()  # storage -> its device
        self._modes = ExitStack()

    def stage(self, name: str) -> None:
        self._stage = name

    def adopt(self, module: nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self.mark(tensor)

    def placed(self, device: Any) -> torch.device | None:
        """The pretended device that is meant; None for a real one."""
        return self._device if torch.device(device).type == self._device.type else None

    def device_of(self, tensor: Tensor) -> torch.device | None:
        """The pretended device that a tensor is on; None for a real one."""
        found: torch.device | None = self._there.get(tensor.untyped_storage())
        return found

    def holds(self, tensor: Tensor) -> bool:
        return self.device_of(tensor) is not None

    def mark(self, tensor: Tensor, device: torch.device | None = None) -> None:
        self._there[tensor.untyped_storage()] = device or self._device

    def unmark(self, tensor: Tensor) -> None:
        self._there.pop(tensor.untyped_storage(), None)

    def wait(self, reason: str) -> None:
        self.waits[self._stage, reason] += 1

    def moved(self, tensor: Tensor, to: torch.device | None) -> Tensor:
        """A copy of `tensor` on a pretended device, or None: on the host."""
        copy = tensor.clone()
        size = copy.numel() * copy.element_size()
        if to is not None:
            self.mark(copy, to)
            self.to_device[self._stage] += size
        else:
            self.unmark(copy)
            self.from_device[self._stage] += size
            self.wait("copy to the host")
        return copy

    def filled(self, copy: Callable[..., Tensor], place: Tensor, source: Tensor, *rest: Any, **words: Any) -> Tensor:
        """`place.copy_(source)` of tensors on two devices."""
        return copy(place, self.moved(source, self.device_of(place)), *rest, **words)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on its way to the backend: results are where the operands are."""
        operands = tensors((args, kwargs))
        out = func(*args, **kwargs)
        device = next((found for found in map(self.device_of, operands) if found is not None), None)
        if device is not None:
            self.check(func, operands)
            for leaf in tensors(out):
                self.mark(leaf, device)
        return out

    def check(self, func: Any, operands: Sequence[Tensor]) -> None:
        """Raises Mismatch for operands in two places; counts what the host waits for."""
        name = func.overloadpacket.__name__
        indexing = name in INDEXING
        if name in WAITING or (indexing and any(one.dtype == torch.bool for one in operands[1:])):
            self.wait(name)
        # CUDA takes indices, and numbers as tensors without axes, from the host.
        places = {self.device_of(one) for one in operands if one.dim()}
        taken = indexing and places - {None} == {self.device_of(operands[0])}
        if len(places) > 1 and not taken:
            shapes = [tuple(one.shape) for one in operands]
            raise Mismatch(f"{func}: operands on {sorted(str(one or CPU) for one in places)}, shapes {shapes}")

    def attached(self) -> ExitStack:
        """Within it this thread sees the device."""
        modes = ExitStack()
        modes.enter_context(_Operators(self))
        modes.enter_context(_Functions(self))
        return modes

    def __enter__(self) -> Self:
        self._modes.enter_context(self.attached())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.close()


class _Operators(TorchDispatchMode):
    """Passes the mark from operands to results, and refuses mixtures."""

    def __init__(self, pretend: Pretend) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pretend = pretend

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        return self._pretend.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Answers questions about devices, and makes what is asked for there or moves it."""

    def __init__(self, pretend: Pretend) -> None:
        super().__init__()
        self._pretend = pretend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return self._pretend.device_of(args[0]) or func(*args)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return (self._pretend.device_of(args[0]) or CPU).type == "cuda"
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._to(func, args, kwargs)
        if func is torch.Tensor.copy_ and self._pretend.device_of(args[0]) != self._pretend.device_of(args[1]):
            return self._pretend.filled(func, *args, **kwargs)
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and self._pretend.holds(args[0]):
            self._pretend.wait(func.__name__)
        if kwargs.get("device") is not None and self._pretend.placed(kwargs["device"]) is not None:
            return self._made(func, args, kwargs)
        return func(*args, **kwargs)

    def _made(self, func: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
        device = self._pretend.placed(kwargs["device"])
        made = func(*args, **{**kwargs, "device": CPU})
        if func in FROM_HOST:
            return self._pretend.moved(made, device)
        self._pretend.mark(made, device)
        return made

    def _to(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """`to`, `cpu` and `cuda`: the cast is the CPU's, the move is ours."""
        tensor, *rest = args
        here = self._pretend.device_of(tensor)
        there = None if func is torch.Tensor.cpu else here
        if func is torch.Tensor.cuda:
            given = rest[0] if rest else kwargs.pop("device", None)
            func, rest, kwargs["device"] = torch.Tensor.to, [], "cuda" if given is None else given
        for index, one in enumerate(rest):
            if isinstance(one, torch.device | str):
                there = self._pretend.placed(one)
                rest[index] = torch.device(one) if there is None else CPU
            elif isinstance(one, Tensor):
                there = self._pretend.device_of(one)
        if kwargs.get("device") is not None:
            there = self._pretend.placed(kwargs["device"])
            kwargs["device"] = torch.device(kwargs["device"]) if there is None else CPU
        out: Tensor = func(tensor, *rest, **kwargs)
        return out if there == here else self._pretend.moved(out, there)
