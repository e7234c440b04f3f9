"""`step1x-engine build` and `step1x-engine engines`: parse, call, print; what is heavy is imported in the commands."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from step1x.engine.errors import InputError
from step1x.engine.options import BACKEND_HELP, BACKENDS, EXIT_CODES, PROFILE_HELP, Finite, debug_option

if TYPE_CHECKING:
    from step1x.engine.store import Kept

KEY_SHOWN = 12  # digits of a key in lists: enough to name it
MODEL_HELP = "Folder of weights, Hub id ORG/NAME, or with --random-weights v1.0, v1.1 or v1.2.  [default: bundled]"
TARGET_HELP = "GPU that TensorRT builds for, such as sm_89; it need not be here.  [default: the one here]"
BLOCKS_HELP = "Only the first N double and N single blocks: to measure on a short disk."
UNUSABLE = EXIT_CODES.replace("1 we failed", "1 we failed or an engine is damaged")


@click.command(epilog=EXIT_CODES)
@click.option("--profile", metavar="NAME", help=PROFILE_HELP)
@click.option("--model", metavar="MODEL", help=MODEL_HELP)
@click.option("--backend", type=click.Choice(BACKENDS), help=BACKEND_HELP)
@click.option("--target", metavar="NAME", help=TARGET_HELP)
@click.option("--random-weights", "random", is_flag=True, help="Random weights of the model's shapes, for benchmarks.")
@click.option("--blocks", type=click.IntRange(1, 1000), metavar="N", help=BLOCKS_HELP)
@click.option("-o", "--output", metavar="DIR", help="Folder to build it in.  [default: by its key in the user's cache]")
@click.option("--verify", is_flag=True, help="Compare hashes of an engine that is there, and build again what differs.")
@click.option("--json", "as_json", is_flag=True, help="Print the engine's folder, key and size as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no notes.")
@debug_option
def build(*, profile: str | None, output: str | None, as_json: bool, quiet: bool, **words: Any) -> None:
    """Build the engine of a model for a profile, unless it is there already.

    Weights are read once, quantised as the profile says, and written as they are going to be loaded; --backend adds
    what is exported of them. A build that was ended goes on where it ended. The engine's folder goes to standard
    output, all else to standard error.
    """
    from step1x.engine.build import find_or_build
    from step1x.engine.loading import wanted_profile
    from step1x.engine.progress import Progress, terminal
    from step1x.engine.store import Manifest

    given, model = {"backend": words.pop("backend"), "target": words.pop("target")}, words.pop("model")
    wanted = wanted_profile(profile, given, model)
    console = terminal(quiet)

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    with Progress(console) as progress:
        folder = find_or_build(model, wanted, say=say, into=output, progress=progress, **words)
    if as_json:
        manifest = Manifest.read(folder)
        size = sum(file.size for file in manifest.files.values())
        click.echo(json.dumps({"folder": str(folder), "key": manifest.key, "bytes": size}))
    else:
        click.echo(os.fsencode(folder))


@click.group()
def engines() -> None:
    """What `build` has made."""


@engines.command("list", epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def engines_list(as_json: bool) -> None:
    """List the engines in the cache: key, profile, source, size, age."""
    from step1x.engine import store

    rows = [_row(one) for one in store.engines()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        size, age = f"{row['bytes'] / 1e9:.2f} GB", f"{row['days']:.1f} days"
        click.echo(f"{row['key'][:KEY_SHOWN]}  {row['profile']}  {row['source']}  {size}  {age}")
    if not rows:
        click.echo(f"no engines in {store.engines_folder()}", err=True)


def _row(one: "Kept") -> dict[str, Any]:
    facts = one.manifest.facts if one.manifest else None
    return {
        "key": one.key,
        "profile": facts["profile"] if facts else "damaged",
        "source": facts["source"]["name"] if facts else "damaged",
        "bytes": one.size,
        "days": round(one.days, 2),
        "folder": str(one.folder),
    }


@engines.command("verify", epilog=UNUSABLE)
@click.argument("engine", required=False)
@debug_option
@click.pass_context
def engines_verify(ctx: click.Context, engine: str | None) -> None:
    """Compare every file's SHA-256 with the manifest; exit code 1 if one differs.

    ENGINE is the beginning of a key, or a folder; without it, all that are in the cache. Nothing is changed: `build
    --verify` makes damaged files again.
    """
    from step1x.engine import store

    damaged = False
    for folder in _chosen(engine):
        store.check_private(folder)
        try:
            found = store.faults(folder, store.Manifest.read(folder), hashes=True)
        except InputError as error:
            found = {store.MANIFEST: str(error)}
        damaged = damaged or bool(found)
        for name, fault in found.items():
            click.echo(f"{folder / name}: {fault}")
        if not found:
            click.echo(f"{folder}: whole")
    if damaged:
        click.echo("damaged; `step1x-engine build --verify`, with what it was built with, makes it again", err=True)
        ctx.exit(1)


def _chosen(word: str | None) -> list[Path]:
    """The folders that ENGINE names. Raises InputError for none."""
    from step1x.engine import store

    if word is not None and Path(word).is_dir():
        return [Path(word).resolve()]
    found = [one.folder for one in store.engines() if one.key.startswith(word or "")]
    if word is not None and not found:
        raise InputError(f"{word}: no folder, and no key in {store.engines_folder()} begins so")
    return found


@engines.command("prune", epilog=EXIT_CODES)
@click.option("--all", "everything", is_flag=True, help="Remove every engine.")
@click.option("--older-than", type=Finite(0), metavar="DAYS", help="Also those built longer ago.")
@debug_option
def engines_prune(everything: bool, older_than: float | None) -> None:
    """Remove engines that nothing can load, and what unfinished builds have left.

    An engine that is damaged or was built by other versions is never found again. One that a process is building stays.
    """
    from step1x.engine import store
    from step1x.engine.parts import versions

    here = versions()

    def unwanted(one: "store.Kept") -> bool:
        usable = one.manifest is not None and one.manifest.facts["versions"] == here
        return everything or not usable or (older_than is not None and one.days > older_than)

    gone = store.prune(unwanted)
    click.echo(f"removed {gone / 1e6:.1f} MB", err=True)
