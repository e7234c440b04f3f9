"""Shapes of the released models (model.md §1, §2, §3.1, §4), for what is planned, counted or timed without weights."""

from typing import Any

from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiTConfig
from step1x.engine.vae import VAEConfig

VERSIONS = ("v1.0", "v1.1", "v1.2")

VAE = VAEConfig(
    in_channels=3,
    channels=(128, 256, 512, 512),
    res_blocks=2,
    z_channels=16,
    groups=32,
    scale_factor=0.3611,
    shift_factor=0.1159,
)

# Keywords of transformers' Qwen2_5_VLConfig for Qwen2.5-VL-7B-Instruct (§1).
QWEN: dict[str, dict[str, Any]] = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


def dit_config(version: str) -> DiTConfig:
    """The released transformer with its connector. Raises ValueError for a version not in VERSIONS."""
    if version not in VERSIONS:
        raise ValueError(f"no released version {version!r}; there are {', '.join(VERSIONS)}")
    return DiTConfig(
        in_channels=64,
        out_channels=64,
        hidden_size=3072,
        heads=24,
        depth=19,
        depth_single=38,
        mlp_hidden=12288,
        context_channels=4096,
        pooled_channels=768,
        timestep_channels=256,
        rope_axes=(16, 56, 56),
        rope_theta=10000.0,
        connector=ConnectorConfig(
            in_channels=3584,
            hidden_size=4096,
            heads=32,
            depth=2,
            mlp_hidden=16384,
            timestep_channels=256,
            pooled_channels=768,
            has_scale_factor=version == "v1.0",
        ),
        text_token_mapping=version == "v1.2",
    )
