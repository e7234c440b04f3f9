"""Timesteps and guidance against the numbers of the reference, and their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step1x.engine.schedule import guided, rescale, shift, timesteps


@pytest.mark.parametrize(
    ("tokens", "first", "last"),
    [
        (1024, [1, 0.980656, 0.960644, 0.939928, 0.918472, 0.896233], [0.126204, 0.06502, 0]),
        (4096, [1, 0.988409, 0.976222, 0.963394, 0.949873, 0.935599, 0.920509], [0.195455, 0.104721, 0]),
    ],
)
def test_values_of_the_reference(tokens: int, first: list[float], last: list[float]) -> None:
    t = timesteps(28, tokens).tolist()
    assert t[: len(first)] == pytest.approx(first, abs=1e-6)
    assert t[-len(last) :] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (2304, 0.846667), (4096, 1.15)])
def test_shift_is_linear_in_the_exponent(tokens: int, mu: float) -> None:
    assert math.log(shift(tokens)) == pytest.approx(mu, abs=1e-6)


@settings(deadline=None)
@given(steps=st.integers(1, 100), tokens=st.integers(1, 20000))
def test_any_schedule_falls_from_one_to_zero(steps: int, tokens: int) -> None:
    t = timesteps(steps, tokens)
    assert (t.shape, t.dtype) == ((steps + 1,), torch.float32)
    assert t[0].item() == pytest.approx(1, abs=1e-6)
    assert t[-1] == 0
    assert (t.diff() < 0).all()
    # more tokens lean the schedule towards noise
    assert (timesteps(steps, tokens + 1000)[1:-1] > t[1:-1]).all()


@settings(deadline=None)
@given(steps=st.integers(1, 60), strength=st.floats(1e-20, 1))
def test_strength_keeps_the_end_of_the_schedule(steps: int, strength: float) -> None:
    whole, part = timesteps(steps, 1024), timesteps(steps, 1024, strength)
    kept = len(part) - 1
    assert 1 <= kept <= steps
    assert torch.equal(part, whole[-kept - 1 :])
    assert kept == max(steps - int((1 - strength) * steps), 1)


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 28), (0.5, 14), (0.25, 7), (0.01, 1), (1e-20, 1)])
def test_strength_by_example(strength: float, kept: int) -> None:
    assert len(timesteps(28, 1024, strength)) == kept + 1


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        timesteps(steps, 1024)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.5, math.nan])
def test_bad_strength(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
        timesteps(28, 1024, strength)


def test_divisor_is_one_up_to_a_norm_of_one() -> None:
    difference = torch.tensor([[[0.0, 0.0], [0.6, 0.8], [0.3, 0.0], [3.0, 4.0]]])
    wanted = torch.tensor([[[1.0], [1.0], [1.0], [5.0**0.4]]])
    torch.testing.assert_close(rescale(difference), wanted)
    torch.testing.assert_close(rescale(difference, power=1.0)[0, 3, 0], torch.tensor(5.0))


def test_guidance_by_example() -> None:
    uncond = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])
    cond = uncond + torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])
    plain = uncond + torch.tensor([[[18.0, 24.0], [1.8, 2.4]]])
    torch.testing.assert_close(guided(cond, uncond, 6.0, rescaled=False), plain)
    rescaled = uncond + torch.tensor([[[18.0, 24.0], [1.8, 2.4]]]) / torch.tensor([[[5.0**0.4], [1.0]]])
    torch.testing.assert_close(guided(cond, uncond, 6.0, rescaled=True), rescaled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rescaled", [False, True])
def test_guidance_of_zero_and_one(dtype: torch.dtype, rescaled: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    cond, uncond = (0.01 * torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    cond, uncond = cond.to(dtype), uncond.to(dtype)  # norms far below 1: both rules agree
    torch.testing.assert_close(guided(cond, uncond, 0.0, rescaled), uncond)
    torch.testing.assert_close(guided(cond, uncond, 1.0, rescaled), cond, atol=1e-4, rtol=1e-2)
    assert guided(cond, uncond, 6.0, rescaled).dtype == dtype


def test_norms_of_half_precision_may_be_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    cond, uncond = (torch.randn(1, 6, 16, generator=generator).bfloat16() for _ in range(2))
    got = guided(cond, uncond, 6.0, rescaled=True, fp32_norm=True)
    difference = (cond - uncond).float()  # the difference itself is rounded
    wanted = uncond.float() + 6.0 * difference / difference.norm(dim=-1, keepdim=True) ** 0.4
    torch.testing.assert_close(got, wanted)
    assert guided(cond, uncond, 6.0, rescaled=True).dtype == torch.bfloat16
    assert guided(cond, uncond, 6.0, rescaled=False, fp32_norm=True).dtype == torch.bfloat16
    assert guided(cond.double(), uncond.double(), 6.0, rescaled=True, fp32_norm=True).dtype == torch.float64


@settings(deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(0, 10), guidance=st.floats(0, 20))
def test_rescaled_guidance_bounds_the_step(seed: int, size: float, guidance: float) -> None:
    """Its length is g d^0.6 where d > 1, and the plain one's elsewhere; its direction never changes."""
    generator = torch.Generator().manual_seed(seed)
    uncond, difference = (torch.randn(2, 3, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    difference = size * difference / difference.norm(dim=-1, keepdim=True)
    moved = guided(uncond + difference, uncond, guidance, rescaled=True) - uncond
    length = guidance * (size**0.6 if size > 1 + 1e-9 else size)
    torch.testing.assert_close(moved, difference / max(size, 1e-30) * length, atol=1e-6, rtol=1e-6)
