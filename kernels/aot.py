"""Compiles every Triton kernel of ours for every chip, which needs no GPU: does it compile, spill, or want too much?

    python -m step1x.kernels.aot [--chip 90] [--json FILE]

A spill keeps registers in memory, and a launch that wants more shared memory than the chip has fails.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any

import click

from step1x.kernels.launch import CHIPS, Compilation, triton


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one compiled kernel takes on a chip, and what it was made with."""

    kernel: str
    chip: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: what ptxas keeps on its stack
    shared_bytes: int  # of a block
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    @property
    def fault(self) -> str:
        """Why it must not be launched on its chip; empty if it may."""
        limit = CHIPS[self.chip].shared_bytes
        faults = []
        if self.spilled_bytes:
            faults.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > limit:
            faults.append(f"shared memory above {limit} bytes")
        return ", ".join(faults)

    @property
    def made_with(self) -> str:
        types = " ".join(dict.fromkeys(name for name in self.signature.values() if name.startswith("*")))
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{types} {constants} warps={self.num_warps} stages={self.num_stages}"


def modules() -> list[ModuleType]:
    """The modules of kernels/ that define operations."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    found = [importlib.import_module(f"step1x.kernels.{name}") for name in names]
    return [module for module in found if hasattr(module, "OPS")]


def compile_ahead(compilation: Compilation, chip: int) -> Resources:
    """Compiles one specialisation as a launch on the chip would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature = compilation.kernel, dict(compilation.signature)
    # A launch tells the compiler which arguments are multiples of 16; without it there are no wide or async copies.
    free = {one.name for one in kernel.params if one.do_not_specialize}
    if apart := {name for name, kind in signature.items() if kind == "i32"} - compilation.aligned - free:
        raise ValueError(
            f"{kernel.__name__}: a launch compiles {', '.join(sorted(apart))} anew for 1 and multiples of 16"
        )
    aligned = ({name for name, kind in signature.items() if kind.startswith("*")} | compilation.aligned) - free
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=dict(compilation.constants),
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {
        "num_warps": compilation.num_warps,
        "num_stages": compilation.num_stages,
        "enable_fp_fusion": compilation.fp_fusion,
    }
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    except Exception as error:
        error.add_note(f"compiling {kernel.__name__} for sm_{chip} from {compilation}")
        raise
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(
        kernel=kernel.__name__,
        chip=chip,
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        signature=signature,
        constants=dict(compilation.constants),
        num_warps=compilation.num_warps,
        num_stages=compilation.num_stages,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert usage, said
    return int(usage[1]), int(usage[2])


def table(found: Iterable[Resources]) -> str:
    lines = [f"{'kernel':32} {'chip':>4} {'registers':>9} {'spilled':>7} {'shared':>7}  made with"]
    for one in found:
        figures = f"{one.chip:4} {one.registers:9} {one.spilled_bytes:7} {one.shared_bytes:7}"
        fault = f"  FAULT: {one.fault}" if one.fault else ""
        lines.append(f"{one.kernel:32} {figures}  {one.made_with}{fault}")
    return "\n".join(lines)


@click.command(help="Compile every kernel ahead of time and print what it takes; fail if one spills or does not fit.")
@click.option("--chip", "chips", multiple=True, type=click.Choice([str(chip) for chip in CHIPS]), help="[default: all]")
@click.option("--json", "out", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures here too.")
def main(chips: tuple[str, ...], out: Path | None) -> None:
    if triton is None or triton.knobs.runtime.interpret:
        click.echo("Triton is not installed, or TRITON_INTERPRET is set: nothing can be compiled", err=True)
        sys.exit(2)
    families = modules()
    wanted = [
        (one, chip) for chip in map(int, chips or CHIPS) for family in families for one in family.compilations(chip)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of the work is in MLIR, LLVM and ptxas, outside Python
        found = sorted(pool.map(lambda one: compile_ahead(*one), wanted), key=lambda one: (one.kernel, one.chip))
    click.echo(table(found))
    if out:
        out.write_text(json.dumps([asdict(one) for one in found], indent=1, default=str) + "\n")
    if faults := [one for one in found if one.fault]:
        raise click.ClickException(f"{len(faults)} of {len(found)} must not be launched")


if __name__ == "__main__":
    main()
