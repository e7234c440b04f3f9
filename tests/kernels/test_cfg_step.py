"""cfg_step: the engine's guidance and Euler step bit for bit, and the kernel against them."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.engine.denoise import euler
from step1x.engine.schedule import guided
from step1x.kernels.cfg_step import FLOWS, cfg_step, cfg_step_op, cfg_step_reference, cfg_step_triton

CPU = torch.device("cpu")
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is full of NaN: a value that is not written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same(found: Tensor, expected: Tensor, exact: bool) -> None:
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    if exact:
        assert torch.equal(found, expected)
    else:  # only the order of the sum and the power differ
        assert (found - expected).abs().max() <= 3e-7 * expected.abs().max()


@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("flow", FLOWS)
def test_reference_is_the_engines_step_over_several_steps(flow: str, rescaled: bool, dtype: torch.dtype) -> None:
    latents = torch.randn(2, 9, 64).to(dtype)
    for now, following in ((1.0, 0.97), (0.97, 0.9412), (0.9412, 0.91)):
        norms = torch.linspace(0.2, 3, 9)[:, None] / 8  # of the differences, below 1 and above
        prediction = (norms * torch.randn(4, 9, 64)).to(dtype)
        velocity = guided(*prediction.chunk(2), 3.3, rescaled, flow == "autocast-fp32")
        expected = euler(latents, velocity, following - now, flow)
        assert_same(cfg_step_reference(latents, prediction, 3.3, following - now, rescaled, flow), expected, exact=True)
        latents = expected


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_kernel_is_the_reference(dtype: torch.dtype) -> None:
    for latents, prediction, guidance, length, rescaled, flow in cfg_step_op.examples(CPU, dtype):
        arguments = (latents, prediction, guidance, length, rescaled, flow)
        exact = not rescaled or (dtype == HALF and flow != "autocast-fp32")
        expected = cfg_step_reference(*arguments)
        assert_same(cfg_step_triton(*arguments), expected, exact)
        assert torch.equal(cfg_step(*arguments), expected)


def test_kernel_is_near_the_exact_answer() -> None:
    for latents, prediction, *rest in cfg_step_op.examples(CPU, SINGLE):
        exact = cfg_step_reference(latents.double(), prediction.double(), *rest)
        assert (cfg_step_triton(latents, prediction, *rest) - exact).abs().max() <= 4e-7 * exact.abs().max()


@pytest.mark.parametrize("flow", ["autocast-state", "pure"])
def test_divisor_is_torchs_power_at_every_bfloat16(flow: str) -> None:
    """Of one channel, so that the norm is the difference itself: from 0.5 on, through 1, to 2**60."""
    sizes = torch.arange(0x3F00, 0x5D80, dtype=torch.int16).view(HALF)[None, :, None]
    prediction = torch.cat((sizes, torch.zeros_like(sizes)))
    arguments = (torch.zeros_like(sizes), prediction, 1.0, 1.0, True, flow)
    assert (cfg_step_triton(*arguments) != cfg_step_reference(*arguments)).sum() <= 1


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    channels=st.integers(1, 70),
    rescaled=st.booleans(),
    flow=st.sampled_from(FLOWS),
)
def test_any_shape(batch: int, tokens: int, channels: int, rescaled: bool, flow: str) -> None:
    latents, prediction = torch.randn(batch, tokens, channels), torch.randn(2 * batch, tokens, channels)
    arguments = (latents, prediction, 4.7, -0.1, rescaled, flow)
    assert_same(cfg_step_triton(*arguments), cfg_step_reference(*arguments), exact=not rescaled)


def test_columns_may_lie_apart_in_memory() -> None:
    latents, prediction = torch.randn(1, 8, 6).mT, torch.randn(2, 8, 6).mT
    arguments = (latents, prediction, 6.0, -0.1, False, "pure")
    assert_same(cfg_step_triton(*arguments), cfg_step_reference(*arguments), exact=True)


@pytest.mark.parametrize("shape", [(0, 5, 8), (1, 0, 8), (1, 5, 0)])
def test_nothing_gives_nothing(shape: tuple[int, int, int]) -> None:
    latents, prediction = torch.empty(shape, dtype=HALF), torch.empty(2 * shape[0], *shape[1:], dtype=HALF)
    for step in (cfg_step_reference, cfg_step_triton):
        found = step(latents, prediction, 6.0, -0.1, False, "autocast-fp32")
        assert (found.shape, found.dtype) == (shape, SINGLE)


def test_op_is_registered_right() -> None:
    for arguments in list(cfg_step_op.examples(CPU, HALF))[2::6]:
        torch.library.opcheck(cfg_step, arguments)


def test_wrong_arguments_are_refused() -> None:
    latents, prediction = torch.zeros(1, 4, 8), torch.zeros(2, 4, 8)
    for step in (cfg_step_reference, cfg_step_triton):
        with pytest.raises(ValueError, match="flow must be one of autocast-state, autocast-fp32, pure, got 'bf16'"):
            step(latents, prediction, 6.0, -0.1, False, "bf16")
        with pytest.raises(ValueError, match=r"twice the batch, got \(1, 4, 8\) and \(2, 5, 8\)"):
            step(latents, torch.zeros(2, 5, 8), 6.0, -0.1, False, "pure")
        with pytest.raises(ValueError, match="latents must be"):
            step(latents[0], prediction, 6.0, -0.1, False, "pure")
    with pytest.raises(ValueError, match="float64 is for the reference"):
        cfg_step_triton(latents.double(), prediction, 6.0, -0.1, False, "pure")
