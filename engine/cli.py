"""The command line: parse, call, save. Heavy imports happen inside the commands: --help is instant."""

import dataclasses
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from step1x.bench.commands import bench
from step1x.bench.quant_commands import quant
from step1x.engine.build_commands import build, engines
from step1x.engine.calibrate_commands import calibrate
from step1x.engine.errors import InputError
from step1x.engine.options import (
    BACKEND_HELP,
    BACKENDS,
    EXIT_CODES,
    PROFILE_HELP,
    SPEEDS,
    DeviceName,
    Finite,
    Switch,
    debug_option,
)
from step1x.engine.plan_commands import plan, profiles
from step1x.engine.variants import DEFAULTS, VARIANTS

if TYPE_CHECKING:
    from step1x.engine.info import ModelInfo
    from step1x.engine.layouts import Layout
    from step1x.engine.picture import Picture
    from step1x.engine.request import Edit

LARGEST_SEED = 2**63 - 1  # what a torch generator takes
PRESETS = [*VARIANTS, *DEFAULTS]
OUTPUT_HELP = "Result: .png, .jpg, .jpeg or .webp; - is standard output (PNG).  [default: IMG-edited.png]"
VARIANT_HELP = f"Parity preset: {', '.join(PRESETS)}.  [default: the model's]"
BRANCHES_HELP = "Both forwards of guidance at once, or one by one.  [default: the model's]"
ALGEBRA_HELP = "Rewrites that change rounding only.  [default: on]"
CALIBRATION_HELP = "What `calibrate` has fitted to the model, for speeds.  [default: the model's]"
SPEED_HELP = "How much is left out of the steps; exact: nothing.  [default: the profile's]"
KERNELS_HELP = "Our own on a GPU: all but what loses on its chip, all, none.  [default: the profile's]"
ATTENTION = ["auto", "sdpa", "merged", "triton", "fp8", "flash3", "sage"]
ATTENTION_HELP = f"Who computes attention: {', '.join(ATTENTION)}.  [default: the profile's]"
PRODUCTS_HELP = "Who multiplies rows quantised as they come.  [default: the profile's]"
COMPILE_HELP = "Compile: a slow first edit of each size, then faster ones.  [default: the profile's]"
STRENGTH_HELP = "Noise added to the source, above 0; 1 is all of it.  [default: start from noise]"


@dataclass(kw_only=True, slots=True)
class Session:
    """One run of the program."""

    debug: bool = False


class Program(click.Group):
    """The one place where an error becomes a line on stderr and an exit code."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        session = Session()
        try:
            with _undisturbed():
                result = super().main(*args, **{**extra, "standalone_mode": False, "obj": session})
            code = result if isinstance(result, int) else 0
        except click.Abort as error:  # click says Abort for Ctrl-C, but for a library's EOFError too
            torn = isinstance(error.__cause__, EOFError)
            code = _fail("EOFError: a file ended early", 1, session) if torn else _fail("interrupted", 130)
        except KeyboardInterrupt:
            code = _fail("interrupted", 130)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            code = 2
        except click.ClickException as error:
            code = _fail(_usage(error), 2)
        except InputError as error:
            code = _fail(str(error), 2, session)
        except Exception as error:
            hint = "" if session.debug else " (--debug shows where)"
            code = _fail(f"{_words(error)}{hint}", 1, session)
        sys.exit(code)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep libraries' warnings and logs out of our lines, but take a picture bomb's warning for an error."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # By message: naming Pillow's class imports Pillow, which warns while decoding some GIF and TIFF files.
        warnings.filterwarnings("error", message=".*decompression bomb")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


def _fail(message: str, code: int, session: Session | None = None) -> int:
    """Say `message` on one line of stderr, whatever is in it; with --debug, the traceback before it."""
    if session and session.debug:
        traceback.print_exc()
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message.strip())
    click.echo(f"error: {line}", err=True)
    return code


def _usage(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split()).removesuffix(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return text[:1].lower() + text[1:] + (f"; see {context.command_path} --help" if context else "")


def _words(error: Exception) -> str:
    """What happened, for an error that is ours or the machine's."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror.lower()}" + (f": {error.filename!r}" if error.filename else "")
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


