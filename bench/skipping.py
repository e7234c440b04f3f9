"""What leaving out steps, rows and branches costs: policies against the dense result of the same seed, over their work.

    python -m step1x.bench.skipping measure --photos DIR --records FILE [--pairs N] [--share I/N] [--only NAME]...
    python -m step1x.bench.skipping report FILE... [--json FILE] [--figure FILE]

Pairs are of photographs that no model was trained on, and of made pictures, with instructions of every family of the
bundled checkpoint. Work is the closed form of engine/work.py. A measurement that is run again goes on where it ended.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from step1x.bench.quality import psnr, ssim, to_image
from step1x.engine import Engine
from step1x.engine.embeddings import EmbeddingCache
from step1x.engine.picture import open_picture
from step1x.engine.plan import StepPlan, spelled
from step1x.engine.policy import CfgReuse, Decay, MagCache, Policy, RefFreeze, StepMask, Together, regione
from step1x.engine.presets import PRESETS
from step1x.engine.request import Options, Request, canvas_of
from step1x.engine.skipping import Skipping, by_similarity
from step1x.engine.timing import Recorder
from step1x.engine.work import Rows, speedup
from step1x.training.edits import FAMILIES, Picture, Sample, sample
from step1x.training.pictures import Photographs, picture

LEVEL = 256  # of sizes
SIZES = ((304, 208), (208, 304), (256, 256))  # width, height
SCENES = 0.3  # share of made pictures
NOISE_EVERY = 20  # pairs of which one is also made in bfloat16, for the noise floor
WORST = 0.05  # share of the pairs
LEAST = 0.05  # change of a pixel (peak 1) from which on an edit has changed it


def policies(steps: int) -> dict[str, Policy]:
    """What is measured, by name: each kind alone, baselines of equal work, and compositions."""
    found: dict[str, Policy] = {
        f"step-mask {share:g}": StepMask(computed=max(2, round(steps / share))) for share in (2, 3, 4.7)
    }
    found |= {
        "decay": Decay(),
        "magcache": MagCache(),
        "regione": regione(),
        "ref-freeze": RefFreeze(first=max(1, steps // 7), last=1),
        "cfg-reuse": CfgReuse(last=2),
        "regione + ref-freeze": Together((regione(), RefFreeze(first=2, last=1))),
    }
    return found | {f"--speed {speed}": policy for speed, policy in PRESETS.items() if speed != "exact"}


class Pair:
    """One picture and instruction, prepared: policies differ in the loop only."""

    def __init__(self, engine: Engine, one: Sample, seed: int, options: Options) -> None:
        self.engine, self.one = engine, one
        opened = [open_picture(to_image(one.source))]
        canvas = canvas_of(opened, LEVEL)
        self.request = Request(
            opened=opened,
            instructions=[one.instruction],
            seeds=[seed],
            canvas=canvas,
            recorder=Recorder(engine.device),
            on_step=None,
        )
        self.loop, self.state = engine._prepare(self.request, options)
        self.tokens = canvas.tokens

    def made(self, policy: Policy | None) -> tuple[Picture, Any, float]:
        """The picture, what was left out, and seconds of the loop."""
        skipping = None
        if policy is not None:
            skipping = Skipping(policy=policy, select=by_similarity(self.request.canvas.grid))
        start = time.perf_counter()
        tokens, done = self.engine._denoised(self.request, self.loop, self.state, skipping)
        seconds = time.perf_counter() - start
        pixels = self.engine._decoded(tokens, self.request.canvas)
        return ((pixels[0].permute(1, 2, 0).float().clamp(-1, 1) + 1) / 2).numpy(), done, seconds

    def work(self, steps: Sequence[StepPlan], active: int) -> float:
        rows = Rows(
            text=self.loop.forwards[0].request.text.rows.shape[1],
            target=self.tokens,
            reference=self.tokens,
            active=active,
        )
        return speedup(steps, self.engine.dit.config, rows, guided=self.loop.guidance is not None)


def changed(one: Sample) -> Picture:
    """Pixels that the edit was to change, 1 or 0."""
    return (np.abs(one.target - one.source).max(-1) > LEAST).astype(np.float32)


def compared(pair: Pair, dense: Picture, result: Picture) -> dict[str, Any]:
    """Distances of a result from the dense one, and whether it still is the edit."""
    one, mask = pair.one, changed(pair.one)
    found: dict[str, Any] = {"psnr": psnr(result, dense), "ssim": ssim(result, dense)}
    if 0 < mask.mean() < 1:
        found |= {"inside": psnr(result, dense, mask), "outside": psnr(result, dense, 1 - mask)}
    found["success"] = psnr(result, one.target) > psnr(one.source, one.target)
    return found


def recall(pair: Pair, active: Tensor) -> float:
    """Share of the tokens with changed pixels that are among the active ones."""
    rows, columns = pair.request.canvas.grid
    mask = torch.from_numpy(changed(pair.one))[None, None]
    true = torch.nn.functional.adaptive_max_pool2d(mask, (rows, columns)).flatten() > 0
    return float(true[active].sum() / true.sum().clamp(min=1))


@click.group()
def main() -> None:
    """Policies against the dense result."""


@main.command()
@click.option("--photos", type=click.Path(path_type=Path, exists=True), required=True, help="Held-out photographs.")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="A line of JSON for each pair.")
@click.option("--pairs", default=200, help="How many.")
@click.option("--share", default="0/1", help="I/N: every N-th pair from the I-th on, for several processes.")
@click.option("--steps", default=28)
@click.option("--guidance", default=2.0)
@click.option("--only", multiple=True, help="Beginning of the names of policies to measure.  [default: all]")
@torch.no_grad()
def measure(
    photos: Path, records: Path, pairs: int, share: str, steps: int, guidance: float, only: tuple[str, ...]
) -> None:
    """Edit every pair densely and by every policy."""
    chosen = {name: policy for name, policy in policies(steps).items() if not only or name.startswith(only)}
    engine = Engine.load(device="cpu", cache=EmbeddingCache(disk_bytes=0))
    rough = Engine.load(device="cpu", cache=False, dtype=torch.bfloat16)
    library, options = Photographs(photos), Options(steps=steps, guidance=guidance, branches="batched")
    known = {json.loads(line)["pair"] for line in records.read_text().splitlines()} if records.exists() else set()
    first, of = (int(part) for part in share.split("/"))
    for index in range(first, pairs, of):
        if index in known:
            continue
        random = np.random.default_rng((7, index))
        width, height = SIZES[index % len(SIZES)]
        family = FAMILIES[index % len(FAMILIES)]
        one = sample(family, picture(library, random, height, width, SCENES), random)
        pair = Pair(engine, one, index, options)
        dense, _, seconds = pair.made(None)
        line: dict[str, Any] = {"pair": index, "family": family, "steps": steps, "guidance": guidance}
        line |= {"instruction": one.instruction, "seconds": seconds, "local": one.region is not None}
        line["dense_success"] = compared(pair, dense, dense)["success"]
        if index % NOISE_EVERY == 0:
            line["bfloat16"] = compared(pair, dense, Pair(rough, one, index, options).made(None)[0])
        line["policies"] = {name: _policy(pair, policy, dense) for name, policy in chosen.items()}
        with records.open("a") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(f"{index} {family} {seconds:.1f} s", err=True)


def _policy(pair: Pair, policy: Policy, dense: Picture) -> dict[str, Any]:
    result, done, seconds = pair.made(policy)
    selection = done.selection
    fewer = selection is not None and not selection.fell_back
    active = selection.active.shape[1] if fewer else pair.tokens
    found = compared(pair, dense, result)
    found |= {"plan": spelled(done.steps), "work": pair.work(done.steps, active), "seconds": seconds}
    if selection is not None:
        found |= {"active": active / pair.tokens, "recall": recall(pair, selection.active[0]) if fewer else 1.0}
    return found


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where the table goes as JSON.")
@click.option("--figure", type=click.Path(path_type=Path), help="Quality over work, as a picture.")
def report(files: tuple[Path, ...], out: Path | None, figure: Path | None) -> None:
    """Print the table of all pairs in FILES."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    rows = summary(lines)
    click.echo(table(rows, lines))
    if out is not None:
        facts = {"pairs": len(lines), "steps": lines[0]["steps"], "guidance": lines[0]["guidance"], "rows": rows}
        out.write_text(json.dumps(facts, indent=1) + "\n")
    if figure is not None:
        drawn(rows, figure)


