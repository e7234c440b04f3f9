"""What Engine.load loads: the profile that is meant, its device, and the components of a model for both."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from step1x.engine.backends import HOLLOW, backend_at, with_exported
from step1x.engine.build import find, find_or_build
from step1x.engine.card import card_at
from step1x.engine.errors import InputError
from step1x.engine.executor import Execution
from step1x.engine.named_profile import AUTO, named_profile
from step1x.engine.parts import load_engine_folder, load_profile_of
from step1x.engine.progress import Progress
from step1x.engine.residency import RESIDENT, given_back
from step1x.engine.store import MANIFEST
from step1x.engine.weights import Components, load
from step1x.profiles import Profile, Residency
from step1x.quant.choice import product_of

SETTINGS = (
    "device",
    "dtype",
    "target",
    *Execution.__dataclass_fields__,
)  # of a profile, that Engine.load takes one by one
# Keywords of Engine.load:
LOADING = ("profile", "variant", "fix_quotes", "cache", "calibration", "say", "progress", "trust_engine", *SETTINGS)


def wanted_profile(name: str | Path | None, settings: Mapping[str, object], model: str | Path | None = None) -> Profile:
    """The profile with what differs from it; None and the device "auto" leave it as it is. Raises InputError.

    model: if it is an engine, its profile is the default; else the one that suits model and device, as with "auto".
    """
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise InputError(f"unknown option {', '.join(unknown)}; known: {', '.join(LOADING)}")
    given = {key: value for key, value in settings.items() if value is not None and (key, value) != ("device", "auto")}
    dtype = given.pop("dtype", None)
    if dtype is not None:
        given |= dict.fromkeys(("dtype", "vae_dtype"), str(dtype).removeprefix("torch."))
    built, cuda = _engine_at(model), torch.cuda.is_available()
    try:
        if built is not None and name in (None, AUTO):
            found = load_profile_of(built)
        else:
            found = named_profile(name or AUTO, model, given)
        if given.get("device", found.device) == "auto":
            given["device"] = "cuda" if cuda else "cpu"
        wanted = found.changed(given)
    except ValueError as error:
        raise InputError(str(error)) from error
    if wanted.backend != "torch" and (torchs := sorted({*given} & {"kernels", "attention", "compiled"})):
        raise InputError(f"{', '.join(torchs)}: of backend torch alone; {wanted.backend} runs what was exported")
    return wanted


def checked_device(name: str) -> torch.device:
    """The device of that name, with its index. Raises InputError if this machine has none such."""
    try:
        device = torch.empty(0, device=name).device  # takes no memory, which may be gone
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"device {name!r} cannot be used here: {reason}") from error
    return device


@contextmanager
def fitting(model: str | Path | None, profile: Profile) -> Iterator[None]:
    """What is loaded within it for a profile fits the GPU, or an InputError says which profile would."""
    from step1x.engine.auto_profile import fitting_profile

    try:
        yield
        return
    except torch.OutOfMemoryError:
        pass  # what was loaded is freed with it
    device = checked_device(profile.device)
    given_back(device)
    fits = fitting_profile(model, card_at(str(device)), below=profile) or "no shipped profile takes less"
    raise InputError(f"out of GPU memory while loading with profile {profile.name} on {device}; {fits}")


def home_of(profile: Profile) -> tuple[torch.device, Residency]:
    """Where a model runs, and where its weights are meanwhile. Raises InputError for a device that is not there."""
    device = checked_device(profile.device)
    return device, profile.residency if device.type != "cpu" else RESIDENT  # a CPU has no other place


def components_for(
    model: str | Path | None,
    profile: Profile,
    *,
    variant: str | None,
    fix_quotes: bool,
    say: Callable[[str], None],
    progress: Progress | None,
    trust_engine: bool = False,
) -> Components:
    """A model for a profile: from an engine if there is one, and one is built first if the profile needs it.

    Arguments as those of `Engine.load`. Raises InputError.
    """
    device, residency = home_of(profile)
    _check_products(profile, device)
    built = _engine_at(model)
    if built is None and (profile.quantises or profile.backend != "torch"):
        built = find_or_build(model, profile, say=say, progress=progress)
    elif built is None:
        built = find(model, profile)
    if built is not None:
        backend = backend_at(built, profile.backend, trusted=trust_engine)
        components = load_engine_folder(
            built,
            device=device,
            variant=variant,
            fix_quotes=fix_quotes,
            residency=residency,
            hollow=backend.name in HOLLOW,
        )
        return with_exported(components, backend, built)
    return load(
        model,
        device=device,
        dtype=getattr(torch, profile.dtype),
        vae_dtype=getattr(torch, profile.vae_dtype),
        variant=variant,
        fix_quotes=fix_quotes,
        residency=residency,
    )


def _check_products(profile: Profile, device: torch.device) -> None:
    """Raises InputError if torchao is asked for and cannot be had: before minutes of building."""
    try:
        for scheme in profile.weights.model_dump().values():
            product_of(profile.products, scheme, device)
    except ValueError as error:
        raise InputError(str(error)) from error


def _engine_at(model: str | Path | None) -> Path | None:
    """The folder of the engine that is named as a model."""
    return Path(model) if model is not None and (Path(model) / MANIFEST).is_file() else None
