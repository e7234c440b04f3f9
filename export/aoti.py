"""Ahead-of-time compiled graphs: torch.export, then AOTInductor, into packages that hold code and no weights.

A package is bound to the parameters of the loaded model, in place, so that all engines of a model share its weights.
Its code is for the kind of device and the instructions of the processor that it was compiled on, and for one version of
torch. One graph of an entry serves batches of 1 to 4 and all sizes.
"""

import hashlib
import json
import platform
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from step1x.engine.dit import DiT, here
from step1x.engine.errors import InputError
from step1x.engine.parts import architecture
from step1x.engine.vae import VAE
from step1x.export.core import (
    ENTRIES,
    Decoder,
    Encoder,
    Entry,
    Inputs,
    RowsCore,
    RowsInputs,
    RowsOutputs,
    StepCore,
    quiet,
    reference,
    registered,
    rows_example,
    step_example,
)

__all__ = ["AotiRunner", "build", "compile_entry", "export_entry", "traced"]

BATCH, SIDE = 4, 1024  # rows of a batch, and 16ths of a picture's side, at most
MADE = "step1x"  # the key in a package's metadata
MODEL = "model"  # the only one in a package
AGAIN = "build the engine again with --backend aoti"
# Instruction sets by the beginnings of their names; other words of /proc/cpuinfo change with the kernel.
X86 = "sse ssse avx amx fma f16c bmi abm popcnt movbe aes vaes gfni sha pclmul vpclmul adx clwb rdpid"
ARM = "asimd sve sme bf16 i8mm"
INSTRUCTIONS = (*X86.split(), *ARM.split())


class Made(NamedTuple):
    """What compiled code depends on."""

    torch: str
    architecture: str  # of the device: such as sm_90, or cpu
    processor: list[str]  # machine and instruction sets, all of which the code may use
    weights: str  # digest of what is bound: names, shapes and dtypes


class Traced(NamedTuple):
    """What an entry is exported from."""

    module: nn.Module
    example: tuple[Tensor, ...]
    dynamic: tuple[Any, ...]  # of each argument: its dimensions that vary


def traced(entry: Entry, dit: DiT, vae: VAE, *, kernels: bool = False) -> Traced:
    """kernels: operations of kernels/ remain nodes of the graph, so that a GPU runs our kernels."""
    batch, choose = Dim("batch", max=BATCH), registered if kernels else reference
    if entry == "step":
        step = step_example(dit)
        image = {0: batch, 1: Dim("target", max=1 << 20)}, {0: batch, 1: Dim("reference", max=1 << 20)}
        return Traced(StepCore(dit, choose), step, (*image, _packed(batch)))
    if entry == "rows":
        active, every = {0: batch, 1: Dim("active", max=1 << 20)}, {0: batch, 3: Dim("every", max=1 << 20)}
        return Traced(RowsCore(dit, choose), rows_example(dit), (active, active, (*_packed(batch), every, every)))
    height, width = Dim("height", max=SIDE), Dim("width", max=SIDE)
    config, like = vae.config, next(vae.parameters())
    if entry == "encoder":
        pixels = like.new_zeros(2, config.in_channels, 2 * 16, 3 * 16)
        return Traced(Encoder(vae), (pixels,), ({0: batch, 2: 16 * height, 3: 16 * width},))
    cells = 16 // config.factor
    latents = like.new_zeros(2, config.z_channels, 2 * cells, 3 * cells)
    return Traced(Decoder(vae), (latents,), ({0: batch, 2: cells * height, 3: cells * width},))


def _packed(batch: Dim) -> tuple[dict[int, Any], ...]:
    """Dimensions of `core.Packed`."""
    text = {0: batch, 1: Dim("text", max=1 << 16)}
    table = {0: batch, 2: Dim.AUTO}  # text and image rows together
    return text, *({0: batch} for _ in range(4)), table, table, text


def export_entry(module: nn.Module, example: Sequence[Tensor], dynamic: Sequence[Any]) -> ExportedProgram:
    """The graph of a module whose arguments vary in the dimensions `dynamic` says.

    Raises InputError if it needs tensors that are no weights of the module: a package would not hold them.
    """
    with torch.no_grad(), quiet():
        program = torch.export.export(module, tuple(example), dynamic_shapes=tuple(dynamic), strict=False)
    if program.constants:
        raise InputError("weights of this scheme (nvfp4) cannot be compiled ahead of time; use another profile")
    return program


