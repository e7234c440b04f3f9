"""The battery for a real GPU, part by part, and the same on a CPU in seconds with --smoke.

    python -m step1x.bench.battery [--part NAME] [--smoke] [--out DIR] [--again]

Each part runs in a process of its own, so that a crash or a full card costs one part, and leaves its record in DIR; a
part whose record of this commit is there already is not run again. DIR/battery.log has all that was said; the last
thing printed is a short table.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import torch

from step1x.bench.ceilings import timed
from step1x.bench.measure import device_name
from step1x.bench.own_cache import own_cache
from step1x.bench.record import ROOT, Kind, Metric, Record, place, revision
from step1x.engine.errors import InputError
from step1x.engine.loading import checked_device
from step1x.profiles import load_profile, profile_names

LOG = "battery.log"  # in the folder of records: what every part said
# Seconds that a part may take; together nine minutes.
PARTS = {"kernels": 120, "dit": 170, "e2e": 150, "peers": 90}
# A part for each profile with a budget, to be asked for by name; five of them are nine minutes.
PROFILES = {name: 105 for name in profile_names() if load_profile(name).budget_gb}
LIMITS = {**PARTS, **PROFILES, "skipping": 540, "tensorrt": 540}  # these, too, are asked for by name
# Precision -> the profile that has all of it resident, whose time the others of that precision are compared with.
RESIDENT = {"bf16": "bf16-80gb", "fp8": "fp8-80gb"}
PART_HELP = "Only these; a profile's name measures it.  [default: all but profiles, skipping and tensorrt]"
SMOKE = (*PARTS, "bf16-24gb", "fp8-18gb", "skipping", "tensorrt")
ENOUGH = 0.8  # of a part's time: nothing new is begun then


@dataclass(slots=True)
class Run:
    """One part being run: where, how large, and what it has found."""

    device: torch.device
    smoke: bool  # the bundled checkpoint's shapes instead of the released model's
    until: float = math.inf  # of time.monotonic: when this part should come to its end
    metrics: dict[str, Metric] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def put(self, name: str, value: float, unit: str, kind: Kind, *, higher: bool = False) -> None:
        """Keep a figure and print it, so that a part that is cut short has said what it knew."""
        better = "higher" if higher else "lower"
        self.metrics[name] = Metric(value=value, unit=unit, kind=kind, better=better)  # type: ignore[arg-type]
        click.echo(f"{name:44} {value:.6g} {unit}", err=True)

    def peak(self, name: str) -> None:
        """Peak bytes reserved on the GPU since the last call."""
        if self.device.type == "cuda":
            self.put(name, torch.cuda.max_memory_reserved(self.device), "B", "memory")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def late(self, what: str) -> bool:
        """Whether there is no time left for `what`; if so, that is noted."""
        late = time.monotonic() > self.until
        if late:
            self.notes[what] = "not measured: the part's time was up"
        return late

    def seconds(self, call: Callable[[], object], repeats: int = 5) -> float:
        """Median seconds of a call after a warm-up, by the device's own clock where it has one."""
        call()
        times = sorted(timed(call, self.device) for _ in range(1 if self.smoke else repeats))
        return times[len(times) // 2]


def run_part(name: str, smoke: bool, commit: str) -> Record:
    """One part in this process."""
    from step1x.bench import battery_kernels, battery_model, battery_tensorrt

    parts: dict[str, Callable[[Run], None]] = {
        "kernels": battery_kernels.kernels,
        "dit": battery_model.dit,
        "e2e": battery_model.e2e,
        "peers": battery_model.peers,
        **{name: partial(battery_model.profile, name=name) for name in PROFILES},
        "skipping": battery_model.skipping,
        "tensorrt": battery_tensorrt.tensorrt,
    }
    device = checked_device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(device, size_name(smoke) == "smoke", time.monotonic() + ENOUGH * LIMITS[name])
    with torch.no_grad():
        parts[name](run)
    return Record(
        suite="battery",
        place=place(device_name(device)).model_copy(update={"commit": commit}),
        profile="bf16-80gb" if device.type == "cuda" else "cpu",
        size=size_name(smoke),
        metrics=run.metrics,
        notes=run.notes,
    )


def size_name(smoke: bool) -> str:
    """Of the records. A machine without a GPU runs only the small shapes."""
    return "smoke" if smoke or not torch.cuda.is_available() else "full"


def done_already(path: Path, commit: str, size: str) -> bool:
    """Whether `path` holds a record of this commit and size."""
    try:
        found = Record.read(path)
    except InputError:
        return False
    return bool(commit) and (found.place.commit, found.size) == (commit, size)


def run_all(parts: Sequence[str], out: Path, commit: str, smoke: bool, again: bool) -> list[str]:
    """Each part in its own process; returns those that failed."""
    failed = []
    dirty = revision()[1]
    (out / LOG).unlink(missing_ok=True)
    for part in parts:
        path = out / f"{part}.json"
        if not again and not dirty and done_already(path, commit, size_name(smoke)):
            click.echo(f"{part}: {path} is of this commit, not run again (--again)", err=True)
            continue
        path.unlink(missing_ok=True)
        words = [sys.executable, "-m", "step1x.bench.battery", "--part", part, "--out", str(out)]
        words += ["--commit", commit, "--inside"]
        started = time.monotonic()
        end = _in_a_process([*words, *(["--smoke"] if smoke else [])], LIMITS[part], out / LOG)
        click.echo(f"{part}: {end or 'done'} in {time.monotonic() - started:.0f} s", err=True)
        if end:
            failed.append(part)
    return failed


def _in_a_process(words: Sequence[str], seconds: float, log: Path) -> str:
    """Runs a command with what it says on stderr in `log`, then here; returns how it failed, "" if it did not."""
    with log.open("a+", encoding="utf-8") as file:
        start = file.tell()
        try:
            code = subprocess.run(words, timeout=seconds, stderr=file).returncode
            end = "" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            end = f"stopped after {seconds:g} s"
        file.seek(start)
        click.echo(file.read(), err=True, nl=False)
    return end


def merged(out: Path, commit: str, size: str) -> Record:
    """The records of the parts in `out` as one, those of this commit and size. Raises ClickException if none."""
    records, notes = {}, {}
    for part in LIMITS:
        path = out / f"{part}.json"
        if not path.exists():
            if part in PARTS:
                notes[part] = "no record: it failed or was not run"
        elif (found := Record.read(path)).place.commit != commit:
            notes[part] = f"its record is of another commit: {found.place.commit[:12]}"
        elif found.size != size:
            notes[part] = f"its record is of another size: {found.size}"
        else:
            records[part] = found
    if not records:
        raise click.ClickException("no part left a record")
    last = list(records.values())[-1]
    metrics = {name: metric for record in records.values() for name, metric in record.metrics.items()}
    metrics |= ratios(metrics)
    notes |= {key: text for record in records.values() for key, text in record.notes.items()}
    return last.model_copy(update={"metrics": metrics, "notes": notes})


def ratios(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Of the time of each profile's edits to that of the profile of its precision that has everything resident."""
    found = {}
    for name in PROFILES:
        peer = RESIDENT.get(name.split("-")[0])
        for key, metric in metrics.items():
            of_peer = metrics.get(key.replace(name, str(peer)))
            if name != peer and key.startswith(f"{name}.") and key.endswith(".edit") and of_peer is not None:
                ratio = metric.value / of_peer.value
                found[key.removesuffix("edit") + "of_80gb"] = Metric(value=ratio, unit="", kind="info")
    return found


def table(record: Record) -> str:
    """The figures that one reads first, and every note."""
    lines = [f"{record.place.device}, {record.size}, commit {record.place.commit[:12] or 'unknown'}"]
    lines += [
        f"{name:44} {metric.value:.5g} {metric.unit}".rstrip()
        for name, metric in sorted(record.metrics.items())
        if not name.startswith("e2e.") or name.endswith((".edit", ".step"))
    ]
    lines += [f"{name}: {text}" for name, text in record.notes.items()]
    return "\n".join(lines)


@click.command(help="Measure this machine's GPU (or, with --smoke, prove on a CPU that the measurement runs).")
@click.option("--part", "parts", multiple=True, type=click.Choice(list(LIMITS)), help=PART_HELP)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "bench" / "results", help="Folder of records.")
@click.option("--smoke", is_flag=True, help="Small shapes: seconds, on any machine.")
@click.option("--again", is_flag=True, help="Run parts again whose record of this commit is there.")
@click.option("--commit", metavar="HASH", help="Of this tree, where git cannot tell.  [default: git's]")
@click.option("--inside", is_flag=True, hidden=True)
def main(parts: tuple[str, ...], out: Path, commit: str | None, **how: bool) -> None:
    smoke, again, inside = how["smoke"], how["again"], how["inside"]
    commit = revision()[0] if commit is None else commit
    out.mkdir(parents=True, exist_ok=True)
    if inside:
        run_part(parts[0], smoke, commit).write(out / f"{parts[0]}.json")
        return
    if not smoke and not torch.cuda.is_available():
        raise click.UsageError("no CUDA device here; --smoke runs every part on the CPU with small shapes")
    chosen = parts or (SMOKE if smoke else tuple(PARTS))
    with own_cache():  # one for all parts: what the first compiles the next need not
        failed = run_all(chosen, out, commit, smoke, again)
    record = merged(out, commit, size_name(smoke))
    record.write(out / "battery.json")
    click.echo(table(record))
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
