"""`step1x-engine quant`: what quantisation costs. Parse, call, print; what is heavy is imported in the command."""

from pathlib import Path
from typing import Any

import click

from step1x.engine.options import EXIT_CODES, DeviceName, debug_option
from step1x.quant.rules import COMPONENTS
from step1x.quant.schemes import SCHEMES

PHOTOS_HELP = "Folder of .jpg files, each edited in six ways.  [default: six computed pictures]"
QUANTISED = [scheme for scheme in SCHEMES if scheme != "plain"]


@click.group(epilog=EXIT_CODES)
def quant() -> None:
    """Quantised weights: what they cost in quality."""


@quant.command(epilog=EXIT_CODES)
@click.option("--model", metavar="MODEL", help="Folder of weights or Hub id.  [default: bundled]")
@click.option("--profile", metavar="NAME", help="Profile or .toml file.  [default: auto]")
@click.option("--device", type=DeviceName(), metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--component", type=click.Choice(COMPONENTS), default="dit", show_default=True, help="What is quantised.")
@click.option("--scheme", "schemes", multiple=True, type=click.Choice(QUANTISED), help="Only these.  [default: all]")
@click.option("--layers/--no-layers", default=True, show_default=True, help="Each layer alone too: one edit for each.")
@click.option("--photos", type=click.Path(path_type=Path), metavar="DIR", help=PHOTOS_HELP)
@click.option("--size", type=click.IntRange(16, 8192), metavar="N", help="Size level.  [default: the model's]")
@click.option("--steps", type=click.IntRange(1, 1000), metavar="N", help="Denoising steps.  [default: the model's]")
@click.option("--json", "out", metavar="FILE", help="Also write the figures as JSON; - is standard output.")
@debug_option
def report(out: str | None, **words: Any) -> None:
    """Compare edits with quantised layers to those without: SQNR of each layer's output, PSNR of the pictures."""
    from step1x.bench.quantisation import Settings, measure
    from step1x.bench.quantisation import report as text
    from step1x.bench.record import one_metric_a_line

    record = measure(Settings(**{**words, "schemes": words["schemes"] or QUANTISED}))
    if out == "-":
        click.echo(one_metric_a_line(record), nl=False)
        return
    click.echo(text(record))
    if out is not None:
        record.write(out)
