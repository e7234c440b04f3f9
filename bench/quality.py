"""How well a model edits: the programmatic families on held-out photographs, judged against their exact targets.

    python bench/quality.py --photos DIR [--model DIR] [--size 256] [--json FILE] [--sheet FILE]

Prints a table per family: PSNR and SSIM of the result to the target, the same for the unedited source, the gain, and
for local edits the PSNR outside the edited region; then one line of JSON. `--sheet` writes a picture with one row per
family: source, instruction, result, target.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import structural_similarity

from step1x.engine import Engine
from step1x.engine.image import fit
from step1x.training.edits import FAMILIES, GLOBAL, LOCAL, Picture, Sample, sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One edit: PSNR in dB of peak 1, SSIM, for the result and for the source left as it was."""

    family: str
    photo: str
    instruction: str
    psnr: float
    ssim: float
    source_psnr: float
    source_ssim: float
    outside_psnr: float | None


def psnr(a: Picture, b: Picture, weight: Picture | None = None) -> float:
    squared = ((a - b) ** 2).mean(-1)
    error = float(squared.mean() if weight is None else (squared * weight).sum() / weight.sum())
    return -10 * math.log10(max(error, 1e-8))


def ssim(a: Picture, b: Picture) -> float:
    return float(structural_similarity(a, b, channel_axis=2, data_range=1.0))


def to_image(picture: Picture) -> Image.Image:
    return Image.fromarray((picture * 255 + 0.5).astype(np.uint8))


def to_picture(image: Image.Image) -> Picture:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def load_photos(folder: Path, size: int) -> dict[str, Picture]:
    """Photographs resized to the canvas the engine would use, so that nothing is resized twice."""
    photos = {}
    for path in sorted(folder.glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        photos[path.stem] = to_picture(image.resize(fit(*image.size, size), Image.Resampling.LANCZOS))
    if not photos:
        raise click.UsageError(f"no .jpg photographs in {folder}")
    return photos


def score(name: str, one: Sample, result: Picture) -> Score:
    outside = None
    if one.region is not None:
        outside = psnr(result, one.target, (one.region == 0).astype(np.float32))
    return Score(
        family=one.family,
        photo=name,
        instruction=one.instruction,
        psnr=psnr(result, one.target),
        ssim=ssim(result, one.target),
        source_psnr=psnr(one.source, one.target),
        source_ssim=ssim(one.source, one.target),
        outside_psnr=outside,
    )


@torch.no_grad()
def reconstruction(engine: Engine, photos: dict[str, Picture]) -> float:
    """Mean PSNR of the autoencoder alone (posterior mean)."""
    values = []
    for picture in photos.values():
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].to(engine.device) * 2 - 1
        decoded = engine.vae.decode(engine.vae.encode(pixels)).float().clamp(-1, 1)
        values.append(psnr((decoded[0].permute(1, 2, 0).cpu().numpy() + 1) / 2, picture))
    return float(np.mean(values))


