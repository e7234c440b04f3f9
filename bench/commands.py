"""`step1x-engine bench`: measure, compare, gate. Parse, call, print; what is heavy is imported in the commands."""

from typing import TYPE_CHECKING

import click

from step1x.engine.errors import InputError
from step1x.engine.options import EXIT_CODES, PROFILE_HELP, DeviceName, Finite, debug_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from step1x.bench.compare import Row
    from step1x.bench.record import Record

GROUP_NAMES = ("edit", "graphs", "full", "text", "startup")  # of counters.py, which is heavy to import
WORSE = EXIT_CODES.replace("1 we failed", "1 we failed or a figure is worse")
JSON_HELP = "Also write the figures as JSON; - is standard output."


@click.group(invoke_without_command=True, epilog=EXIT_CODES)
@click.option("--model", metavar="MODEL", help="Folder of weights or Hub id.  [default: bundled]")
@click.option("--profile", metavar="NAME", help=PROFILE_HELP)
@click.option("--device", type=DeviceName(), metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--size", type=click.IntRange(16, 8192), metavar="N", help="Size level.  [default: the model's]")
@click.option("--steps", type=click.IntRange(1, 1000), metavar="N", help="Denoising steps.  [default: the model's]")
@click.option("--guidance", type=Finite(0, 1000), metavar="X", help="Guidance, 1 is none.  [default: the model's]")
@click.option("--runs", type=click.IntRange(1, 100), metavar="N", default=3, show_default=True, help="Warm edits.")
@click.option("--json", "out", metavar="FILE", help=JSON_HELP)
@debug_option
@click.pass_context
def bench(ctx: click.Context, /, out: str | None, **words: object) -> None:
    """Time edits on this machine: seconds of each stage, peak memory, ratio to what the device allows.

    Without a command it measures here; the commands compare records and guard the project's own figures.
    """
    if ctx.invoked_subcommand is not None:
        return
    from step1x.bench.measure import Settings, measure, report

    record = measure(Settings(**words))  # type: ignore[arg-type]
    if out != "-":
        click.echo(report(record))
    _keep(record, out)


@bench.command(epilog=WORSE)
@click.argument("old")
@click.argument("new")
@debug_option
@click.pass_context
def compare(ctx: click.Context, old: str, new: str) -> None:
    """Compare the records OLD and NEW; exit code 1 if NEW is worse than its kind of figure may be.

    Tolerances: whole edits and steps 5 %, stages 15 %, memory 1 %, counters none; a missing figure fails.
    """
    from step1x.bench.compare import compare as rows_of
    from step1x.bench.compare import regressions
    from step1x.bench.record import Record

    rows = rows_of(Record.read(old), Record.read(new))
    _print(_comparison(rows))
    worse = regressions(rows)
    if worse:
        click.echo(f"{len(worse)} of {len(rows)} figures regressed: {', '.join(row.name for row in worse)}", err=True)
        ctx.exit(1)


def _comparison(rows: "Sequence[Row]") -> "Table":
    from rich.table import Table

    table = Table("figure", "kind", "old", "new", "new/old", box=None, pad_edge=False)
    for row in rows:
        judged = row.worse_by is not None and row.kind != "info"
        better = judged and row.worse_by is not None and row.worse_by < 0
        style = "red" if row.regressed else "green" if better else None
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.name, row.kind, _figure(row.old, row.unit), _figure(row.new, row.unit), ratio, style=style)
    return table


def _figure(value: float | None, unit: str) -> str:
    return "missing" if value is None else f"{value:,.6g} {unit}".rstrip()


def _print(table: "Table") -> None:
    """Whole rows, whatever the terminal's width; colours on a terminal only."""
    import sys

    from rich.console import Console

    console = Console(file=sys.stdout)
    console.print(table, soft_wrap=True, width=max(console.width, 160))


@bench.command(epilog=WORSE)
@click.option("--group", "groups", multiple=True, type=click.Choice(GROUP_NAMES), help="Only these.  [default: all]")
@click.option("--json", "out", metavar="FILE", help=JSON_HELP)
@debug_option
@click.pass_context
def gate(ctx: click.Context, groups: tuple[str, ...], out: str | None) -> None:
    """Count again and compare with the accepted baseline; exit code 1 if any figure is worse."""
    from step1x.bench import counters
    from step1x.bench.gate import Baseline, differences, of_groups, verdict

    baseline = Baseline.read()
    chosen = groups or GROUP_NAMES
    record = counters.measure(chosen)
    found = differences(of_groups(baseline.metrics, chosen), record.metrics)
    holds, lines = verdict(found, baseline.place, record.place)
    for line in lines:
        click.echo(line, err=True)
    _keep(record, out)
    if not holds:
        ctx.exit(1)
    click.echo(f"{len(record.metrics)} counters, none worse than accepted", err=True)


@bench.command(epilog=EXIT_CODES)
@click.option("--why", required=True, metavar="TEXT", help="Why the figures are right; kept in the baseline.")
@debug_option
def accept(why: str) -> None:
    """Make what is counted now the baseline, with the reason."""
    from step1x.bench import counters
    from step1x.bench.gate import BASELINE
    from step1x.bench.gate import accept as accepted

    if not why.strip():
        raise InputError("--why is empty; say why these figures are right")
    for change in accepted(counters.measure(), why):
        click.echo(str(change), err=True)
    click.echo(str(BASELINE))


@bench.command(epilog=WORSE)
@click.argument("revision", required=False)
@click.option("--pairs", type=click.IntRange(10, 1000), metavar="N", default=12, show_default=True, help="A B pairs.")
@click.option("--json", "out", metavar="FILE", help=JSON_HELP)
@debug_option
@click.pass_context
def paired(ctx: click.Context, revision: str | None, pairs: int, out: str | None) -> None:
    """Time this checkout against REVISION, pair by pair; exit code 1 if any figure is slower for certain.

    REVISION defaults to where this branch left the main one; on the main branch, to the commit before.
    """
    from step1x.bench import paired as pairing
    from step1x.bench.record import ROOT

    against = revision or pairing.base()
    with pairing.checkout(against) as tree:
        ratios = pairing.measure(ROOT, tree, pairs=pairs)
    click.echo(f"seconds over those of {against[:12]}, median of {pairs} pairs [95 % interval]", err=True)
    for one in ratios:
        click.echo(str(one), err=True)
    _keep(pairing.record(ratios, against), out)
    slower = [one.name for one in ratios if one.slower]
    if slower:
        click.echo(f"slower than {against[:12]} by over {pairing.LIMIT - 1:.0%}: {', '.join(slower)}", err=True)
        ctx.exit(1)


def _keep(record: "Record", out: str | None) -> None:
    """Write a record where --json says."""
    from step1x.bench.record import one_metric_a_line

    if out == "-":
        click.echo(one_metric_a_line(record), nl=False)
    elif out is not None:
        record.write(out)