def summary(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each policy, the most work first."""
    rows = []
    for name in dict.fromkeys(name for line in lines for name in line["policies"]):
        found = [line["policies"][name] for line in lines if name in line["policies"]]
        local = [line["policies"][name] for line in lines if line["local"] and name in line["policies"]]
        rows.append({"policy": name, **_means(found), "local": _means(local) if local else None})
    return sorted(rows, key=lambda row: row["work"])


def _means(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        values = [one[key] for one in found if key in one]
        return float(np.mean(values)) if values else None

    values = sorted(one["psnr"] for one in found)
    worst = values[: max(1, round(WORST * len(values)))]
    keys = ("psnr", "ssim", "inside", "outside", "success", "active", "recall", "seconds")
    # Work adds up: the speed-up of many edits is of their sum, the harmonic mean.
    work = float(1 / np.mean([1 / one["work"] for one in found]))
    return {"n": len(found), "work": work, "worst": float(np.mean(worst)), **{key: mean(key) for key in keys}}


def table(rows: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> str:
    head = f"{'policy':26}{'pairs':>6}{'work':>6}{'dB':>7}{'worst':>7}{'SSIM':>7}"
    head += f"{'inside':>8}{'outside':>8}{'success':>8}{'recall':>8}"
    text = [f"{len(lines)} pairs, {lines[0]['steps']} steps, guidance {lines[0]['guidance']}", head]

    def cell(value: float | None, width: int, digits: int) -> str:
        return f"{'':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    for row in rows:
        cells = [
            f"{row['n']:>6}",
            cell(row["work"], 6, 2),
            cell(row["psnr"], 7, 1),
            cell(row["worst"], 7, 1),
            cell(row["ssim"], 7, 3),
        ]
        cells += [cell(row["inside"], 8, 1), cell(row["outside"], 8, 1), cell(row["success"], 8, 2)]
        text.append(f"{row['policy']:26}" + "".join([*cells, cell(row["recall"], 8, 2)]))
    noise = [line["bfloat16"]["psnr"] for line in lines if "bfloat16" in line]
    if noise:
        text.append(f"noise floor: bfloat16 is {np.mean(noise):.1f} dB from float32 ({len(noise)} pairs)")
    text.append(
        f"dense edits nearer their target than the source: {np.mean([one['dense_success'] for one in lines]):.2f}"
    )
    return "\n".join(text)


def drawn(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """PSNR over work, the baselines joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    page, axes = pyplot.subplots(figsize=(8, 5))
    masks = [row for row in rows if row["policy"].startswith("step-mask") and "+" not in row["policy"]]
    axes.plot([row["work"] for row in masks], [row["psnr"] for row in masks], "k--", label="step-mask")
    for row in rows:
        if row not in masks:
            axes.plot(row["work"], row["psnr"], "o")
            axes.annotate(row["policy"], (row["work"], row["psnr"]), textcoords="offset points", xytext=(5, 4))
    axes.set(xlabel="times less work in the transformer", ylabel="PSNR to the dense result, dB")
    axes.legend()
    page.tight_layout()
    page.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
