"""The closed formulas against what the counters see, and against the figures of model.md §3.13."""

import pytest
import torch

from step1x.bench import formula, full
from step1x.bench.counters import GRID, TEXT_TOKENS
from step1x.bench.counting import flop_counter
from step1x.engine import released
from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiT, DiTConfig, Text
from step1x.engine.hollow import see
from step1x.engine.image import Canvas, image_ids
from step1x.engine.vae import VAE, VAEConfig

SMALL = DiTConfig(
    in_channels=64,
    out_channels=64,
    hidden_size=96,
    heads=3,
    depth=2,
    depth_single=3,
    mlp_hidden=256,
    context_channels=48,
    pooled_channels=40,
    timestep_channels=256,
    rope_axes=(8, 12, 12),
    rope_theta=10000.0,
    connector=ConnectorConfig(
        in_channels=56,
        hidden_size=48,
        heads=2,
        depth=2,
        mlp_hidden=96,
        timestep_channels=256,
        pooled_channels=40,
        has_scale_factor=False,
    ),
    text_token_mapping=False,
)
SMALL_VAE = VAEConfig(
    in_channels=3, channels=(8, 16, 16, 24), res_blocks=2, z_channels=16, groups=4, scale_factor=1.0, shift_factor=0.0
)


@pytest.mark.parametrize("batch", [1, 3])
def test_transformer(batch: int) -> None:
    canvas, rows = Canvas(80, 48), 21
    with torch.device("meta"), torch.no_grad():
        model = DiT(SMALL)
        text = Text(torch.zeros(batch, rows, 56), torch.ones(batch, rows, dtype=torch.long))
        rope = model.rope(torch.zeros(1, rows, 3), image_ids(canvas.grid, (1, 1, 1)).to("meta"))
        with flop_counter() as counter:
            model(torch.zeros(batch, 2 * canvas.tokens, 64), text, torch.zeros(batch), rope)
    assert counter.get_total_flops() == pytest.approx(formula.dit(SMALL, 2 * canvas.tokens, rows, batch), rel=1e-9)


def test_autoencoder() -> None:
    width, height = 64, 48
    with torch.device("meta"), torch.no_grad():
        model = VAE(SMALL_VAE)
        with flop_counter() as encoding:
            latents = model.encode(torch.zeros(2, 3, height, width))
        with flop_counter() as decoding:
            model.decode(latents)
    assert encoding.get_total_flops() == formula.vae_encode(SMALL_VAE, width, height, 2)
    assert decoding.get_total_flops() == formula.vae_decode(SMALL_VAE, width, height, 2)


def test_text_model() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            **released.QWEN["vision_config"],
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    )
    rows, columns = 6, 9  # windows at the edges are smaller
    with torch.device("meta"), torch.no_grad():
        model = Qwen2_5_VLModel(config)
        with flop_counter() as language:
            model.language_model(
                inputs_embeds=torch.zeros(1, 7, 64), position_ids=torch.zeros(3, 1, 7, dtype=torch.long)
            )
        with flop_counter() as vision:
            see(model.visual, rows, columns)
    positions = 2 * 3 * 7 * 8  # times frequencies: some versions of transformers do it as a product of matrices
    assert language.get_total_flops() - formula.language_model(config.text_config, 7) in (0, positions)
    assert vision.get_total_flops() == formula.vision_tower(config.vision_config, rows, columns)


@pytest.mark.parametrize(("side", "teraflops"), [(512, 40.3), (768, 87.6), (1024, 169.2)])
def test_released_transformer(side: int, teraflops: float) -> None:
    tokens = 2 * Canvas(side, side).tokens
    assert formula.dit(released.dit_config("v1.1"), tokens, 640) == pytest.approx(teraflops * 1e12, rel=0.01)


def test_released_autoencoder_and_text_model() -> None:
    assert formula.vae_encode(released.VAE, 1024, 1024) == pytest.approx(4.9e12, rel=0.01)
    assert formula.vae_decode(released.VAE, 1024, 1024) == pytest.approx(10.5e12, rel=0.01)
    config = full.hollow_qwen().config
    assert formula.language_model(config.text_config, TEXT_TOKENS) == pytest.approx(7.4e12, rel=0.01)
    assert formula.vision_tower(config.vision_config, *GRID) == pytest.approx(1.7e12, rel=0.01)
