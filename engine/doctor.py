"""What this machine can run."""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from step1x.engine.auto_profile import USUAL, fit
from step1x.engine.card import Card, card_at, free_host_memory, total_host_memory
from step1x.engine.engine_config import model_sizes
from step1x.engine.uses import Uses, uses, words
from step1x.profiles import Profile, load_profile, profile_names

PACKAGES = ("step1x-engine", "torch", "torchao", "triton", "transformers", "safetensors", "pillow")
GB = 1e9  # decimal, as cards are sold: an "80 GB" GPU reports 85 of them
DRIVER = Path("/sys/module/nvidia/version")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A CUDA device."""

    name: str
    memory_gb: float
    capability: str  # compute capability, "9.0"
    memory_bytes: int
    multiprocessors: int

    @classmethod
    def of(cls, card: Card) -> Self:
        return cls(
            name=card.name,
            memory_gb=round(card.total_memory / GB, 1),
            capability=str(card.compute),
            memory_bytes=card.total_memory,
            multiprocessors=card.multiprocessors,
        )

    @property
    def card(self) -> Card:
        major, _, minor = self.capability.partition(".")
        return Card(self.name, self.memory_bytes, (int(major), int(minor)), self.multiprocessors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What counts for running a model. `torch_error` is why torch could not be loaded, '' if it was."""

    system: str
    python: str
    versions: dict[str, str]  # package -> version, "" if it is not installed
    cores: int
    memory_gb: float  # what this process may use at most
    free_memory_gb: float  # of that, now
    disk_gb: float  # free, in the current directory
    cuda: str  # the CUDA version that torch was built for, "" for a CPU build
    driver: str  # of NVIDIA, "" if it is not there
    devices: tuple[Device, ...]
    torch_error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a profile can run here, and why."""

    profile: str
    fits: bool
    reason: str


def examine() -> Machine:
    """Look at this machine. Loads torch; changes nothing."""
    cuda, devices, error = _cuda()
    return Machine(
        system=platform.platform(terse=True),
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=round(total_host_memory() / GB, 1),
        free_memory_gb=round(free_host_memory() / GB, 1),
        disk_gb=round(shutil.disk_usage(".").free / GB, 1),
        cuda=cuda,
        driver=_driver(),
        devices=devices,
        torch_error=error,
    )


def verdicts(machine: Machine) -> list[Verdict]:
    """A verdict on each shipped profile."""
    return [_verdict(load_profile(name), machine) for name in profile_names()]


def report(machine: Machine) -> str:
    """The findings for people, one fact a line."""
    versions = machine.versions
    packages = [f"{name} {versions[name] or 'missing'}" for name in PACKAGES[1:]]
    lines = [
        f"step1x-engine {versions['step1x-engine']}, Python {machine.python}, {machine.system}",
        f"packages  {', '.join(packages)}",
        f"machine   {machine.cores} cores, {machine.memory_gb} GB memory, {machine.free_memory_gb} GB free, "
        f"{machine.disk_gb} GB disk free",
    ]
    for index, device in enumerate(machine.devices):
        lines.append(f"GPU {index}     {device.name}, {device.memory_gb} GB, compute capability {device.capability}")
    if machine.devices:
        lines.append(f"CUDA      {machine.cuda}, driver {machine.driver or 'unknown'}")
    if machine.torch_error:
        lines.append(f"torch     cannot be loaded: {machine.torch_error}")
    elif not machine.devices:
        build = f"built for CUDA {machine.cuda}" if machine.cuda else "a CPU build"
        lines.append(f"GPU       none that torch can use (torch is {build})")
    lines += [f"{'runs' if v.fits else 'no':9} {v.profile}: {v.reason}" for v in verdicts(machine)]
    for found in what_is_used(machine):
        lines += ["", *words(found)]
    return "\n".join(lines)


def _verdict(profile: Profile, machine: Machine) -> Verdict:
    if machine.torch_error:
        return Verdict(profile=profile.name, fits=False, reason="torch cannot be loaded")
    if not profile.device.startswith("cuda"):
        alone = "" if machine.devices else "CPU only: "
        return Verdict(profile=profile.name, fits=True, reason=f"{alone}the bundled checkpoint")
    if not machine.devices:
        return Verdict(profile=profile.name, fits=False, reason=f"needs a CUDA GPU with {profile.budget_gb} GB")
    sizes, host = model_sizes(USUAL), round(machine.free_memory_gb * GB)
    found = [fit(sizes, profile, device.card, host, small=False) for device in machine.devices]
    best = next((index for index, one in enumerate(found) if one.fits), 0)
    where = f"cuda:{best} " if len(found) > 1 else ""
    # docs/hardware.md lists what was measured; this is a plan and says so.
    return Verdict(profile=profile.name, fits=found[best].fits, reason=where + found[best].reason)


def what_is_used(machine: Machine) -> list[Uses]:
    """By default, on every device; on the CPU if there is none. First use of a kernel on a GPU is its check here."""
    import torch

    from step1x.quant.choice import why_not_torchao

    host, lacking = round(machine.free_memory_gb * GB), why_not_torchao()
    if machine.torch_error or not machine.devices:
        return [] if machine.torch_error else [uses(torch.device("cpu"), None, host, lacking)]
    devices = enumerate(machine.devices)
    return [uses(torch.device("cuda", index), device.card, host, lacking) for index, device in devices]


def _cuda() -> tuple[str, tuple[Device, ...], str]:
    """The CUDA version of torch, its devices, and why torch could not be loaded."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries
        return "", (), " ".join(str(error).split())
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.version.cuda or "", tuple(Device.of(card_at(f"cuda:{index}")) for index in range(count)), ""


def _driver() -> str:
    """The version of NVIDIA's kernel module, "" if it is not there."""
    try:
        return DRIVER.read_text().strip()
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
