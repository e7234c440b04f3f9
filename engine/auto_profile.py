"""The profile that "auto" stands for: by the plan, the most faithful of those that are fast on the card at hand.

Nothing is measured and nothing is loaded: the plan is made from sizes, the rest is what NVIDIA says of its cards.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from step1x.engine.card import Card, card_at, free_host_memory
from step1x.engine.errors import InputError
from step1x.profiles import Profile, Scheme, load_profile, profile_names

if TYPE_CHECKING:
    from step1x.engine.hollow import ModelSizes

GB = 1e9
# Schemes of the transformer, the most faithful first. On the bundled model int8 errs less than fp8; wider models have
# outliers, and beside one an integer loses the small values of its row, where e4m3 keeps three bits of each.
FAITHFUL: tuple[Scheme, ...] = ("plain", "fp8-weight", "int8-weight", "fp8", "int8", "nvfp4", "int4-weight")
AS_8_BIT = ("fp8", "int8")  # whose products run at the card's 8-bit rate
SMALL = 1e9  # bytes of a transformer; a smaller one waits for launches, not for products
USUAL = "v1.1"  # stands for a model of the Hub that is not here yet: the released ones are all of one size


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Whether a profile can be used on a card, and why."""

    profile: str
    fits: bool
    fast: bool  # nothing is streamed while denoising, and products run at the card's full rate
    peak: int  # planned bytes on the device; 0: not planned
    host: int  # planned bytes of pinned host memory
    reason: str


def gpu_profiles(changes: Mapping[str, object] | None = None) -> list[Profile]:
    """The shipped profiles for a GPU, the most faithful first; of equal ones that which keeps most on the device."""
    shipped = [load_profile(name) for name in profile_names()]
    ranked = sorted((one for one in shipped if one.device.startswith("cuda")), key=_rank)
    return [one.changed(changes or {}) for one in ranked]


def _rank(profile: Profile) -> tuple[float, ...]:
    schemes = profile.weights
    return (*(FAITHFUL.index(one) for one in (schemes.dit, schemes.text, schemes.vision)), -profile.budget_gb)


def chosen(model: "ModelSizes", card: Card, host: int, changes: Mapping[str, object] | None = None) -> Fit:
    """The profile for a card and so many bytes of free host memory: the first that is fast, else the first that fits.

    changes: what will differ from the profile. Raises InputError, one line, if none fits: what would.
    """
    profiles = gpu_profiles(changes)
    small = is_small(model)
    fast = [one for one in profiles if slow_because(one, card, small) is None]
    # Most plans are never made: first come those that would be taken, and the first that fits ends it.
    for profile in (*fast, *(one for one in profiles if one not in fast)):
        found = fit(model, profile, card, host, small=small)
        if found.fits:
            return found
    least = min(profiles, key=lambda one: one.budget_gb)
    raise InputError(_nothing_fits(model, least, card, host))


def is_small(model: "ModelSizes") -> bool:
    import torch

    from step1x.engine.planned_bytes import transformer_weights

    return sum(transformer_weights(model.dit, torch.bfloat16, "plain", "plain")["transformer"].values()) < SMALL


def slow_because(profile: Profile, card: Card, small: bool) -> str | None:
    """Why a profile is not fast on a card; None: it is. small: of a model that `is_small`."""
    if profile.residency.dit == "stream":
        return "blocks are copied in every step"
    if small or profile.weights.dit in AS_8_BIT:
        return None
    if profile.weights.dit != "plain":
        return "weights are dequantized in every step"
    return "a GeForce card multiplies bfloat16 at half rate" if card.half_rate else None


def fit(model: "ModelSizes", profile: Profile, card: Card, host: int, *, small: bool) -> Fit:
    """Whether the plan of a profile, at its own size and batch, fits a card and the free host memory."""
    from step1x.engine.planner import plan, weights_bytes

    slow = slow_because(profile, card, small)

    def answer(fits: bool, reason: str, peak: int = 0, pinned: int = 0) -> Fit:
        return Fit(profile=profile.name, fits=fits, fast=slow is None, peak=peak, host=pinned, reason=reason)

    if card.compute < profile.capability:
        return answer(False, f"needs compute capability {profile.capability}, has {card.compute}")
    limit = min(card.total_memory, profile.budget_gb * GB or card.total_memory)
    least = weights_bytes(model, profile)  # in a tenth of a plan's time
    if least > limit:
        return answer(False, f"weights take {least / GB:.1f} GB of {limit / GB:.1f} GB", least)
    found = plan(model, profile)
    peak, pinned = found.peak.bytes, found.host_bytes
    if peak > limit:
        return answer(False, f"plans {peak / GB:.1f} GB of {limit / GB:.1f} GB", peak, pinned)
    if pinned > host or found.host_over > 0:
        most = min(host, profile.host_memory_gb * GB or host)
        return answer(False, f"pins {pinned / GB:.1f} GB of host memory, {most / GB:.1f} GB are free", peak, pinned)
    return answer(True, f"plans {peak / GB:.1f} GB" + (f"; {slow}" if slow else ""), peak, pinned)


def _nothing_fits(model: "ModelSizes", least: Profile, card: Card, host: int) -> str:
    from step1x.engine.planner import plan

    found = plan(model, least)
    return (
        f"no profile fits {model.name} on the {card} with {host / GB:.1f} GB of free host memory: the smallest, "
        f"{least.name}, takes compute capability {least.capability}, {found.peak.bytes / GB:.1f} GB of GPU memory and "
        f"{found.host_bytes / GB:.1f} GB of host memory; --profile cpu runs without the GPU"
    )


def fitting_profile(model: str | Path | None, card: Card, *, below: Profile, host: int | None = None) -> str | None:
    """What fits where `below` did not, in one clause for a message; None if nothing that takes less does.

    For a profile that was loaded, or tried to be, so that what is taken is known to be too much.
    """
    from step1x.engine.planner import plan

    sizes = sizes_at_hand(model)
    small, most = is_small(sizes), plan(sizes, below).peak.bytes
    fits = _fits(sizes, gpu_profiles(), card, free_host_memory() if host is None else host, small)
    smaller = [one for one in fits if one.profile != below.name and one.peak < most]
    found = min(smaller, key=lambda one: not one.fast, default=None)  # the first that is fast, else the first
    return None if found is None else f"--profile {found.profile} fits, it takes {found.peak / GB:.1f} GB"


def _fits(sizes: "ModelSizes", profiles: Iterable[Profile], card: Card, host: int, small: bool) -> list[Fit]:
    return [one for one in (fit(sizes, profile, card, host, small=small) for profile in profiles) if one.fits]


def for_device(device: str, model: str | Path | None, changes: Mapping[str, object] | None = None) -> str:
    """The name of the profile for a device of this machine; "auto": for the current GPU, if there is one.

    Without CUDA nothing is planned. Raises InputError if nothing fits.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return "cpu"  # also for a device that is not there, which who uses it will say
    return chosen(sizes_at_hand(model), card_at(device), free_host_memory(), changes).profile


def sizes_at_hand(model: str | Path | None) -> "ModelSizes":
    """Sizes of a model if its files are here; those of a released one while they are still on the Hub."""
    from step1x.engine.engine_config import model_sizes
    from step1x.engine.folder import HUB_ID

    asked = None if model is None or Path(model).expanduser().exists() else HUB_ID.fullmatch(str(model))
    if asked is None or str(model).startswith("."):
        return model_sizes(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return model_sizes(snapshot_download(asked["repository"], revision=asked["revision"], local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, InputError):  # InputError: it came in part
        return model_sizes(USUAL)