@click.group(cls=Program, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="step1x-engine", message="%(package)s %(version)s")
def program() -> None:
    """Edit pictures by instruction with Step1X-Edit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The words of one edit command."""

    img: str
    instruction: str
    output: str | None
    model: str | None
    variant: str | None
    profile: str | None
    steps: int | None
    guidance: float | None
    size: int | None
    seed: int | None
    negative_prompt: str
    strength: float | None
    fix_quotes: bool
    branches: str | None
    exact_algebra: bool
    speed: str | None
    mask: str | None
    calibration: str | None
    kernels: str | None
    attention: str | None
    products: str | None
    compiled: bool | None
    backend: str | None
    trust_engine: bool
    device: str | None
    no_cache: bool
    force: bool
    no_metadata: bool
    as_json: bool
    quiet: bool

    def __post_init__(self) -> None:
        if not self.instruction.strip():
            raise InputError("the instruction is empty; say what to change")
        for what, text in (("instruction", self.instruction), ("negative prompt", self.negative_prompt)):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"the {what} is not UTF-8 text")
        if self.img == "-" and self.output is None:
            raise InputError("a picture from standard input has no name; give -o FILE, or -o - for standard output")
        if self.mask == "-":
            raise InputError("a mask cannot come from standard input; name its file")
        if self.output == "-" and self.as_json:
            raise InputError("-o - and --json both write to standard output; choose one")

    @property
    def target(self) -> str:
        """Where the result goes; "-" is standard output."""
        if self.output is not None:
            return self.output
        source = Path(self.img)
        return str(source.with_name(f"{source.stem}-edited.png"))


