"""The one JSON form of every measurement: where it was made, of what, and its figures by name.

Counters, wall times, the GPU battery and `step1x-engine bench` write it; comparisons, the gate and the report read it.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from step1x.engine.errors import InputError

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "diffusers", "torchao")

Kind = Literal["end-to-end", "step", "stage", "memory", "count", "info"]
Better = Literal["lower", "higher"]


class Metric(BaseModel):
    """One figure. Its kind says how far it may move (compare.py); "info" is never judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float = Field(allow_inf_nan=False)
    unit: str  # "s", "B", "FLOP", "FLOP/s", "B/s", "" for plain counts and ratios
    kind: Kind
    better: Better = "lower"


class Place(BaseModel):
    """The machine, the versions and the commit that figures were made with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str  # "cpu" or the GPU's name
    cpu: str
    python: str
    versions: dict[str, str]  # package -> version, of those that are installed
    commit: str  # "" outside a git checkout
    dirty: bool
    date: str  # UTC, ISO 8601


class Record(BaseModel):
    """One run of one measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    suite: str  # "counters", "paired", "benchmarks", "battery", "edit"
    place: Place
    profile: str
    size: str  # "128x128", or "all" where the metrics' names carry it
    metrics: dict[str, Metric]
    notes: dict[str, str] = {}  # what was not measured, and why; settings that matter

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """A record from its file. Raises InputError, one line, for anything else."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{path}: not a record of a measurement: {where or 'JSON'}: {first['msg']}") from error

    def write(self, path: str | Path) -> None:
        """Writes the record whole, one metric a line, so that a change shows as a line of a diff. Raises InputError."""
        write_text(Path(path), one_metric_a_line(self))


def one_metric_a_line(model: BaseModel) -> str:
    """JSON of a model that has `metrics`."""
    values = model.model_dump()
    metrics = values.pop("metrics")
    head = json.dumps(values, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = [f"  {json.dumps(name)}: {json.dumps(metrics[name])}" for name in sorted(metrics)]
    return head + ',\n "metrics": {\n' + ",\n".join(lines) + "\n }\n}\n"


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises InputError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from error
    finally:
        temporary.unlink(missing_ok=True)


def place(device: str = "cpu") -> Place:
    """Here and now; `device` is "cpu" or a GPU's name."""
    commit, dirty = revision()
    return Place(
        device=device,
        cpu=cpu_name(),
        python=platform.python_version(),
        versions={name: version for name in PACKAGES if (version := _version(name))},
        commit=commit,
        dirty=dirty,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def revision(root: Path = ROOT) -> tuple[str, bool]:
    """The commit of a checkout ("" if it is none) and whether files in it differ from that commit."""
    try:
        commit = git("rev-parse", "HEAD", root=root)
        return commit, bool(git("status", "--porcelain", root=root))
    except (OSError, subprocess.CalledProcessError):
        return "", False


def git(*words: str, root: Path = ROOT) -> str:
    """What git prints. Raises OSError or CalledProcessError."""
    done = subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def counts(values: Mapping[str, float], unit: str = "", kind: Kind = "count") -> dict[str, Metric]:
    """Several figures of one unit, lower being better."""
    return {name: Metric(value=value, unit=unit, kind=kind) for name, value in values.items()}
