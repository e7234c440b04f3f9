"""A whole step through the kernels: what it launches is what is compiled ahead of time, and what is counted."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from step1x.bench import full
from step1x.bench.counting import Launches
from step1x.engine.algebra import ON
from step1x.engine.denoise import Runner
from step1x.engine.dit import DiT
from step1x.engine.engine_config import model_sizes
from step1x.engine.fused import Fused
from step1x.engine.image import Canvas
from step1x.kernels.adaln import _adaln_kernel
from step1x.kernels.aot import modules
from step1x.kernels.attention_backends import merged, torch_lse
from step1x.kernels.cfg_step import cfg_step_op
from step1x.kernels.launch import Op
from step1x.kernels.merge_biased import merge_biased_op
from step1x.quant.linear import quantise_layers

Step = Callable[[Callable[[Op], Callable[..., Any]]], None]


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As a GPU's kernels return it: the CPU's has its heads last in memory."""
    out, lse = torch_lse(q, k, v)
    return out, lse.contiguous()


def step_of(dit: DiT) -> Step:
    """Both guidance branches of a step and what follows them, in operations of one's choice; odd numbers of rows."""
    canvas = Canvas(48, 80)
    latents = torch.zeros(1, canvas.tokens, dit.config.in_channels)

    def run(choose: Callable[[Op], Callable[..., Any]]) -> None:
        def attend(biased: tuple[int, int] | None) -> Any:
            assert biased is not None
            return partial(merged, slice(*biased), with_lse, merge=choose(merge_biased_op))

        velocity = full.step(dit, canvas, ON, Runner(Fused(dit, choose, attend).velocity))()
        choose(cfg_step_op)(latents, velocity, 6.0, -0.03, True, "autocast-fp32")

    return run


@pytest.fixture(params=["bfloat16", "float32", "fp8"])
def dit(request: pytest.FixtureRequest) -> DiT:
    """Of the bundled model's widths."""
    made = full.hollow_dit(replace(model_sizes(None).dit, depth=2, depth_single=2))
    dtype = torch.float32 if request.param == "float32" else torch.bfloat16
    full.fill(made, full.random(torch.device("cpu")), dtype)
    if request.param == "fp8":
        assert quantise_layers(made, "dit", "fp8")
    return made


def test_every_launch_was_compiled_ahead(dit: DiT, recorded: Any) -> None:
    """Whatever the numbers of rows: no argument makes Triton compile a kernel anew."""
    launched = recorded(_adaln_kernel)
    with torch.no_grad():
        step_of(dit)(lambda op: op.kernel)
    for chip in (90, 120):
        compiled = launched.described(one for module in modules() for one in module.compilations(chip))
        for one in launched.seen:
            assert one in compiled, one


def test_what_is_counted_is_launched(dit: DiT, recorded: Any) -> None:
    """An operation of ours is one launch: it neither copies nor casts what the step gives it."""
    step = step_of(dit)
    with torch.no_grad(), Launches() as counted:
        step(lambda op: op.call)
    launched = recorded(_adaln_kernel)
    with torch.no_grad(), Launches() as around:
        step(lambda op: op.kernel)
    ours = {name: number for name, number in counted.operators.items() if name.startswith("step1x.")}
    assert sum(ours.values()) == len(launched.seen) == 29
    assert dict(around.operators) == {name: n for name, n in counted.operators.items() if name not in ours}
