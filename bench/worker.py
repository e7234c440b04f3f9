"""One side of a paired measurement: runs the cases that it is asked for and answers in seconds.

Started as a script by paired.py with the side's own tree first on the path, so it uses only what every revision has:
`Engine.load`, `Engine.edit`, and operations that it looks up by name and leaves out where a tree lacks them.
A line of standard input names a case; a line of JSON, {metric: seconds}, answers it.
"""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

STEPS = 4
SIZE = 128
REPEATS = 20  # of a single operation, per answer


def main() -> None:
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "edit": Edits(),
        "operations": Operations(),
        "startup": help_page,
    }
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not end up in the answers
    for line in sys.stdin:
        out.write(json.dumps(cases[line.strip()]()) + "\n")
        out.flush()


def help_page() -> dict[str, float]:
    """Of a whole process that prints the help page."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "step1x.engine", "--help"], check=True, capture_output=True)
    return {"startup.help": time.perf_counter() - start}


class Edits:
    """Edits with the bundled checkpoint; the engine is loaded at the first call."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._calls = 0

    def __call__(self) -> dict[str, float]:
        import numpy as np
        from PIL import Image

        from step1x.engine import Engine

        if self._engine is None:
            self._engine = Engine.load(device="cpu")
        self._calls += 1  # each time another picture: one that was seen before may be known
        y, x = np.mgrid[self._calls : self._calls + 96, 0:96]
        picture = Image.fromarray(np.stack([x * 2, y * 2, x + y], axis=-1).astype(np.uint8))
        steps: list[float] = []
        ended = time.perf_counter()

        def on_step(_: int, __: int) -> None:
            nonlocal ended
            now = time.perf_counter()
            steps.append(now - ended)
            ended = now

        start = time.perf_counter()
        result = self._engine.edit(
            picture, "make it darker", steps=STEPS, guidance=2.0, size=SIZE, seed=0, on_step=on_step
        )
        whole = time.perf_counter() - start
        stages = {f"edit.{name}": seconds for name, seconds in result.timings.items() if name in LONG_STAGES}
        # The first step's time begins at the call; the later ones are steps and nothing else.
        return {"edit.end_to_end": whole, "edit.denoise_step": sorted(steps[1:])[len(steps[1:]) // 2], **stages}


LONG_STAGES = ("encode_text", "encode_image", "decode")  # those that take long enough to be compared


class Operations:
    """Single operations of the transformer on the CPU: the fastest of REPEATS runs each."""

    def __init__(self) -> None:
        self._made: dict[str, Callable[[], object]] | None = None

    def __call__(self) -> dict[str, float]:
        import torch

        if self._made is None:
            self._made = operations()
        with torch.no_grad():
            return {f"operation.{name}": _fastest(run) for name, run in self._made.items()}


def operations() -> dict[str, Callable[[], object]]:
    """Name -> a run of one operation at the shapes of a 256 level edit with the bundled checkpoint."""
    import torch

    torch.manual_seed(0)
    module = importlib.import_module("step1x.engine.dit")
    heads, rows, width = 6, 560, 192
    x, vector = torch.randn(2, rows, width), torch.randn(2, 1, width)
    q, k, v = torch.randn(3, 2, heads, rows, width // heads).unbind()
    qkv = torch.randn(2, rows, 3 * width)
    rope = module.rope_tables(torch.randint(0, 16, (1, rows, 3)), (8, 12, 12), 10.0)
    norm = module.QKNorm(width // heads)
    found: dict[str, Callable[[], object]] = {}
    if hasattr(module, "attention"):
        found["attention"] = lambda: module.attention(q, k, v, rope)
    if hasattr(module, "apply_rope"):
        found["apply_rope"] = lambda: module.apply_rope(q, rope)
    if hasattr(module, "modulate"):
        found["modulate"] = lambda: module.modulate(x, vector, vector, True)
    found["qk_norm"] = lambda: norm(qkv, heads)
    return found | kernels()


def kernels() -> dict[str, Callable[[], object]]:
    """The CPU path of each op in the tree's kernels/, on the last of its own examples."""
    import torch

    found: dict[str, Callable[[], object]] = {}
    for op in _ops(Path(importlib.import_module("step1x.engine.dit").__file__ or "").parents[1]):
        *_, arguments = op.examples(torch.device("cpu"), torch.float32)
        found[f"kernel_{op.name}"] = partial(op.call, *arguments)
    return found


def kernel_names(root: Path) -> list[str]:
    return [op.name for op in _ops(root)]


def _ops(root: Path) -> Iterator[Any]:
    """What the modules of kernels/ list as their operations; older trees list none."""
    for path in sorted((root / "kernels").glob("*.py")):
        yield from getattr(importlib.import_module(f"step1x.kernels.{path.stem}"), "OPS", ())


def _fastest(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
