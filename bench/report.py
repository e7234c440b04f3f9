"""Renders docs/performance.md and its plots from the committed records: floors, what others publish, what we measured.

    python bench/report.py [--results DIR] [--out docs]

Floors are arithmetic; our columns hold measured figures only, each with its device, commit and date.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from step1x.bench import formula, full
from step1x.bench.record import ROOT, Record, write_text
from step1x.engine import released
from step1x.engine.errors import InputError
from step1x.engine.image import Canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = (512, 768, 1024)
STEPS, BRANCHES = 28, 2
RATE = 790e12  # FLOP/s of large bf16 products that an H200 reaches: an estimate, 0.8 of its dense peak of 989
NOT_YET = "not measured yet"
OURS = {  # modes of the battery's part `dit`, as the page calls them
    "plain": "plain",
    "exact": "exact algebra",
    "kernels": "exact algebra, our kernels",
    "compiled": "exact algebra, compiled",
    "compiled_kernels": "exact algebra, our kernels, compiled",
}


def edit_flops(side: int) -> int:
    """FLOPs of the transformer in one edit with guidance at a size, without any skipping."""
    canvas = Canvas(side, side)
    rows = full.VARIANT.text_tokens
    return STEPS * formula.dit(released.dit_config(full.VERSION), 2 * canvas.tokens, rows, BRANCHES)


def shares(side: int) -> dict[str, float]:
    """Share of a step's FLOPs by what they are for."""
    config, canvas = released.dit_config(full.VERSION), Canvas(side, side)
    rows = 2 * canvas.tokens + full.VARIANT.text_tokens
    blocks = config.depth + config.depth_single
    parts = {
        "attention": 4 * config.hidden_size * rows**2 * blocks,
        "MLP": 4 * config.hidden_size * config.mlp_hidden * rows * blocks,
        "QKV and output": 8 * config.hidden_size**2 * rows * blocks,
        "connector": formula.connector(config.connector, full.VARIANT.text_tokens),
    }
    whole = formula.dit(config, 2 * canvas.tokens, full.VARIANT.text_tokens)
    parts["rest"] = whole - sum(parts.values())
    return {name: value / whole for name, value in parts.items()}


def load(folder: Path) -> list[Record]:
    """Every record in a folder, oldest first; other JSON is left alone."""
    records = []
    for path in sorted(folder.rglob("*.json")):
        try:
            records.append(Record.read(path))
        except InputError:
            continue
    return sorted(records, key=lambda record: record.place.date)


def newest(records: Sequence[Record], suite: str, size: str | None = None) -> Record | None:
    """The last record of a suite that was made on a GPU (battery) or anywhere (others)."""
    found = [one for one in records if one.suite == suite and size in (None, one.size)]
    return found[-1] if found else None


