"""The autoencoder in strips is the whole one, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from step1x.bench.full import fill, hollow_vae
from step1x.engine import strips
from step1x.engine.counting import Memory
from step1x.engine.vae import VAE, VAEConfig

SMALL = VAEConfig(
    in_channels=3, channels=(4, 6, 8, 8), res_blocks=1, z_channels=5, groups=2, scale_factor=0.36, shift_factor=0.12
)


def pair(dtype: torch.dtype) -> tuple[VAE, VAE]:
    """The same weights, run whole and in strips."""
    torch.manual_seed(2)
    whole = VAE(SMALL).to(dtype).requires_grad_(False)
    for norm in (one for one in whole.modules() if isinstance(one, nn.GroupNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    cut = VAE(SMALL).to(dtype).requires_grad_(False)
    cut.load_state_dict(whole.state_dict())
    cut.strip_pixels = 0
    return whole, cut


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 2),
    height=st.integers(8, 60),
    width=st.integers(8, 24),
    rows=st.integers(1, 33),
    seed=st.integers(0, 99),
)
def test_equal_in_float64(batch: int, height: int, width: int, rows: int, seed: int) -> None:
    whole, cut = pair(torch.float64)
    image = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    given_image = image.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "ROWS", rows)
        latents, decoded = cut.encode(image), cut.decode(whole.encode(image))
    assert torch.equal(image, given_image)  # strips write into what they made, not into what they were given
    for got, wanted in ((latents, whole.encode(image)), (decoded, whole.decode(whole.encode(image)))):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equal_up_to_rounding(dtype: torch.dtype, bound: float) -> None:
    whole, cut = pair(dtype)
    image = torch.rand(1, 3, 144, 80, generator=torch.Generator().manual_seed(3)) * 2 - 1
    wanted = whole.encode(image)
    assert (cut.encode(image) - wanted).abs().max() <= bound * wanted.abs().max()
    got, decoded = cut.decode(wanted), whole.decode(wanted)
    assert got.dtype == dtype
    assert (got - decoded).abs().max() <= bound * decoded.abs().max()


def test_moments_of_a_large_mean_keep_their_digits() -> None:
    norm = nn.GroupNorm(2, 4, eps=1e-6)
    x = 1e4 + torch.randn(1, 4, 500, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scale, shift = strips.affine(norm, x.float())
    assert torch.allclose(x.float() * scale + shift, norm.double()(x).float(), atol=5e-3)


def test_only_large_pictures_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, cut = pair(torch.float32)[0], []
    for half in (vae.encoder, vae.decoder):
        run = half.strips
        monkeypatch.setattr(half, "strips", lambda x, run=run: (cut.append(tuple(x.shape)), run(x))[1])
    small, large = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 24)
    for limit, expected in ((None, []), (16 * 24, []), (16 * 16, [(1, 3, 16, 24), (1, 5, 2, 3)])):
        vae.strip_pixels = limit
        for image in (small, large):
            vae.decode(vae.encode(image))
        assert cut == expected


def peak(limit: int | None, half: str) -> int:
    """Largest live bytes of the released autoencoder at 1024 x 1024 in bfloat16, without its weights."""
    with FakeTensorMode():
        vae = hollow_vae().requires_grad_(False)
        fill(vae, lambda shape, dtype: torch.empty(shape, dtype=dtype), torch.bfloat16)
        vae.strip_pixels = limit
        given_one = torch.empty(1, 3, 1024, 1024) if half == "encode" else torch.empty(1, 16, 128, 128)
        with Memory() as memory:
            getattr(vae, half)(given_one)
    return memory.peak


@pytest.mark.parametrize(("half", "share"), [("encode", 0.6), ("decode", 0.6)])
def test_memory_at_full_size(half: str, share: float) -> None:
    whole, cut = peak(None, half), peak(0, half)
    print(f"{half}: {whole / 1e9:.2f} GB whole, {cut / 1e9:.2f} GB in strips")
    assert cut <= share * whole
