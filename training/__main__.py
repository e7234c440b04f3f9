"""python -m step1x.training: train the bundled checkpoint from a folder of photographs."""

from pathlib import Path

import click
import torch

from step1x.engine.errors import InputError
from step1x.training.recipe import RECIPES


@click.group()
def program() -> None:
    """Training of Step1X-Edit models."""


@program.command()
@click.option(
    "--photos",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder of photographs to train on.",
)
@click.option("--hours", type=click.FloatRange(0, min_open=True), required=True, help="Time to train for.")
@click.option(
    "--recipe", type=click.Choice(list(RECIPES)),
    help="Size; cpu-local is for going on from --init with edits of a part.  [default: gpu with CUDA, else cpu]",
)  # fmt: skip
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda if there is one]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--run", "folder", type=click.Path(path_type=Path), default=Path("runs/tiny"), show_default=True,
    help="States of the run; the same command goes on from there.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("runs/step1x-tiny"), show_default=True,
    help="The model folder to write; must not exist.",
)  # fmt: skip
@click.option("--init", type=click.Path(path_type=Path, exists=True), help="Model folder to start from.")
def tiny(
    photos: Path,
    hours: float,
    recipe: str | None,
    device: str | None,
    seed: int,
    folder: Path,
    output: Path,
    init: Path | None,
) -> None:
    """Train step1x-tiny: autoencoder, then transformer, connector and text model together."""
    from step1x.training.bundle import write_bundle
    from step1x.training.tiny import Run, run_training

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = RECIPES[recipe or ("gpu" if place.type == "cuda" else "cpu")]
    try:
        if output.exists():
            raise InputError(f"{output}: exists already; nothing is overwritten")
        run = Run(recipe=chosen, photos=photos, folder=folder, hours=hours, device=place, seed=seed, init=init)
        vae, editor = run_training(run)
        write_bundle(output, editor.dit, vae, editor.text)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(output)


if __name__ == "__main__":
    program()
