"""What this machine can run."""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from step1x.profiles import Profile, load_profile, profile_names

PACKAGES = ("step1x-engine", "torch", "triton", "transformers", "safetensors", "pillow")
GB = 1e9  # decimal, as cards are sold: an "80 GB" GPU reports 85 of them
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A CUDA device."""

    name: str
    memory_gb: float
    capability: str  # compute capability, "9.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What counts for running a model. `torch_error` is why torch could not be loaded, '' if it was."""

    system: str
    python: str
    versions: dict[str, str]  # package -> version, "" if it is not installed
    cores: int
    memory_gb: float  # what this process may use at most
    disk_gb: float  # free, in the current directory
    cuda: str  # the CUDA version that torch was built for, "" for a CPU build
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
        memory_gb=round(_memory() / GB, 1),
        disk_gb=round(shutil.disk_usage(".").free / GB, 1),
        cuda=cuda,
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
        f"machine   {machine.cores} cores, {machine.memory_gb} GB memory, {machine.disk_gb} GB disk free",
    ]
    for index, device in enumerate(machine.devices):
        lines.append(f"GPU {index}     {device.name}, {device.memory_gb} GB, compute capability {device.capability}")
    if machine.torch_error:
        lines.append(f"torch     cannot be loaded: {machine.torch_error}")
    elif not machine.devices:
        build = f"built for CUDA {machine.cuda}" if machine.cuda else "a CPU build"
        lines.append(f"GPU       none that torch can use (torch is {build})")
    lines += [f"{'runs' if v.fits else 'no':9} {v.profile}: {v.reason}" for v in verdicts(machine)]
    return "\n".join(lines)


def _verdict(profile: Profile, machine: Machine) -> Verdict:
    if machine.torch_error:
        return Verdict(profile=profile.name, fits=False, reason="torch cannot be loaded")
    if not profile.device.startswith("cuda"):
        alone = "" if machine.devices else "CPU only: "
        return Verdict(profile=profile.name, fits=True, reason=f"{alone}the bundled checkpoint")
    wanted = profile.budget_gb
    largest = max((device.memory_gb for device in machine.devices), default=0.0)
    if not machine.devices:
        return Verdict(profile=profile.name, fits=False, reason=f"needs a CUDA GPU with {wanted} GB")
    if largest < wanted:
        reason = f"needs a GPU with {wanted} GB; the largest here has {largest} GB"
        return Verdict(profile=profile.name, fits=False, reason=reason)
    newest = max(float(device.capability) for device in machine.devices)
    if newest < profile.capability:
        reason = f"needs compute capability {profile.capability}; the newest here has {newest}"
        return Verdict(profile=profile.name, fits=False, reason=reason)
    # docs/hardware.md lists what was measured; this goes by size alone and says so.
    return Verdict(profile=profile.name, fits=True, reason=f"by size: {largest} GB of {wanted} GB")


def _cuda() -> tuple[str, tuple[Device, ...], str]:
    """The CUDA version of torch, its devices, and why torch could not be loaded."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries
        return "", (), " ".join(str(error).split())
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        memory = round(found.total_memory / GB, 1)
        devices.append(Device(name=found.name, memory_gb=memory, capability=f"{found.major}.{found.minor}"))
    return torch.version.cuda or "", tuple(devices), ""


def _memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
