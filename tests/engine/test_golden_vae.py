"""The autoencoder against tensors recorded from the reference code, in both layouts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from step1x.engine import sizes
from step1x.engine.checkpoint import Checkpoint
from step1x.engine.vae import VAE
from step1x.engine.weights import build, vae_targets

GOLDEN = Path(__file__).parent.parent / "golden"
BOUND = 1e-5

pytestmark = pytest.mark.golden


def load(name: str) -> VAE:
    checkpoint = Checkpoint([GOLDEN / f"{name}.safetensors"])
    with torch.device("meta"):
        vae = VAE(sizes.vae_config(checkpoint, [GOLDEN / f"{name}.json"]))
    build(vae, vae_targets(vae, checkpoint), checkpoint, "cpu", torch.float32)
    return vae


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vae_official_io.safetensors")


def compare(file: str, name: str, got: Tensor, wanted: Tensor) -> None:
    """Asserts the bound on max|a - b| / max|b| and prints the error."""
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    print(f"golden {file} {name} worst={error:.1e}")
    assert got.shape == wanted.shape
    assert error <= BOUND


@torch.inference_mode()
def test_golden_official_encoder(recorded: dict[str, Tensor]) -> None:
    vae, image = load("vae_official"), recorded["in.image"]
    got = {
        "encoder.moments": vae.encoder(image),
        "encoder.moments_odd": vae.encoder(recorded["in.image_odd"]),
        "encoder.mid.attn_1_out": vae.encoder.mid.attn_1(recorded["in.mid_attn_x"]),
        "latent_sampled": vae.encode(image, recorded["in.noise"]),
        "latent_mean": vae.encode(image),
    }
    for name, value in got.items():
        compare("vae_official_io.safetensors", name, value, recorded[name])


@torch.inference_mode()
def test_golden_official_decoder(recorded: dict[str, Tensor]) -> None:
    vae = load("vae_official")
    for name, latents in (("latent_sampled", recorded["latent_sampled"]), ("z", recorded["in.z"])):
        key = f"decode_of_{name}"
        compare("vae_official_io.safetensors", key, vae.decode(latents), recorded[key])


@torch.inference_mode()
def test_golden_diffusers(recorded: dict[str, Tensor]) -> None:
    vae, wanted = load("vae_diffusers"), load_file(GOLDEN / "vae_diffusers_io.safetensors")
    sampled = vae.encode(recorded["in.image"], recorded["in.noise"], clamp_logvar=True)
    got = {
        "moments": vae.encoder(recorded["in.image"]),
        "latent_sampled": sampled,
        "decode_of_latent_sampled": vae.decode(wanted["latent_sampled"]),
    }
    for name, value in got.items():
        compare("vae_diffusers_io.safetensors", name, value, wanted[name])
