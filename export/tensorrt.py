"""TensorRT engines of exported graphs: which sizes each serves, for which GPU, and by which of two libraries.

    build("step.onnx", "step.sm_89.engine", target="sm_89", profiles=profiles("step"))

An engine serves every size up to its largest level: a profile for each level, whose kernels are chosen for its square.
The graph is read with the weights that it points to; it is one of onnx.py's, which gives its free axes their names.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from step1x.engine.caches import cache_folder
from step1x.engine.parts import architecture
from step1x.export.core import LARGEST_BATCH, Entry
from step1x.export.tensorrt_compile import Order, Range, Report, Sizes, compile_apart
from step1x.export.tensorrt_library import library_for

LEVELS = (512, 768, 1024)  # pixels on a side of a square picture
BATCH: Range = (1, LARGEST_BATCH, LARGEST_BATCH)  # with guidance both branches run together
TOKEN = 16  # pixels on a side of one token
TYPICAL_TEXT = 0.6  # of the longest: an instruction of a line, and what the text model says of the picture
WIDEST = 2  # longest side of a picture to that of a square of as many pixels: 4 to 1


def profiles(entry: Entry, *, levels: Iterable[int] = LEVELS, text: int = 640) -> list[Sizes]:
    """What an engine of an entry serves, a profile for each level. text: the most rows that an instruction has."""
    if entry in ("encoder", "decoder"):
        return [pixel_sizes(level) for level in sorted(levels)]
    found: list[Sizes] = []
    before = 0
    for level in sorted(levels):
        found.append(token_sizes(before + 1, level, text))
        before = most_tokens(level)
    return found


def token_sizes(least: int, level: int, text: int) -> Sizes:
    """Of steps, from so few target tokens on: to the most that a picture of the level has, and its reference."""
    square, most = (level // TOKEN) ** 2, most_tokens(level)
    words: Range = (1, max(1, round(TYPICAL_TEXT * text)), text)
    target: Range = (least, square, most)
    reference: Range = (0, square, most)  # none where no picture is edited
    active: Range = (1, max(1, square // 2), 2 * most)  # all of both pictures, when the caches are filled
    return {
        "batch": BATCH,
        "text": words,
        "target": target,
        "reference": reference,
        "active": active,
        "rows": added(words, target, reference),
        "computed": added(words, active),
    }


def most_tokens(level: int) -> int:
    """Of a picture of any aspect: the square's, and a row more, since sides are rounded up before they are floored."""
    return (level // TOKEN) ** 2 + level // TOKEN


def added(*sizes: Range) -> Range:
    least, usual, largest = (sum(own) for own in zip(*sizes, strict=True))
    return least, usual, largest


def pixel_sizes(level: int) -> Sizes:
    """Of pictures and their latents. Memory is taken for what comes, not for the largest (tensorrt_runtime)."""
    side = (TOKEN, level, WIDEST * level)
    cells: Range = (side[0] // 8, side[1] // 8, side[2] // 8)
    return {"batch": (1, 1, BATCH[2]), "height": side, "width": side, "latent_height": cells, "latent_width": cells}


def build(
    graph: str | Path, plan: str | Path, *, target: str, profiles: Sequence[Sizes], streamed: bool = False
) -> Report:
    """Builds an engine of an exported graph. target: a GPU architecture like sm_89, which need not be here.

    streamed: its weights may stay in host memory, from where they are copied as they are used.
    Raises InputError with one line: no library that builds for the target, or a graph that it refuses.
    """
    library = library_for(target, architecture("cuda"))
    times = cache_folder() / "tensorrt.times"
    if library.timed:
        times.parent.mkdir(parents=True, exist_ok=True)
    order = Order(
        graph=str(graph),
        plan=str(plan),
        library=library.name,
        target=target,
        profiles=profiles,
        streamed=streamed,
        times=str(times),
    )
    return compile_apart(order)