@program.command(epilog=EXIT_CODES)
@click.argument("img", metavar="IMG")
@click.argument("instruction")
@click.option("-o", "--output", metavar="FILE", help=OUTPUT_HELP)
@click.option("--model", metavar="MODEL", help="Folder of weights or Hub id ORG/NAME.  [default: bundled]")
@click.option("--variant", type=click.Choice(PRESETS), metavar="NAME", help=VARIANT_HELP)
@click.option("--profile", metavar="NAME", help=PROFILE_HELP)
@click.option("--steps", type=click.IntRange(1, 1000), metavar="N", help="Denoising steps.  [default: the model's]")
@click.option("--guidance", type=Finite(0, 1000), metavar="X", help="Guidance, 1 is none.  [default: the model's]")
@click.option("--size", type=click.IntRange(16, 8192), metavar="N", help="Size level.  [default: the model's]")
@click.option("--seed", type=click.IntRange(0, LARGEST_SEED), metavar="N", help="Noise seed.  [default: random]")
@click.option("--negative-prompt", metavar="TEXT", default="", help="What to steer away from.")
@click.option("--strength", type=Finite(0, 1, min_open=True), metavar="X", help=STRENGTH_HELP)
@click.option("--fix-quotes", is_flag=True, help="Keep a lone apostrophe or quote from garbling the instruction.")
@click.option("--branches", type=click.Choice(["batched", "sequential"]), help=BRANCHES_HELP)
@click.option("--exact-algebra", type=Switch(), default="on", metavar="on|off", help=ALGEBRA_HELP)
@click.option("--speed", type=click.Choice(SPEEDS), help=SPEED_HELP)
@click.option("--mask", metavar="FILE", help="Picture that is bright, or opaque, where the edit may change something.")
@click.option("--calibration", metavar="FILE", help=CALIBRATION_HELP)
@click.option("--kernels", type=click.Choice(["auto", "on", "off"]), help=KERNELS_HELP)
@click.option("--attention", type=click.Choice(ATTENTION), metavar="NAME", help=ATTENTION_HELP)
@click.option("--products", type=click.Choice(["auto", "torch", "torchao"]), help=PRODUCTS_HELP)
@click.option("--compile/--no-compile", "compiled", default=None, help=COMPILE_HELP)
@click.option("--backend", type=click.Choice(BACKENDS), help=BACKEND_HELP)
@click.option("--trust-engine", is_flag=True, help="Run the code of an exported engine that is not in your cache.")
@click.option("--device", type=DeviceName(), metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--no-cache", is_flag=True, help="Neither use nor keep embeddings of pictures and instructions.")
@click.option("--force", is_flag=True, help="Replace an existing result.")
@click.option("--no-metadata", is_flag=True, help="Leave instruction, seed and settings out of the PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print the result's path, seed and timings as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@debug_option
def edit(**words: Any) -> None:
    """Change the picture IMG as INSTRUCTION says.

    IMG is a PNG, JPEG, WebP, BMP, TIFF or GIF file, or - for standard input. The path of the result goes to
    standard output, all else to standard error.
    """
    job = Job(**words)
    picture = _check(job)
    started = time.monotonic()
    result = _run(job, picture)
    _report(job, result, time.monotonic() - started)


def _check(job: Job) -> "Picture":
    """The opened source, after everything that can be refused without a model has been."""
    from step1x.engine.named_profile import AUTO, named_profile
    from step1x.engine.picture import check_target, keeps_alpha, open_picture

    if job.profile not in (None, AUTO):  # which machine this is, torch says, and that takes time
        named_profile(str(job.profile))
    if job.output == "-" and (sys.stdout is None or sys.stdout.isatty()):
        raise InputError("standard output is a terminal or closed; redirect it to a file, or give -o FILE")
    if job.img == "-" and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("standard input is a terminal or closed; pipe a picture into it")
    picture = open_picture(sys.stdin.buffer if job.img == "-" else job.img)
    check_target(job.target, source=None if job.img == "-" else job.img, overwrite=job.force)
    if picture.alpha is not None and not keeps_alpha(job.target):
        click.echo("note: JPEG has no transparency; the result is on white", err=True)
    return picture


def _run(job: Job, picture: "Picture") -> "Edit":
    """Load the model, edit, save."""

    def note(line: str) -> None:
        click.echo(f"note: {line}", err=True)

    from step1x.engine.progress import Progress, terminal

    with Progress(terminal(job.quiet)) as progress:
        progress.stage("load")
        from step1x.engine.embeddings import EmbeddingCache
        from step1x.engine.pipeline import Engine

        engine = Engine.load(
            job.model,
            profile=job.profile,
            device=job.device,
            variant=job.variant,
            fix_quotes=job.fix_quotes,
            cache=not job.no_cache and EmbeddingCache(say=note),
            calibration=job.calibration,
            say=note,
            progress=progress,
            kernels=job.kernels,
            attention=job.attention,
            products=job.products,
            compiled=job.compiled,
            backend=job.backend,
            trust_engine=job.trust_engine,
        )
        result = engine.edit(
            picture,
            job.instruction,
            negative_prompt=job.negative_prompt,
            steps=job.steps,
            guidance=job.guidance,
            size=job.size,
            seed=job.seed,
            strength=job.strength,
            branches=job.branches,
            exact_algebra=job.exact_algebra,
            speed=job.speed,
            mask=job.mask,
            on_step=progress.step,
            on_stage=progress.stage,
        )
        progress.stage("save")
        result.save(job.target, metadata=not job.no_metadata, overwrite=job.force)
    return result


def _report(job: Job, result: "Edit", seconds: float) -> None:
    """The path or JSON on stdout, a summary for people on stderr."""
    if job.as_json:
        width, height = result.image.size
        facts = {"output": job.target, "width": width, "height": height, "seed": result.seed}
        click.echo(json.dumps({**facts, "timings": result.timings, "steps": result.steps, "metadata": result.metadata}))
    elif job.target != "-":
        _echo_path(job.target)
    if not job.quiet:
        click.echo(f"edited in {seconds:.1f} s, seed {result.seed}", err=True)


@program.command(epilog=EXIT_CODES)
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def info(model: str | None, as_json: bool) -> None:
    """Say what MODEL is.

    Version, sizes, parameters of each part and the memory they need, from the headers of its files. MODEL is
    a folder of either layout or a Hub id; without it, the bundled checkpoint.
    """
    from step1x.engine.info import describe

    found = describe(model)
    click.echo(json.dumps(found.as_json(), indent=2) if as_json else _listing(found))


def _listing(found: "ModelInfo") -> str:
    """A model's facts for people, one a line."""
    lines = [f"{found.name}: {found.version}, {found.layout} layout, preset {found.preset}"]
    for part in found.components:
        stored = ", ".join(f"{dtype} {count:,}" for dtype, count in part.dtypes.items())
        lines.append(f"{part.name}: {part.parameters:,} parameters, {part.memory_bytes / 1e9:.2f} GB in memory")
        lines += [f"  {name} {count:,}" for name, count in part.parts.items()]
        lines.append(f"  on disk {part.disk_bytes / 1e9:.2f} GB ({stored})")
        lines += [f"  {name} {value}" for name, value in found.sizes.get(part.name, {}).items()]
    lines += [f"{name}: not there" for name in found.absent]
    lines.append(f"all: {found.memory_bytes / 1e9:.2f} GB of weights in memory")
    return "\n".join(lines)


@program.command(epilog=EXIT_CODES)
@click.argument("source")
@click.argument("target")
@click.option("--layout", type=click.Choice(["official", "diffusers"]), required=True, help="Layout to write.")
@debug_option
def convert(source: str, target: str, layout: "Layout") -> None:
    """Write the model SOURCE to the folder TARGET in the layout asked for."""
    from step1x.engine.convert import convert as write

    write(source, target, layout)
    _echo_path(target)


@program.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def doctor(as_json: bool) -> None:
    """Say what this machine can run, what an edit would use here, and why.

    On a GPU the kernels are checked, which takes a second or two; --json is what a bug report should carry.
    """
    from step1x.engine.doctor import examine, report, verdicts, what_is_used

    machine = examine()
    if as_json:
        profiles = [dataclasses.asdict(verdict) for verdict in verdicts(machine)]
        used = [dataclasses.asdict(found) for found in what_is_used(machine)]
        click.echo(json.dumps({**dataclasses.asdict(machine), "profiles": profiles, "uses": used}, indent=2))
    else:
        click.echo(report(machine))


@program.group()
def cache() -> None:
    """What is kept between runs: embeddings and compiled code."""


@cache.command("info", epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def cache_info(as_json: bool) -> None:
    """Say where it is and how much it is."""
    from step1x.engine.caches import cache_folder, files

    found = {kind: files(cache_folder() / kind) for kind in ("embeddings", "compiled")}
    facts = {kind: {"files": len(all_of), "bytes": sum(all_of.values())} for kind, all_of in found.items()}
    if as_json:
        click.echo(json.dumps({"folder": str(cache_folder()), **facts}))
    else:
        click.echo(cache_folder())
        for kind, fact in facts.items():
            click.echo(f"{kind}: {fact['files']} files, {fact['bytes'] / 1e6:.1f} MB")


@cache.command("clear", epilog=EXIT_CODES)
@debug_option
def cache_clear() -> None:
    """Remove it. What is needed is made again."""
    from step1x.engine.caches import cache_folder, files, remove

    folders = [cache_folder() / kind for kind in ("embeddings", "compiled")]
    size = sum(sum(files(folder).values()) for folder in folders)
    for folder in folders:
        remove(folder)
    click.echo(f"removed {size / 1e6:.1f} MB", err=True)


for command in (bench, build, calibrate, engines, plan, profiles, quant):
    program.add_command(command)


def _echo_path(path: str) -> None:
    """A path on a line of its own, as bytes: a name need not be UTF-8."""
    click.echo(os.fsencode(path))


def main() -> NoReturn:
    """The console script."""
    try:
        program.main(prog_name="step1x-engine")
    except SystemExit as done:
        if done.code != 130:
            raise
        # CPython dies of the signal, whatever the exit code, if Ctrl-C struck within an exec of a string, which is
        # how a library's dataclasses are made while it is imported.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)
