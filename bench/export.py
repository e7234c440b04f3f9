"""Exported engines beside PyTorch: seconds from a fresh process to its first finished step, and the pictures they make.

    python -m step1x.bench.export cold [--repeat 3] [--tokens 256] [--model DIR]
    python -m step1x.bench.export parity [--backend NAME]... [--model DIR]

Cold starts alternate, and the disk is as warm for one as for another. The last line of each is JSON.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import click

TEXT = 64  # rows
Way = Literal["aoti", "compile-cold", "compile-warm", "plain"]
WAYS: tuple[Way, ...] = get_args(Way)


@click.group(help="Measure exported engines.")
def main() -> None:
    pass


@main.command(help="Seconds from a fresh process to the first finished step, by how the step is compiled.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@click.option("--tokens", default=256, show_default=True, help="Target tokens, and as many of the reference.")
@click.option("--model", type=click.Path(path_type=Path), help="Model folder.  [default: bundled]")
def cold(repeat: int, tokens: int, model: Path | None) -> None:
    with TemporaryDirectory() as folder:
        given = json.dumps({"model": model and str(model), "tokens": tokens, "engine": folder})
        start = time.perf_counter()
        started("build", given, Path(folder))
        build_seconds, size = time.perf_counter() - start, (Path(folder) / "step.pt2").stat().st_size
        started("compile-warm", given, Path(folder))
        seconds: dict[Way, list[float]] = {way: [] for way in WAYS}
        for _ in range(repeat):
            for way in WAYS:
                seconds[way].append(started(way, given, Path(folder)))
                click.echo(f"{way:13} {seconds[way][-1]:7.2f} s")
    middle = {way: statistics.median(found) for way, found in seconds.items()}
    ratio = middle["compile-cold"] / middle["aoti"]
    click.echo(f"aoti is {ratio:.1f} times as fast as torch.compile from nothing; package of {size / 1e6:.1f} MB")
    found = {"seconds": seconds, "build_seconds": build_seconds, "package_bytes": size, "ratio": ratio}
    click.echo(json.dumps(found | {"tokens": tokens, "machine": platform.machine(), "cores": os.cpu_count()}))


EDITS: dict[str, dict[str, Any]] = {  # name -> options
    "exact": {"speed": "exact"},
    "28 steps, guidance": {"steps": 28, "guidance": 2.0},
    "fast": {"steps": 28, "guidance": 2.0, "speed": "fast"},
    "128 level": {"size": 128},
}


@main.command(help="Edits by each backend beside PyTorch's own: PSNR in dB, and milliseconds of a step.")
@click.option("--backend", "names", multiple=True, default=("aoti", "onnx"), show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="Model folder.  [default: bundled]")
def parity(names: tuple[str, ...], model: Path | None) -> None:
    import numpy as np

    from step1x.bench.counters import photograph
    from step1x.bench.quality import psnr
    from step1x.engine import Engine
    from step1x.engine.embeddings import EmbeddingCache

    kept = EmbeddingCache(disk_bytes=0)
    plain = Engine.load(model, cache=kept)
    found = []
    for name in names:
        engine = Engine.load(model, backend=name, cache=kept, say=lambda line: click.echo(line, err=True))
        for edit, options in EDITS.items():
            made = [one.edit(photograph(768, 512, 1), "make it darker", seed=1, **options) for one in (plain, engine)]
            ours, theirs = (np.asarray(one.image, np.float32) / 255 for one in reversed(made))
            apart, (torchs, own) = psnr(ours, theirs), (statistics.median(one.steps) for one in made)
            found.append({"backend": name, "edit": edit, "psnr": apart, "torch_step": torchs, "step": own})
            times = f"{1e3 * own:6.1f} ms a step, torch {1e3 * torchs:6.1f} ms"
            click.echo(f"{name:10}{edit:20}{apart:6.1f} dB  {times}")
    click.echo(json.dumps({"rows": found, "machine": platform.machine(), "cores": os.cpu_count()}))


def started(way: str, given: str, folder: Path) -> float:
    """Seconds that a process takes from its start to the end of its first step."""
    with TemporaryDirectory() as empty:
        cache = empty if way == "compile-cold" else str(folder / "compiled")
        start = time.time()
        command = [sys.executable, "-m", "step1x.bench.export", "child", way, given]
        done = subprocess.run(
            command, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}, check=True, capture_output=True, text=True
        )
    return float(done.stdout.splitlines()[-1]) - start


@main.command(hidden=True)
@click.argument("way")
@click.argument("given")
def child(way: str, given: str) -> None:
    import torch

    from step1x.engine.dit import DiT, Text
    from step1x.engine.executor import Execution, stepper
    from step1x.engine.image import image_ids
    from step1x.engine.weights import load
    from step1x.export.aoti import AotiRunner, build
    from step1x.export.core import inputs_of

    settings = json.loads(given)
    engine, tokens = Path(settings["engine"]), settings["tokens"]
    loaded = load(settings["model"], device="cpu", dtype=torch.float32)
    dit: DiT = loaded.dit
    if way == "build":
        build(engine, dit, loaded.vae, ("step",))
    text = Text(torch.randn(2, TEXT, dit.config.connector.in_channels), torch.ones(2, TEXT))
    step = dit.condition(dit.prepare(text), torch.full((2,), 0.5))
    side = round(tokens**0.5)
    rope = dit.rope(torch.zeros(1, TEXT, 3), image_ids((side, side), (0, 0, side)))
    rows = torch.randn(2, 2 * side * side, dit.config.in_channels)
    if way in ("aoti", "build"):
        AotiRunner(engine, dit, loaded.vae).step(inputs_of(rows, step, rope, side * side))
    else:
        stepper(dit, Execution(compiled=way != "plain")).velocity(rows, step, rope, side * side)
    click.echo(time.time())


if __name__ == "__main__":
    main()