def table(scores: list[Score]) -> tuple[list[dict[str, Any]], list[str]]:
    """Per-family means as records and as printable lines."""
    records, lines = [], []
    lines.append(f"{'family':<18}{'n':>4}{'PSNR':>8}{'source':>8}{'gain':>8}{'SSIM':>8}{'source':>8}{'outside':>9}")
    for family in FAMILIES:
        ours = [one for one in scores if one.family == family]
        if not ours:
            continue
        outside = [one.outside_psnr for one in ours if one.outside_psnr is not None]
        record = {
            "family": family,
            "n": len(ours),
            "psnr": float(np.mean([one.psnr for one in ours])),
            "source_psnr": float(np.mean([one.source_psnr for one in ours])),
            "gain": float(np.mean([one.psnr - one.source_psnr for one in ours])),
            "ssim": float(np.mean([one.ssim for one in ours])),
            "source_ssim": float(np.mean([one.source_ssim for one in ours])),
            "outside_psnr": float(np.mean(outside)) if outside else None,
        }
        records.append(record)
        tail = f"{record['outside_psnr']:9.2f}" if outside else f"{'':>9}"
        lines.append(
            f"{family:<18}{len(ours):>4}{record['psnr']:8.2f}{record['source_psnr']:8.2f}"
            f"{record['gain']:8.2f}{record['ssim']:8.3f}{record['source_ssim']:8.3f}{tail}"
        )
    return records, lines


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with Chinese glyphs when the machine has one, else Pillow's own."""
    for path in sorted(Path("/usr/share/fonts").rglob("*CJK*")):
        return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def sheet(rows: list[tuple[Sample, Picture]], path: Path) -> None:
    """One row per edit: source, instruction, result, target."""
    height, width = 132, 900
    page = Image.new("RGB", (width, height * len(rows) + 24), "white")
    draw = ImageDraw.Draw(page)
    for x, title in ((6, "source"), (212, "instruction"), (486, "result"), (692, "target")):
        draw.text((x, 4), title, fill="black", font=font(14))
    for index, (one, result) in enumerate(rows):
        y = 24 + index * height
        for x, picture in ((4, one.source), (484, result), (690, one.target)):
            image = to_image(picture)
            image.thumbnail((200, 126), Image.Resampling.LANCZOS)
            page.paste(image, (x, y))
        draw.text((212, y + 36), one.family, fill="gray", font=font(13))
        draw.text((212, y + 56), one.instruction, fill="black", font=font(13))
    page.save(path)


@click.command()
@click.option("--photos", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", type=click.Path(path_type=Path), help="Model folder.  [default: bundled]")
@click.option("--size", default=256, show_default=True)
@click.option("--steps", type=int)
@click.option("--guidance", type=float)
@click.option("--repeats", default=1, show_default=True, help="Edits per family and photograph.")
@click.option("--seed", default=0, show_default=True)
@click.option("--chinese", default=0.35, show_default=True, help="Share of Chinese instructions.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--sheet", "sheet_path", type=click.Path(path_type=Path))
def main(  # noqa: PLR0913
    photos: Path,
    model: Path | None,
    size: int,
    steps: int | None,
    guidance: float | None,
    repeats: int,
    seed: int,
    chinese: float,
    json_path: Path | None,
    sheet_path: Path | None,
) -> None:
    engine = Engine.load(model, cache=False)
    loaded = load_photos(photos, size)
    random = np.random.default_rng(seed)
    scores: list[Score] = []
    rows: list[tuple[Sample, Picture]] = []
    started = time.monotonic()
    for family_index, family in enumerate(FAMILIES):
        for photo_index, (name, picture) in enumerate(loaded.items()):
            for _ in range(repeats):
                one = sample(family, picture, random, chinese)
                source = to_image(one.source)
                edited = engine.edit(
                    source, one.instruction, seed=len(scores), size=size, steps=steps, guidance=guidance
                )
                result = to_picture(edited.image)
                scores.append(score(name, one, result))
                if photo_index == family_index % len(loaded):
                    rows.append((one, result))
    records, lines = table(scores)
    print("\n".join(lines))
    summary = {
        "size": size,
        "steps": steps or engine.variant.steps,
        "guidance": guidance or engine.variant.guidance,
        "edits": len(scores),
        "seconds": round(time.monotonic() - started, 1),
        "device": engine.device.type,
        "torch": torch.__version__,
        "model": engine.name,
        "model_digest": engine.digest,
        "mean_gain": float(np.mean([record["gain"] for record in records])),
        "worst_global_gain": min(r["gain"] for r in records if r["family"] in (*GLOBAL, "tint")),
        "worst_local_gain": min(r["gain"] for r in records if r["family"] in LOCAL),
        "outside_psnr": float(np.mean([s.outside_psnr for s in scores if s.outside_psnr is not None])),
        "reconstruction_psnr": reconstruction(engine, loaded),
    }
    if json_path:
        content = {"summary": summary, "families": records, "edits": [asdict(one) for one in scores]}
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if sheet_path:
        sheet(rows, sheet_path)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
