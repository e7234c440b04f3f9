"""What an edit of the released model would use on a device, and why: what `doctor` says."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step1x.engine.auto_profile import USUAL, Fit, chosen
from step1x.engine.card import Card
from step1x.engine.engine_config import model_sizes
from step1x.engine.errors import InputError
from step1x.profiles import load_profile

if TYPE_CHECKING:
    import torch

COMPILED = "for servers and bench, or with --compile; one edit would wait longer for it than it gains"


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """A choice that was made, and why."""

    what: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Uses:
    """All that is chosen on a device if nothing is said."""

    device: str
    model: str  # that the profile is planned for
    profile: Used  # "" if none fits
    peak: int  # planned bytes on the device; 0: none fits, or a CPU
    kernels: dict[str, str]  # operation of ours -> why its reference runs instead; "": the kernel is used
    attention: Used  # of keys with a bias, as they are when padding is collapsed
    products: Used  # of quantized rows
    compiled: Used


def uses(device: "torch.device", card: Card | None, host: int, no_torchao: str | None) -> Uses:
    """On a device of this machine, or on one that is assumed (kernels/launch.py). card: None for a CPU.

    host: bytes of free host memory. no_torchao: why it cannot be used, as `quant.choice.why_not_torchao` says.
    """
    found, kernels = _profile(card, host), _kernels(device)
    name = device.type if device.type == "cpu" else str(device)
    return Uses(
        device=name,
        model=USUAL,
        profile=Used(what=found.profile, reason=found.reason),
        peak=found.peak,
        kernels=kernels,
        attention=_attention(device, kernels),
        products=_products(found.profile, device, no_torchao),
        compiled=Used(what="off", reason=COMPILED),
    )


def _profile(card: Card | None, host: int) -> Fit:
    none = Fit(profile="cpu", fits=True, fast=False, peak=0, host=0, reason="there is no GPU")
    if card is None:
        return none
    try:
        return chosen(model_sizes(USUAL), card, host)
    except InputError as error:
        return Fit(profile="", fits=False, fast=False, peak=0, host=0, reason=str(error))


def _kernels(device: "torch.device") -> dict[str, str]:
    from step1x.engine.caches import cache_folder
    from step1x.kernels.checks import examine

    if device.type != "cuda":
        return {}
    return {one.op: one.reason for one in examine(device, cache_folder() / "kernels")}


def _attention(device: "torch.device", kernels: dict[str, str]) -> Used:
    from step1x.kernels.attention_backends import automatic_name, checked_by
    from step1x.kernels.launch import capability

    name = automatic_name(device, slice(0, 1))
    if device.type != "cuda":
        return Used(what=name, reason="PyTorch's own, for a CPU")
    if name == "sdpa":
        return Used(what=name, reason=f"sm_{capability(device)} has no flash kernels that give sums")
    op = checked_by(name, device, slice(0, 1))
    if op is not None and kernels.get(op.name):
        return Used(what="sdpa", reason=f"{name} failed its check: {kernels[op.name]}")
    return Used(what=name, reason="a flash kernel for all keys, and exact sums for those with a bias")


def _products(profile: str, device: "torch.device", no_torchao: str | None) -> Used:
    from step1x.kernels.launch import capability
    from step1x.quant.choice import DYNAMIC, LEAST

    scheme = load_profile(profile).weights.dit if profile else "plain"
    if scheme not in DYNAMIC:
        return Used(what="torch", reason=f"{profile} multiplies no quantized rows" if profile else "no profile")
    if capability(device) < LEAST[scheme]:
        return Used(what="torch", reason=f"torchao's {scheme} needs compute capability {LEAST[scheme] / 10}")
    if no_torchao:
        return Used(what="torch", reason=no_torchao)
    return Used(what="torchao", reason=f"its {scheme} products run from compute capability {LEAST[scheme] / 10} on")


def words(found: Uses) -> list[str]:
    """For people, one fact a line."""
    unused: dict[str, list[str]] = {}
    for op, reason in found.kernels.items():
        if reason:
            unused.setdefault(reason, []).append(op)
    used = sum(not reason for reason in found.kernels.values())
    ours = f"{used} of {len(found.kernels)} used" if found.kernels else "none: they are for a GPU"
    lines = [
        f"profile   {found.profile.what or 'none'}: {found.profile.reason}",
        f"kernels   {ours}",
        *(f"          not {', '.join(ops)}: {reason}" for reason, ops in unused.items()),
        f"attention {found.attention.what}: {found.attention.reason}",
        f"products  {found.products.what}: {found.products.reason}",
        f"compiled  {found.compiled.what}: {found.compiled.reason}",
    ]
    return [f"{found.device}: what {found.model} would use", *(f"  {line}" for line in lines)]
