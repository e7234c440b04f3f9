"""`step1x-engine calibrate`: parse, measure, fit, write; what is heavy is imported in the command."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from step1x.engine.errors import InputError
from step1x.engine.options import EXIT_CODES, PROFILE_HELP, DeviceName, Finite, debug_option
from step1x.engine.variants import DEFAULTS, VARIANTS

if TYPE_CHECKING:
    from step1x.engine.calibration import Calibration

PAIRS = 16
LEAST_STEPS = 8  # as calibration.LEAST_STEPS, which is not imported for --help
STEPS = 28  # at least, by default: those of the published constants (step-skipping.md §1.6)
PRESETS = [*VARIANTS, *DEFAULTS]
VARIANT_HELP = "Parity preset, which has the guidance rule.  [default: the model's]"
IMAGES_HELP = "Folder of pictures, of which the middle squares are edited.  [default: computed ones]"
INSTRUCTIONS_HELP = "Text file, one instruction a line.  [default: a dozen of ours]"
STEPS_HELP = f"Denoising steps; the fit holds for others too.  [default: the model's, at least {STEPS}]"


@dataclass(kw_only=True, slots=True)
class Job:
    """The words of the command."""

    model: str | None
    variant: str | None
    profile: str | None
    device: str | None
    images: Path | None
    instructions: Path | None
    pairs: int
    steps: int | None
    guidance: float | None
    size: int | None
    seed: int
    output: Path
    force: bool
    as_json: bool
    quiet: bool


@click.command(epilog=EXIT_CODES)
@click.option("--model", metavar="MODEL", help="Folder of weights or Hub id ORG/NAME.  [default: bundled]")
@click.option("--variant", type=click.Choice(PRESETS), metavar="NAME", help=VARIANT_HELP)
@click.option("--profile", metavar="NAME", help=PROFILE_HELP)
@click.option("--device", type=DeviceName(), metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--images", type=click.Path(path_type=Path), metavar="DIR", help=IMAGES_HELP)
@click.option("--instructions", type=click.Path(path_type=Path), metavar="FILE", help=INSTRUCTIONS_HELP)
@click.option("--pairs", type=click.IntRange(1, 10000), default=PAIRS, metavar="N", help=f"Edits.  [default: {PAIRS}]")
@click.option("--steps", type=click.IntRange(LEAST_STEPS, 1000), metavar="N", help=STEPS_HELP)
@click.option("--guidance", type=Finite(0, 1000), metavar="X", help="Guidance, 1 is none.  [default: the model's]")
@click.option("--size", type=click.IntRange(16, 8192), metavar="N", help="Size level.  [default: the model's]")
@click.option("--seed", type=click.IntRange(0, 2**32), default=0, metavar="N", help="Of the first edit.  [default: 0]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="calibration.json",
    metavar="FILE",
    help="Result.  [default: calibration.json]",
)
@click.option("--force", is_flag=True, help="Replace an existing result.")
@click.option("--json", "as_json", is_flag=True, help="Print what was fitted as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@debug_option
def calibrate(**words: Any) -> None:
    """Fit what step skipping goes by to a model.

    Edits pictures without leaving anything out, and fits how the velocity changes from step to step. `edit
    --calibration FILE` plans its speeds by the result; so does every edit by a model with a calibration.json in its
    folder. It holds for the guidance it was fitted with. Its path goes to standard output, all else to standard error.
    """
    from step1x.engine.calibration_pairs import INSTRUCTIONS, instructions, pictures

    job = Job(**words)
    files = None if job.images is None else pictures(job.images)
    lines = INSTRUCTIONS if job.instructions is None else instructions(job.instructions)
    if job.output.exists() and not job.force:
        raise InputError(f"{job.output} exists; --force replaces it")
    if not job.output.absolute().parent.is_dir():
        raise InputError(f"{job.output}: there is no such folder")
    found = _measured(job, files, lines)
    found.write(job.output, overwrite=job.force)
    if job.as_json:
        click.echo(json.dumps({"output": str(job.output), **found.model_dump(mode="json")}))
    else:
        click.echo(os.fsencode(job.output))
    if not job.quiet:
        click.echo(f"fitted to {found.pairs} edits by {found.setting}, {found.steps} steps", err=True)
        rank = "" if found.probe.rank is None else f", rank correlation within steps {found.probe.rank:.2f}"
        click.echo(f"TeaCache's probe: R2 {found.probe.r2:.2f}{rank}", err=True)


def _measured(job: Job, files: list[Path] | None, lines: Sequence[str]) -> "Calibration":
    """Load the model, edit, fit."""
    from step1x.engine.progress import Progress, terminal

    def note(line: str) -> None:
        if not job.quiet:
            click.echo(f"note: {line}", err=True)

    with Progress(terminal(job.quiet)) as progress:
        progress.stage("load")
        from step1x.engine.calibration import Setting, calibrated
        from step1x.engine.calibration_pairs import pairs
        from step1x.engine.pipeline import Engine

        engine = Engine.load(
            job.model,
            profile=job.profile,
            device=job.device,
            variant=job.variant,
            cache=False,
            say=note,
            progress=progress,
        )
        variant = engine.variant
        steps = max(variant.steps, STEPS) if job.steps is None else job.steps
        guidance = variant.guidance if job.guidance is None else job.guidance
        size = variant.size if job.size is None else job.size
        progress.stage("Editing")
        measured = []
        for index, (picture, words) in enumerate(pairs(job.pairs, size, files, lines)):
            seed = job.seed + index
            measured.append(engine.trajectory(picture, words, seed=seed, steps=steps, guidance=guidance, size=size))
            progress.step(index + 1, job.pairs)
        setting = Setting.of(variant, guidance, engine.digest)
        return calibrated(measured, setting, model=engine.name, variant=variant.name, size=size, seed=job.seed)
