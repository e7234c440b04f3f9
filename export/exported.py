"""Exported engines, between the libraries and engine/: what is written for one, and how a loaded one runs steps."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from step1x.engine.backends import Backend, Exported
from step1x.engine.checkpoint import Sink
from step1x.engine.denoise import Runner
from step1x.engine.dit import DiT, Rope, Step
from step1x.engine.engine_config import EngineConfig
from step1x.engine.errors import InputError
from step1x.engine.kept import Active, Rows8
from step1x.engine.loading import checked_device
from step1x.engine.parts import networks
from step1x.engine.store import COMPILED
from step1x.engine.vae import VAE
from step1x.export.core import ENTRIES, LARGEST_BATCH, Entry, Inputs, RowsInputs, inputs_of, rows_inputs_of
from step1x.profiles import Profile

if TYPE_CHECKING:
    from step1x.export.tensorrt_compile import Sizes

Fill = Callable[[Sink], object]  # writes a file
Given = TypeVar("Given", Inputs, RowsInputs)


def files(backend: Backend, config: EngineConfig, profile: Profile, folder: Path) -> Iterator[tuple[str, Fill]]:
    """Name and content of each file besides the tensors. Each is wanted when those before it are written.

    Raises InputError, one line: a library is missing or refuses the model, or the device is not there.
    """
    fp32_norms = config.variant().dtype_flow != "pure"
    made = networks(config, profile, fp32_norms=fp32_norms)
    if backend.name == "aoti":
        device = checked_device(profile.device)
        for network in (made.dit, made.vae):
            network.to_empty(device=device).eval().requires_grad_(False)
        yield from ((f"{entry}.pt2", partial(_compiled, entry, made.dit, made.vae)) for entry in ENTRIES)
        return
    yield from ((f"{entry}.onnx", partial(_graph, entry, made.dit, made.vae, folder)) for entry in ENTRIES)
    if backend.name == "tensorrt":
        from step1x.export.tensorrt import profiles

        for entry in ENTRIES:
            name = f"{entry}.{backend.target}.engine"
            sizes = profiles(entry, levels=levels_of(profile), text=config.variant().text_tokens)
            yield name, partial(_planned, folder / f"{entry}.onnx", backend.target, sizes)


def _compiled(entry: Entry, dit: DiT, vae: VAE, file: Sink) -> None:
    from step1x.export.aoti import build

    with TemporaryDirectory() as scratch:
        [path] = build(Path(scratch), dit, vae, (entry,), kernels=dit.device.type == "cuda")
        _copy(path, file)


def _graph(entry: Entry, dit: DiT, vae: VAE, folder: Path, file: Sink) -> None:
    from step1x.export.onnx import graph_in

    file.write(graph_in(folder, entry, dit, vae))


def levels_of(profile: Profile) -> list[int]:
    """Size levels that an engine has kernels for: the profile's largest, and smaller ones."""
    return sorted({max(16, profile.size * share // 4 // 16 * 16) for share in (2, 3, 4)})


def _planned(graph: Path, target: str, sizes: "Sequence[Sizes]", file: Sink) -> None:
    from step1x.export.tensorrt import build

    with TemporaryDirectory(dir=graph.parent) as scratch:  # an engine may be larger than what is for temporary files
        path = Path(scratch) / "plan"
        build(graph, path, target=target, profiles=sizes)
        _copy(path, file)


def _copy(path: Path, file: Sink) -> None:
    with path.open("rb") as source:
        shutil.copyfileobj(source, cast("IO[bytes]", file), 1 << 24)


def opened(backend: Backend, folder: Path, dit: DiT, vae: VAE) -> Exported:
    """The exported entries of an engine folder. Raises InputError, one line, for what this machine cannot run."""
    if backend.name == "aoti":
        from step1x.export.aoti import AotiRunner

        return AotiRunner(folder, dit, vae)
    if backend.name == "onnx":
        from step1x.export.ort import OrtRunner

        return OrtRunner(folder, dit.device)
    from step1x.export.tensorrt_library import LIBRARIES
    from step1x.export.tensorrt_runtime import TensorRT

    plans = {entry: folder / f"{entry}.{backend.target}.engine" for entry in ENTRIES}
    return TensorRT.load(plans, LIBRARIES[backend.library], dit.device, folder / COMPILED)


def runner_of(run: Exported, plain: Runner | None) -> Runner:
    """Steps by an exported engine. plain: for text to image, which has no exported form."""

    def velocity(tokens: Tensor, step: Step, rope: Rope, kept: int | None = None) -> Tensor:
        if kept is None or kept == tokens.shape[1]:
            if plain is None:
                raise InputError("exported engines edit pictures, with the exact algebra on; use --backend torch")
            return plain.velocity(tokens, step, rope, kept)
        given = inputs_of(tokens, step, rope, kept)
        return torch.cat([run.step(some) for some in parts(given)]).to(tokens.dtype)

    def rows(tokens: Tensor, step: Step, rope: Rope, kept: int | None, active: Active) -> Tensor:
        keys, values = zip(*active.kept.blocks, strict=True)
        caches = (together(keys, tokens.dtype), together(values, tokens.dtype))
        made = [run.rows(some) for some in parts(rows_inputs_of(tokens, active.image, caches, step, rope))]
        for stores, index in ((keys, 1), (values, 2)):
            new = torch.cat([one[index] for one in made])
            for store, whole in zip(stores, new.unbind(1), strict=True):
                put(store, whole, active.joint)
        return torch.cat([one.velocity for one in made])[:, :kept].to(tokens.dtype)

    return Runner(velocity, rows=rows)


def parts(given: Given) -> list[Given]:
    """The inputs of batches that an exported engine takes."""
    split = [tensor.split(LARGEST_BATCH) for tensor in given]
    return [type(given)(*tensors) for tensors in zip(*split, strict=True)]


def together(stores: Sequence[Tensor | Rows8], dtype: torch.dtype) -> Tensor:
    """What is kept of all blocks, (batch, blocks, heads, rows, head_dim)."""
    return torch.stack([store if isinstance(store, Tensor) else store.read(dtype) for store in stores], dim=1)


def put(store: Tensor | Rows8, whole: Tensor, rows: Tensor) -> None:
    """Keeps a block's keys or values (batch, heads, rows, head_dim), of which `rows` (batch or 1, n) are other ones."""
    if isinstance(store, Tensor):
        store.copy_(whole)
        return
    index = rows[:, None, :, None].expand(len(whole), whole.shape[1], -1, whole.shape[3])
    store.write(rows, whole.gather(2, index))


def take_halves(run: Exported, vae: VAE) -> None:
    """Lets the autoencoder run as exported, but for pictures that go through in strips."""

    def in_parts(half: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda pictures: torch.cat([half(some) for some in pictures.split(LARGEST_BATCH)])

    vae.encoder.forward = in_parts(run.encode)  # type: ignore[assignment, method-assign]
    vae.decoder.forward = in_parts(run.decode)  # type: ignore[assignment, method-assign]
