"""`step1x-engine plan` and `step1x-engine profiles`. Parse, call, print; what is heavy is imported in the commands."""

import json
import textwrap
from typing import TYPE_CHECKING

import click

from step1x.engine.options import EXIT_CODES, PROFILE_HELP, SPEEDS, debug_option

if TYPE_CHECKING:
    from step1x.engine.planner import Plan
    from step1x.profiles import Profile

GB = 1e9
GIB = 2**30
BAR = 50  # columns
MODEL_HELP = "Folder of weights, Hub id, or v1.0, v1.1, v1.2: a released model without its weights."
SIZE_HELP = "Size level.  [default: the profile's]"
ALL_HELP = "All profiles at sizes 512, 768 and 1024."


@click.command(epilog=EXIT_CODES)
@click.option("--model", metavar="MODEL", default="v1.1", show_default=True, help=MODEL_HELP)
@click.option("--profile", metavar="NAME", help=PROFILE_HELP)
@click.option("--size", type=click.IntRange(16, 8192), metavar="N", help=SIZE_HELP)
@click.option("--batch", type=click.IntRange(1, 1000), metavar="N", help="Pictures at once.  [default: the profile's]")
@click.option("--steps", type=click.IntRange(1, 1000), metavar="N", help="Denoising steps.  [default: the model's]")
@click.option("--speed", type=click.Choice(SPEEDS), help="How much is left out of the steps.  [default: the profile's]")
@click.option("--all", "every", is_flag=True, help=ALL_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def plan(
    *,
    model: str,
    profile: str | None,
    size: int | None,
    batch: int | None,
    steps: int | None,
    speed: str | None,
    every: bool,
    as_json: bool,
) -> None:
    """Say what an edit takes of the memory, before anything is loaded.

    Bytes of each phase against the profile's budget, from the headers of the model's files alone. GB are 1e9 bytes.
    A plan over its budget is an error, after it has been printed.
    """
    from step1x.engine.engine_config import model_sizes
    from step1x.engine.image import Canvas, fit
    from step1x.engine.named_profile import AUTO, named_profile
    from step1x.engine.planner import SIZES, check
    from step1x.engine.planner import plan as made
    from step1x.profiles import profile_names

    if every and (profile or size):
        raise click.UsageError("--all is for all profiles and sizes; leave out --profile and --size")
    profiles = [named_profile(name, model) for name in (profile_names() if every else [profile or AUTO])]
    if speed is not None:
        profiles = [one.changed({"speed": speed}) for one in profiles]
    shapes = model_sizes(model)
    plans = [
        made(shapes, one, canvas=Canvas(*fit(1, 1, level)), batch=batch, steps=steps)
        for one in profiles
        for level in (SIZES if every else [size or one.size])
    ]
    if as_json:
        found = [one.as_json() for one in plans]
        click.echo(json.dumps(found if every else found[0], indent=2))
    else:
        click.echo(_matrix(plans) if every else _table(plans[0]))
    if not every:
        check(plans[0])


@click.command(epilog=EXIT_CODES)
@click.argument("name", required=False)
@debug_option
def profiles(name: str | None) -> None:
    """List the profiles, or explain the profile NAME (or a .toml file)."""
    from step1x.engine.named_profile import named_profile
    from step1x.profiles import profile_names

    if name is not None:
        click.echo("\n".join(_explained(named_profile(name))))
        return
    for one in map(named_profile, profile_names()):
        click.echo(f"{one.name:10}  {_budget(one):21}  {_precision(one):16}  {one.description}")


def _table(plan: "Plan") -> str:
    """Items by phases, bars of the phases against the budget, and the verdict."""
    work, names = plan.work, [phase.name for phase in plan.phases]
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for phase in plan.phases:
        for item in phase.items:
            rows.setdefault((item.kind, item.name), {})[phase.name] = item.bytes
    canvas, guided = f"{work.canvas.width} x {work.canvas.height}", "guided" if work.guided else "not guided"
    lines = [
        f"{plan.model.name} with {plan.profile.name}: {canvas}, batch {work.batch}, {work.steps} steps, {guided}",
        "",
        f"{'GB':36}" + "".join(f"  {name}" for name in names),
    ]
    for (kind, what), sizes in sorted(rows.items(), key=lambda row: ORDER.index(row[0][0])):
        lines.append(f"{kind:12}{what:24}" + "".join(_cell(sizes.get(name), name) for name in names))
    lines += [f"{'together':36}" + "".join(_cell(phase.bytes, phase.name) for phase in plan.phases), ""]
    scale = max(plan.budget, plan.peak.bytes)
    for phase in plan.phases:
        lines.append(f"{phase.name:13}{_bar(phase.bytes, plan.budget, scale)} {phase.bytes / GB:6.2f}")
    return "\n".join(line.rstrip() for line in [*lines, "", *_verdict(plan)])


ORDER = ("weights", "tables", "kept", "activations", "graphs", "context")


def _cell(size: int | None, column: str) -> str:
    return f"  {'' if size is None else f'{size / GB:.2f}':>{len(column)}}"


def _bar(size: int, budget: int, scale: int) -> str:
    """Hashes for what is taken, dots up to the budget, and a bar where it ends."""
    taken, limit = round(BAR * size / scale), round(BAR * budget / scale)
    bar = "#" * taken + "." * max(limit - taken, 0)
    return (bar[:limit] + "|" + bar[limit:] if budget else bar).ljust(BAR + 1)


def _verdict(plan: "Plan") -> list[str]:
    profile, peak = plan.profile, plan.peak
    where = "host memory" if profile.device == "cpu" else "GPU memory"
    lines = [f"{where}: {_amount(peak.bytes)} in {peak.name}" + _judged(plan.budget, plan.over)]
    if plan.host:
        limit = round(profile.host_memory_gb * GB)
        lines.append(f"pinned host memory: {_amount(plan.host_bytes)}" + _judged(limit, plan.host_over))
        lines.append("  " + ", ".join(f"{item.name} {item.bytes / GB:.2f}" for item in plan.host))
    return lines


def _judged(limit: int, over: int) -> str:
    if not limit:
        return "; no limit"
    return f" of {_amount(limit)}: " + (
        f"{over / GB:.2f} GB over" if over > 0 else f"fits, {-over / GB:.2f} GB to spare"
    )


def _amount(size: float) -> str:
    return f"{size / GB:.2f} GB ({size / GIB:.2f} GiB)"


def _matrix(plans: "list[Plan]") -> str:
    """Profiles by sizes: the peak, and what is missing where it does not fit."""
    levels = sorted({plan.work.canvas.width for plan in plans})
    first = plans[0]
    lines = [
        f"{first.model.name}: peak in GB, the longest instruction, {first.work.steps} steps",
        "",
        f"{'profile':12}{'budget':>10}{'batch':>7}" + "".join(f"{f'{level} x {level}':>22}" for level in levels),
    ]
    for start in range(0, len(plans), len(levels)):
        row = plans[start : start + len(levels)]
        budget = f"{row[0].budget / GB:g}" if row[0].budget else "none"
        head = f"{row[0].profile.name:12}{budget:>10}{row[0].work.batch:>7}"
        lines.append(head + "".join(f"{_fitting(plan):>22}" for plan in row))
    return "\n".join(lines)


def _fitting(plan: "Plan") -> str:
    if plan.over > 0:
        return f"{plan.peak.bytes / GB:.1f}, {plan.over / GB:.1f} over"
    if plan.host_over > 0:
        return f"host {plan.host_over / GB:.1f} over"
    return f"{plan.peak.bytes / GB:.1f} fits"


def _budget(profile: "Profile") -> str:
    if not profile.budget_gb:
        return "no limit"
    return f"{profile.budget_gb:g} GB ({profile.budget_gb * GB / GIB:.1f} GiB)"


def _precision(profile: "Profile") -> str:
    return profile.dtype if profile.weights.dit == "plain" else profile.weights.dit


SCHEMES = {
    "plain": "in {dtype}",
    "fp8": "weights and rows in 8-bit floating point (e4m3), multiplied as such",
    "fp8-weight": "weights in 8-bit floating point (e4m3), multiplied in {dtype}",
    "int8": "weights and rows in 8-bit integers, multiplied as such",
    "int8-weight": "weights in 8-bit integers, multiplied in {dtype}",
    "int4-weight": "weights in 4-bit integers, multiplied in {dtype}",
    "nvfp4": "weights in 4-bit floating point with a scale for each 16, multiplied in {dtype}",
}
RESIDENCIES = {
    "resident": "on the device all the time",
    "host": "in host memory, copied once an edit, layer by layer",
    "evict": "in host memory, brought as a whole and dropped after use",
    "stream": "in host memory, copied block by block as they are used",
}
KERNELS = {
    "auto": "our own wherever Triton runs and they pass their check",
    "on": "our own for every operation",
    "off": "none of our own",
}
BRANCHES = {
    None: "as the model's own program does it",
    "batched": "both forwards of a step at once",
    "sequential": "the two forwards of a step one after the other",
}


def _explained(profile: "Profile") -> list[str]:
    """Every field of a profile in words."""
    schemes, lies, capability = profile.weights, profile.residency, profile.capability
    stretch, pinned = profile.fp8_attention, profile.host_memory_gb
    streamed = f"{lies.stream_blocks} of its blocks " if lies.dit == "stream" else ""
    words = {
        "device": {"auto": "cuda if there is one, else cpu"}.get(profile.device, profile.device),
        "compute capability": f"{capability:g} or above" if capability else "any",
        "budget": _budget(profile) + (" of GPU memory" if profile.budget_gb else ""),
        "host memory": f"at most {pinned:g} GB of pinned weights" if pinned else "no limit",
        "planned for": f"size {profile.size}, batch {profile.batch}",
        "arithmetic": f"{profile.dtype}; autoencoder {profile.vae_dtype}",
        "transformer": f"{SCHEMES[schemes.dit]}; {streamed}{RESIDENCIES[lies.dit]}",
        "modulations": f"{SCHEMES[schemes.folded]}; {RESIDENCIES[lies.folded]}",
        "language model": f"{SCHEMES[schemes.text]}; {RESIDENCIES[lies.text]}",
        "vision tower": f"{SCHEMES[schemes.vision]}; {RESIDENCIES[lies.vision]}",
        "autoencoder": f"{RESIDENCIES[lies.vae]}; in strips above {profile.strip_pixels / 1e6:.2g} million pixels",
        "kernels": KERNELS[profile.kernels],
        "attention": "the best there is for the GPU" if profile.attention == "auto" else profile.attention,
        "8-bit attention": "never" if stretch is None else f"from {stretch[0]:.0%} to {stretch[1]:.0%} of the steps",
        "guidance": BRANCHES[profile.branches],
        "kept keys, values": f"{profile.kv_dtype}, between steps that recompute a part of the picture",
        "speed": "exact: every step computes every token" if profile.speed == "exact" else profile.speed,
        "compilation": "blocks are compiled when they first run" if profile.compiled else "none",
    }
    lines = [profile.name, *textwrap.wrap(profile.description, 98, initial_indent="  ", subsequent_indent="  ")]
    for name, text in words.items():
        filled = text.format(dtype=profile.dtype)
        lines += textwrap.wrap(filled, 98, initial_indent=f"  {name:20}", subsequent_indent=" " * 22)
    return lines