def page(records: Sequence[Record], published: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    battery = newest(records, "battery", "full")
    lines = [
        "# Performance",
        "",
        "Made by `python bench/report.py` from the records in `bench/results/`. Floors are arithmetic, the rows called",
        f"official are what others publish ({published['source']}; one H800), ours is measured or says so.",
        "",
        "## One edit at full size: 28 steps with guidance, seconds",
        "",
        "| | " + " | ".join(f"{side} × {side}" for side in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
        _row("PFLOP of the transformer", [f"{edit_flops(side) / 1e15:.2f}" for side in SIZES]),
        _row(f"floor at {RATE / 1e12:.0f} TFLOP/s", [f"{edit_flops(side) / RATE:.2f}" for side in SIZES]),
    ]
    for row in published["rows"]:
        lines.append(_row(row["what"], [_published(row, side) for side in SIZES]))
    lines += _ours(battery)
    lines += ["", "![seconds of an edit over its size](performance-sizes.png)", ""]
    lines += _transformer(battery) + _laptop(newest(records, "edit"))
    lines += [
        "",
        "## Where a step's arithmetic goes",
        "",
        "![share of FLOPs of one step](performance-step.png)",
        "",
    ]
    return "\n".join(lines)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _published(row: dict[str, Any], side: int) -> str:
    seconds, memory = row["seconds"].get(str(side)), row["gigabytes"].get(str(side))
    return "" if seconds is None else f"{seconds:g} ({memory:g} GB)"


def _metric(record: Record | None, name: str) -> float | None:
    return record.metrics[name].value if record is not None and name in record.metrics else None


def _cell(value: float | None, digits: int = 2) -> str:
    return NOT_YET if value is None else f"{value:.{digits}f}"


def _ours(battery: Record | None) -> list[str]:
    edits = [_metric(battery, f"e2e.{side}.edit") for side in SIZES]
    peaks = [_metric(battery, f"e2e.{side}.peak_reserved") for side in SIZES]
    cells = [
        _cell(seconds) + ("" if peak is None else f" ({peak / 1e9:.1f} GB)")
        for seconds, peak in zip(edits, peaks, strict=True)
    ]
    where = "" if battery is None else f" ({_place(battery)})"
    return [_row(f"**ours, bf16**{where}", cells)]


def _place(record: Record) -> str:
    return f"{record.place.device}, commit {record.place.commit[:12]}, {record.place.date[:10]}"


def _transformer(battery: Record | None) -> list[str]:
    """One step of both branches next to diffusers' Flux blocks, same device and run."""
    lines = [
        "## One step of the transformer, both guidance branches, seconds",
        "",
        "| | " + " | ".join(f"{side} × {side}" for side in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
    ]
    for mode, how in OURS.items():
        ours = [_metric(battery, f"dit.{side}.{mode}.seconds") for side in SIZES]
        lines.append(_row(f"ours, bf16, {how}", [_cell(value, 4) for value in ours]))
    for mode in ("eager", "compiled"):
        flux = [_metric(battery, f"peers.diffusers_flux.{side}.{mode}.seconds") for side in SIZES]
        lines.append(_row(f"diffusers' Flux blocks, bf16, {mode}", [_cell(value, 4) for value in flux]))
    return lines


OLDER_DEFAULT = (
    "That was with 12 steps. The bundled model's default is two steps without guidance, of which `--speed balanced` "
    "and `fast` leave nothing out."
)


def _laptop(record: Record | None) -> list[str]:
    lines = ["", "## The bundled checkpoint, without a GPU", ""]
    if record is None:
        return [*lines, NOT_YET]
    stages = {name.removeprefix("stage."): m.value for name, m in record.metrics.items() if name.startswith("stage.")}
    lines += [f"`step1x-engine bench` on {record.place.cpu}, {_place(record)}, {record.size}:", ""]
    lines += ["| stage | ms |", "|---|---|"]
    lines += [f"| {name} | {seconds * 1e3:.1f} |" for name, seconds in stages.items()]
    lines.append(f"| **edit** | **{record.metrics['edit'].value * 1e3:.1f}** |")
    return [*lines, "", OLDER_DEFAULT]


def plots(records: Sequence[Record], published: dict[str, Any], out: Path) -> None:
    """performance-sizes.png and performance-step.png in `out`. Needs matplotlib (extra `dev`)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    _sizes_plot(axes, newest(records, "battery", "full"), published)
    figure.savefig(out / "performance-sizes.png", dpi=110, metadata={"Software": None})
    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    _step_plot(axes)
    figure.savefig(out / "performance-step.png", dpi=110, metadata={"Software": None})
    pyplot.close("all")


def _sizes_plot(axes: "Axes", battery: Record | None, published: dict[str, Any]) -> None:
    axes.plot(SIZES, [edit_flops(side) / RATE for side in SIZES], "k--", label=f"floor, {RATE / 1e12:.0f} TFLOP/s")
    for row in published["rows"]:
        points = sorted((int(side), seconds) for side, seconds in row["seconds"].items())
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{row['what']} (published)")
    measured = [(side, value) for side in SIZES if (value := _metric(battery, f"e2e.{side}.edit")) is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), marker="s", linewidth=3, label="ours, bf16 (measured)")
    axes.set(xlabel="pixels on a side", ylabel="seconds", xticks=SIZES, ylim=(0, None))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _step_plot(axes: "Axes") -> None:
    left = [0.0] * len(SIZES)
    for name in shares(SIZES[0]):
        widths = [100 * shares(side)[name] for side in SIZES]
        axes.barh([str(side) for side in SIZES], widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="% of a step's FLOPs", ylabel="pixels on a side")
    axes.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.25))


@click.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), default=ROOT / "bench" / "results")
@click.option("--out", type=click.Path(path_type=Path, exists=True), default=ROOT / "docs")
def main(results: Path, out: Path) -> None:
    published = tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))
    records = load(results)
    write_text(out / "performance.md", page(records, published))
    plots(records, published, out)


if __name__ == "__main__":
    main()
