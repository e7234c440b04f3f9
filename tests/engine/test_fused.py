"""The fused blocks against the plain ones, in float64; any depth, both dtype flows, bias and pruning."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from step1x.bench.counting import Launches
from step1x.engine.dit import DiT
from step1x.engine.fused import Fused

COUNT = 12  # image rows of `step_arguments`
Build = Callable[..., DiT]
Arguments = Callable[..., tuple]


def error(got: Tensor, wanted: Tensor) -> float:
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("depths", [(2, 2), (1, 1), (0, 2), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("fp32_norms", [True, False])
def test_equals_the_plain_blocks(
    small_dit: Build, step_arguments: Arguments, depths: tuple[int, int], fp32_norms: bool
) -> None:
    dit = small_dit(*depths, fp32_norms=fp32_norms)
    given = step_arguments(dit)
    for kept in (None, COUNT, COUNT // 2, 1):
        assert error(Fused(dit).velocity(*given, kept), dit.velocity(*given, kept)) < 1e-12


def test_without_bias_and_with_one_row(small_dit: Build, step_arguments: Arguments) -> None:
    dit = small_dit()
    given = step_arguments(dit, batch=1, bias=False)
    assert error(Fused(dit).velocity(*given), dit.velocity(*given)) < 1e-12


def test_references_can_be_chosen(small_dit: Build, step_arguments: Arguments) -> None:
    dit = small_dit()
    given = step_arguments(dit)
    assert torch.equal(Fused(dit, lambda op: op.reference).velocity(*given), Fused(dit).velocity(*given))


def test_half_precision_rounds_where_the_plain_blocks_do(small_dit: Build, step_arguments: Arguments) -> None:
    """Against float64 the fused path is as near as the plain one."""
    exact, rounded = small_dit(), small_dit(dtype=torch.bfloat16)
    given, coarse = step_arguments(exact), step_arguments(rounded)
    wanted = exact.velocity(*given)
    plain, fused = (run(*coarse).double() for run in (rounded.velocity, Fused(rounded).velocity))
    assert error(fused, wanted) < 1.5 * error(plain, wanted)


def test_a_fraction_of_the_launches(small_dit: Build, step_arguments: Arguments) -> None:
    dit = small_dit(4, 8)
    given = step_arguments(dit)
    counts = []
    for run in (dit.velocity, Fused(dit).velocity):
        with Launches() as launches:
            run(*given, COUNT // 2)
        counts.append(launches.total)
    assert counts[0] > 4 * counts[1], counts
