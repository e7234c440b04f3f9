from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from step1x.engine.vae import VAE
from step1x.training.autoencoder import LinearChain, loss, pairs, start_linear, whiten, write_chain
from step1x.training.recipe import CPU

CONFIG = CPU.vae


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        coarse = torch.rand(8, 3, 5, 5, generator=generator) * 2 - 1
        yield torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)


def test_written_chain_is_the_chain() -> None:
    """The ordinary architecture, with all its norms and SiLUs, computes the linear transform."""
    torch.manual_seed(0)
    chain, vae, pictures = LinearChain(CONFIG, 8), VAE(CONFIG), next(batches())
    chain.fit(batches(), 30)
    chain.whiten(pictures)
    chain.scale_features(pictures)
    write_chain(chain, vae)
    with torch.no_grad():
        latents, wanted = vae.encode(pictures), chain.encode(pictures)
        # The group norms hold their scale to some percent, not exactly.
        assert (latents - wanted).std() < 0.1 * wanted.std()
        decoded, linear = vae.decode(wanted), chain.decode(wanted)
        assert (decoded - linear).std() < 0.1 * linear.std()


def test_start_learns() -> None:
    torch.manual_seed(0)
    vae = VAE(CONFIG)
    error = start_linear(vae, batches(), 150)
    assert error < 0.05  # of pictures with variance 0.3
    with torch.no_grad():
        _, squared = loss(vae, next(batches()), 0.0)
    assert squared < 0.06


def test_whitening_keeps_what_the_decoder_sees() -> None:
    torch.manual_seed(0)
    vae, pictures = VAE(CONFIG), next(batches())
    with torch.no_grad():
        before = vae.decoder.conv_in(vae.encode(pictures))
        whiten(vae, [pictures])
        latents = vae.encode(pictures)
        after = vae.decoder.conv_in(latents)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(16), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(16), atol=1e-3)
    # Border cells see the shift through fewer taps of conv_in.
    assert torch.allclose(before[..., 1:-1, 1:-1], after[..., 1:-1, 1:-1], atol=1e-4)


def test_pairs_need_room() -> None:
    plus, minus, up, down = pairs(24, 4, 8)
    assert sorted(plus + minus + up + down) == list(range(24))
    with pytest.raises(ValueError, match="cannot carry 9 signals"):
        pairs(24, 4, 9)
