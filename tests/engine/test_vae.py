"""The autoencoder on small random weights: sizes, the posterior's sample and mean, clamping, dtypes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.engine.vae import VAE, Downsample, VAEConfig

SMALL = VAEConfig(
    in_channels=3,
    channels=(4, 6, 8, 8),
    res_blocks=1,
    z_channels=5,
    groups=2,
    scale_factor=0.3611,
    shift_factor=0.1159,
)


def autoencoder(config: VAEConfig = SMALL, dtype: torch.dtype = torch.float32) -> VAE:
    torch.manual_seed(2)
    return VAE(config).to(dtype).requires_grad_(False)


def picture(batch: int = 1, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


@settings(deadline=None, max_examples=25)
@given(height=st.integers(8, 40), width=st.integers(8, 40))
def test_each_level_halves_any_size_downwards(height: int, width: int) -> None:
    vae = autoencoder()
    latents = vae.encode(picture(1, height, width))
    assert latents.shape == (1, 5, height // 8, width // 8)
    assert vae.decode(latents).shape == (1, 3, height // 8 * 8, width // 8 * 8)


def test_halving_pads_right_and_below() -> None:
    down = Downsample(1).requires_grad_(False)
    down.conv.bias.zero_()
    x = torch.arange(24.0).view(1, 1, 4, 6)
    for corner, wanted in (((0, 0), x[..., ::2, ::2]), ((1, 1), x[..., 1::2, 1::2])):
        down.conv.weight.zero_()
        down.conv.weight[0, 0, *corner] = 1.0
        assert torch.equal(down(x), wanted)
    down.conv.weight.zero_()
    down.conv.weight[0, 0, 2, 2] = 1.0
    assert down(x)[0, 0].tolist() == [[14, 16, 0], [0, 0, 0]]


@pytest.mark.parametrize(("widths", "factor"), [((4,), 1), ((4, 6), 2), ((4, 6, 8), 4), ((4, 6, 8, 8), 8)])
def test_levels(widths: tuple[int, ...], factor: int) -> None:
    vae = autoencoder(replace(SMALL, channels=widths))
    assert vae.config.factor == factor
    latents = vae.encode(picture())
    assert latents.shape == (1, 5, 16 // factor, 24 // factor)
    assert vae.decode(latents).shape == (1, 3, 16, 24)


@pytest.mark.parametrize("res_blocks", [1, 2, 3])
def test_the_decoder_has_one_block_more(res_blocks: int) -> None:
    vae = autoencoder(replace(SMALL, res_blocks=res_blocks))
    assert {len(level.block) for level in vae.encoder.down} == {res_blocks}
    assert {len(level.block) for level in vae.decoder.up} == {res_blocks + 1}


def test_groups_must_divide_every_width() -> None:
    with pytest.raises(ValueError, match=r"widths \(4, 6, 8, 8\) are no multiples of 4 groups"):
        replace(SMALL, groups=4)


def test_sample_and_mean() -> None:
    vae, image = autoencoder(), picture()
    mean, logvar = vae.encoder(image).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(vae.encode(image), 0.3611 * (mean - 0.1159))
    torch.testing.assert_close(vae.encode(image, torch.zeros_like(noise)), vae.encode(image))
    sampled = 0.3611 * (mean + torch.exp(0.5 * logvar) * noise - 0.1159)
    torch.testing.assert_close(vae.encode(image, noise), sampled)
    # a usual log variance is far inside the limits
    torch.testing.assert_close(vae.encode(image, noise, clamp_logvar=True), sampled)


@pytest.mark.parametrize(("logvar", "limit"), [(-90.0, -30.0), (40.0, 20.0)])
def test_clamping_the_log_variance(logvar: float, limit: float) -> None:
    vae, image = autoencoder(), picture()
    vae.encoder.conv_out.weight[5:] = 0
    vae.encoder.conv_out.bias[5:] = logvar
    noise, mean = torch.ones(1, 5, 2, 3), vae.encode(image)
    for clamp, used in ((True, limit), (False, logvar)):
        spread = (vae.encode(image, noise, clamp_logvar=clamp) - mean).double()
        wanted = torch.full_like(spread, 0.3611 * torch.tensor(used / 2, dtype=torch.float64).exp())
        torch.testing.assert_close(spread, wanted, rtol=1e-3, atol=2e-7)


def test_decode_undoes_scale_and_shift() -> None:
    vae = autoencoder()
    z = torch.randn(1, 5, 2, 3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(vae.decode(0.3611 * (z - 0.1159)), vae.decoder(z), atol=1e-5, rtol=1e-4)


def test_a_batch_is_its_pictures() -> None:
    vae, images = autoencoder(), picture(3)
    noise = torch.randn(3, 5, 2, 3, generator=torch.Generator().manual_seed(6))
    latents = vae.encode(images, noise)
    decoded = vae.decode(latents)
    for index in range(3):
        one = slice(index, index + 1)
        torch.testing.assert_close(vae.encode(images[one], noise[one]), latents[one])
        torch.testing.assert_close(vae.decode(latents[one]), decoded[one], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_dtypes(dtype: torch.dtype, bound: float) -> None:
    image, noise = picture(), torch.randn(1, 5, 2, 3, generator=torch.Generator().manual_seed(7))
    exact, vae = autoencoder(dtype=torch.float64), autoencoder(dtype=dtype)
    wanted = exact.encode(image.double(), noise.double())
    latents = vae.encode(image, noise)
    assert latents.dtype == image.dtype  # the caller's, whatever the weights are in
    assert vae.dtype == dtype
    assert (latents - wanted).abs().max() <= bound * wanted.abs().max()
    decoded, wanted = vae.decode(wanted.float()), exact.decode(wanted)
    assert decoded.dtype == dtype
    assert (decoded - wanted).abs().max() <= bound * wanted.abs().max()


def test_attention_sits_in_the_middle_only() -> None:
    keys = list(autoencoder().state_dict())
    attended = {key.split(".attn_1.")[0] for key in keys if ".attn_1." in key}
    assert attended == {"encoder.mid", "decoder.mid"}
    shortcuts = {key.rsplit(".nin_shortcut", 1)[0] for key in keys if ".nin_shortcut.weight" in key}
    assert shortcuts == {
        "encoder.down.1.block.0",
        "encoder.down.2.block.0",
        "decoder.up.0.block.0",
        "decoder.up.1.block.0",
    }