def compile_entry(program: ExportedProgram, path: Path) -> None:
    """Compiles a graph into a package; what the compiler keeps beside it goes to a temporary folder.

    Raises InputError if there is no C++ compiler, or it fails.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
    from torch._inductor.utils import fresh_cache

    device = next(iter(program.state_dict.values())).device
    made = json.dumps(made_here(device, program.state_dict)._asdict())
    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": {MADE: made},
        "always_keep_tensor_constants": True,  # or tensors of a few numbers would be written into the code
        "aot_inductor.precompile_headers": False,  # they would stay in a folder of torch's own
    }
    try:
        with TemporaryDirectory() as kept, quiet(), fresh_cache(dir=kept):
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except (CppCompileError, InductorError, InvalidCxxCompiler) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path.name} cannot be compiled; is there a C++ compiler (g++)? {reason}") from error


def build(folder: Path, dit: DiT, vae: VAE, entries: Sequence[Entry] = ENTRIES, *, kernels: bool = False) -> list[Path]:
    """Writes the package of each entry to a folder: `step.pt2` …, for the device of the networks."""
    paths = []
    for entry in entries:
        paths.append(folder / f"{entry}.pt2")
        compile_entry(export_entry(*traced(entry, dit, vae, kernels=kernels)), paths[-1])
    return paths


def made_here(device: torch.device, weights: dict[str, Tensor]) -> Made:
    """What code compiled by this process for a device and weights depends on."""
    listed = [[name, list(part.shape), str(part.dtype)] for name, part in sorted(weights.items())]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return Made(torch.__version__.partition("+")[0], architecture(str(device)), processor(), digest)


def processor() -> list[str]:
    """Kind of machine and, on Linux, the instruction sets of its processor: the compiler may use all of them."""
    path, flags = Path("/proc/cpuinfo"), set[str]()
    if path.exists():
        lines = (line.partition(":") for line in path.read_text().splitlines())
        words = next((words for name, _, words in lines if name.strip() in ("flags", "Features")), "")
        flags = {word for word in words.split() if word.startswith(INSTRUCTIONS)}
    return [platform.machine(), *sorted(flags)]


class Compiled:
    """A package, bound to the weights of the module that it was exported from: it reads them where they are."""

    def __init__(self, path: Path, module: nn.Module) -> None:
        """Raises InputError if the package is missing, damaged, or not for this model, device, machine or torch."""
        from torch._C._aoti import AOTIModelPackageLoader
        from torch.export.pt2_archive._package import AOTICompiledModel

        self.weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}  # the code holds addresses
        device = next(iter(self.weights.values())).device
        check(path, _made(path), made_here(device, self.weights))
        try:
            self._loader = AOTIModelPackageLoader(
                str(path), MODEL, False, 1, -1 if device.index is None else device.index
            )
        except RuntimeError as error:
            raise InputError(f"{path}: cannot be loaded; {AGAIN}") from error
        model = AOTICompiledModel(self._loader)
        used = {name: self.weights[name] for name in model.get_constant_fqns()}
        assert all(weight.is_contiguous() for weight in used.values())
        model.load_constants(used, check_full_update=True, user_managed=True)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compiled code takes strides for granted."""
        return self._loader.boxed_run([one.contiguous() for one in inputs])


def _made(path: Path) -> Made:
    """From a package that has not been opened as code."""
    try:
        with zipfile.ZipFile(path) as package:
            broken = package.testzip()
            name = next(name for name in package.namelist() if name.endswith("wrapper_metadata.json"))
            found = Made(**json.loads(json.loads(package.read(name))[MADE]))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such package; {AGAIN}") from None
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, KeyError, TypeError):
        broken = str(path)
    if broken:
        raise InputError(f"{path}: damaged; {AGAIN}")
    return found


def check(path: Path, made: Made, here: Made) -> None:
    """Raises InputError unless a package's code can run in this process, on these weights."""
    if made.torch != here.torch:
        raise InputError(f"{path}: compiled with torch {made.torch}, here is {here.torch}; {AGAIN}")
    if made.architecture != here.architecture:
        raise InputError(f"{path}: compiled for {made.architecture}, the model is on {here.architecture}; {AGAIN}")
    if lacking := [one for one in made.processor if one not in here.processor]:
        raise InputError(f"{path}: compiled for a processor with {', '.join(lacking[:3])}, which this lacks; {AGAIN}")
    if made.weights != here.weights:
        raise InputError(f"{path}: compiled for another model, or other dtypes of its weights; {AGAIN}")


class AotiRunner:
    """The compiled entries that a folder holds, of loaded networks whose weights they use in place."""

    def __init__(self, folder: Path, dit: DiT, vae: VAE) -> None:
        """Raises InputError as `Compiled`, or if weights come and go: compiled code holds their addresses."""
        if dit.present is not here:
            raise InputError("compiled engines need all weights of the transformer on the device; use --backend torch")
        self._folder = folder
        self._entries = {
            entry: Compiled(folder / f"{entry}.pt2", traced(entry, dit, vae).module)
            for entry in ENTRIES
            if entry == "step" or (folder / f"{entry}.pt2").exists()
        }

    def step(self, inputs: Inputs) -> Tensor:
        """Velocity (B, N, C)."""
        return self._run("step", inputs)[0]

    def rows(self, inputs: RowsInputs) -> RowsOutputs:
        return RowsOutputs(*self._run("rows", inputs))

    def encode(self, pixels: Tensor) -> Tensor:
        """Moments (B, 2 z, H / 8, W / 8) of pixels (B, 3, H, W)."""
        return self._run("encoder", (pixels,))[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, 8 h, 8 w) of latents (B, z, h, w)."""
        return self._run("decoder", (latents,))[0]

    def _run(self, entry: Entry, inputs: Sequence[Tensor]) -> list[Tensor]:
        if entry not in self._entries:
            raise InputError(f"{self._folder}: there is no {entry}.pt2; {AGAIN}")
        return self._entries[entry](inputs)
