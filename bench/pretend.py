"""A device that is not there: run on the CPU as if the model lay on an accelerator, and count what crosses.

Tensors are marked as being on the device, operators pass the mark on, and whatever asks for a tensor's device is told
so. The arithmetic is the CPU's, so data-dependent code runs for real. What a GPU would refuse (operands in two places)
is refused here, and what would make the host wait for it is counted.
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


class Mismatch(RuntimeError):
    """An operator got tensors of two devices."""


class Pretend:
    """Within `with`, tensors of adopted modules, and all that is computed from them, are on DEVICE.

    to_device: bytes copied there, by stage; from_device: the same back. waits: how often the host had to wait for the
    device, by stage and reason. The stage is what `stage` was last told.
    """

    def __init__(self) -> None:
        self.to_device: Counter[str] = Counter()
        self.from_device: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._stage = ""
        self._there = WeakIdKeyDictionary()  # storages
        self._modes = ExitStack()

    def stage(self, name: str) -> None:
        self._stage = name

    def adopt(self, module: nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self.mark(tensor)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage() in self._there

    def mark(self, tensor: Tensor) -> None:
        self._there[tensor.untyped_storage()] = True

    def wait(self, reason: str) -> None:
        self.waits[self._stage, reason] += 1

    def moved(self, tensor: Tensor, there: bool) -> Tensor:
        """A copy of `tensor` on the other side."""
        copy = tensor.clone()
        size = copy.numel() * copy.element_size()
        if there:
            self.mark(copy)
            self.to_device[self._stage] += size
        else:
            self._there.pop(copy.untyped_storage(), None)
            self.from_device[self._stage] += size
            self.wait("copy to the host")
        return copy

    def __enter__(self) -> Self:
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Functions(self))
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
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = func(*args, **(kwargs or {}))
        there = [operand for operand in operands if self._pretend.holds(operand)]
        if there:
            self._check(func, operands)
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._pretend.mark(leaf)
        return out

    def _check(self, func: Any, operands: Sequence[Tensor]) -> None:
        name = func.overloadpacket.__name__
        indexing = name in ("index", "index_put", "index_put_")
        if name in WAITING or (indexing and any(one.dtype == torch.bool for one in operands[1:])):
            self._pretend.wait(name)
        # CUDA takes indices, and numbers as tensors without axes, from the host.
        here = [one for one in operands if one.dim() and not self._pretend.holds(one)]
        if here and not (indexing and self._pretend.holds(operands[0])):
            raise Mismatch(f"{func}: operands on {DEVICE} and on the CPU, shapes {[tuple(o.shape) for o in operands]}")


class _Functions(TorchFunctionMode):
    """Answers questions about devices, and makes what is asked for there or moves it."""

    def __init__(self, pretend: Pretend) -> None:
        super().__init__()
        self._pretend = pretend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return DEVICE if self._pretend.holds(args[0]) else func(*args)
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._to(func, args, kwargs)
        if func is torch.Tensor.copy_ and self._pretend.holds(args[0]) != self._pretend.holds(args[1]):
            return func(args[0], self._pretend.moved(args[1], self._pretend.holds(args[0])))
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and self._pretend.holds(args[0]):
            self._pretend.wait(func.__name__)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) != CPU:
            return self._made(func, args, {**kwargs, "device": CPU})
        return func(*args, **kwargs)

    def _made(self, func: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
        made = func(*args, **kwargs)
        if func in FROM_HOST:
            return self._pretend.moved(made, there=True)
        self._pretend.mark(made)
        return made

    def _to(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, *rest = args
        here = self._pretend.holds(tensor)
        there = False if func is torch.Tensor.cpu else here
        for index, one in enumerate(rest):
            if isinstance(one, torch.device | str):
                there, rest[index] = torch.device(one) != CPU, CPU
            elif isinstance(one, Tensor):
                there = self._pretend.holds(one)
        if kwargs.get("device") is not None:
            there, kwargs["device"] = torch.device(kwargs["device"]) != CPU, CPU
        out = func(tensor, *rest, **kwargs)
        return out if there == here else self._pretend.moved(out, there)
