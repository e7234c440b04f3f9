"""The config file beside weights: what it states, under our names, and how one is written.

Two spellings: the official constructor arguments ("params" and "connector", or "args") and a diffusers
config.json.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step1x.engine.checkpoint import read_json
from step1x.engine.dit import DiTConfig
from step1x.engine.errors import InputError
from step1x.engine.vae import VAEConfig

# Our name -> the name in an official config ("params", "connector" or "args") and in a diffusers one.
DIT_OFFICIAL = {
    "in_channels": "params.in_channels",
    "out_channels": "params.out_channels",
    "hidden_size": "params.hidden_size",
    "heads": "params.num_heads",
    "depth": "params.depth",
    "depth_single": "params.depth_single_blocks",
    "mlp_ratio": "params.mlp_ratio",
    "context_channels": "params.context_in_dim",
    "pooled_channels": "params.vec_in_dim",
    "rope_axes": "params.axes_dim",
    "rope_theta": "params.theta",
    "connector.in_channels": "connector.in_channels",
    "connector.hidden_size": "connector.hidden_size",
    "connector.heads": "connector.heads_num",
    "connector.depth": "connector.depth",
}
DIT_DIFFUSERS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "depth": "num_layers",
    "depth_single": "num_single_layers",
    "context_channels": "joint_attention_dim",
    "pooled_channels": "vector_in_dim",
    "timestep_channels": "timestep_in_dim",
    "rope_axes": "axes_dims_rope",
    "connector.in_channels": "connector_in_channels",
    "connector.hidden_size": "connector_hidden_size",
    "connector.heads": "connector_heads_num",
    "connector.depth": "connector_depth",
    "text_token_mapping": "enable_text_token_mapping",
    "rope_theta": "rope_theta",  # ours: the fork's is always 10000
}
VAE_OFFICIAL = {
    "in_channels": "args.in_channels",
    "ch": "args.ch",
    "ch_mult": "args.ch_mult",
    "res_blocks": "args.num_res_blocks",
    "z_channels": "args.z_channels",
    "groups": "norm_num_groups",
    "scale_factor": "args.scale_factor",
    "shift_factor": "args.shift_factor",
}
VAE_DIFFUSERS = {
    "in_channels": "in_channels",
    "channels": "block_out_channels",
    "res_blocks": "layers_per_block",
    "z_channels": "latent_channels",
    "groups": "norm_num_groups",
    "scale_factor": "scaling_factor",
    "shift_factor": "shift_factor",
}


@dataclass(frozen=True, slots=True)
class Stated:
    """What a config file says, under our names. `names` gives the file's own spelling for messages."""

    path: Path | None
    values: Mapping[str, Any]
    names: Mapping[str, str]

    def number(self, name: str, default: int) -> int:
        return self._of_type(name, default, int, "a whole number above 0", lambda value: value > 0)

    def real(self, name: str, default: float) -> float:
        return float(self._of_type(name, default, (int, float), "a finite number", math.isfinite))

    def numbers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        def positive(values: list[Any]) -> bool:
            return bool(values) and all(type(value) is int and value > 0 for value in values)

        return tuple(self._of_type(name, list(default), list, "a list of whole numbers above 0", positive))

    def _of_type(self, name: str, default: Any, kind: Any, wanted: str, valid: Callable[[Any], bool]) -> Any:
        if name not in self.values:
            return default
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not valid(value):
            raise InputError(f"{self.path}: {self.names[name]} is {value!r}, must be {wanted}")
        return value

    def agree(self, seen: Mapping[str, Any], weights: object) -> None:
        """Raises InputError where this config contradicts what the shapes say."""
        for name, number in seen.items():
            value = self.values.get(name, number)
            value = tuple(value) if isinstance(value, list) else value
            if value != number:
                shown = list(number) if isinstance(number, tuple) else number
                stated = list(value) if isinstance(value, tuple) else value
                raise InputError(f"{self.path}: {self.names[name]} is {stated}, but {weights} has {shown}")

    def derived(self, name: str, value: Any, source: str) -> "Stated":
        """With one more value, computed from the one called `source`."""
        names = {**self.names, name: f"{name} by {self.names[source]}"}
        return Stated(self.path, {**self.values, name: value}, names)


NOTHING = Stated(None, {}, {})


def stated(
    paths: Sequence[Path], official: tuple[str, Mapping[str, str]], diffusers: tuple[str, Mapping[str, str]]
) -> Stated:
    """The first of the files that holds a config, recognised by a key of its."""
    for path in paths:
        if not path.is_file():
            continue
        content = read_json(path)
        for mark, names in (official, diffusers):
            if mark in content:
                found = {name: _at(content, spelling) for name, spelling in names.items()}
                return Stated(path, {name: value for name, value in found.items() if value is not None}, names)
    return NOTHING


def _at(content: Mapping[str, Any], spelling: str) -> Any:
    """The value at a dotted name, None when there is none (diffusers also writes null for "the default")."""
    value: Any = content
    for name in spelling.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def dit_as_official(config: DiTConfig) -> dict[str, Any]:
    """The official constructor arguments of a transformer of these sizes."""
    return {
        "params": {
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "vec_in_dim": config.pooled_channels,
            "context_in_dim": config.context_channels,
            "hidden_size": config.hidden_size,
            "mlp_ratio": config.mlp_hidden / config.hidden_size,
            "num_heads": config.heads,
            "depth": config.depth,
            "depth_single_blocks": config.depth_single,
            "axes_dim": list(config.rope_axes),
            "theta": config.rope_theta,
            "qkv_bias": True,
        },
        "connector": {
            "in_channels": config.connector.in_channels,
            "hidden_size": config.connector.hidden_size,
            "heads_num": config.connector.heads,
            "depth": config.connector.depth,
        },
    }


def dit_as_diffusers(config: DiTConfig) -> dict[str, Any]:
    """The diffusers config.json of a transformer of these sizes (§3.11)."""
    return {
        "_class_name": "Step1XEditTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_channels,
        "timestep_in_dim": config.timestep_channels,
        "vector_in_dim": config.pooled_channels,
        "connector_in_channels": config.connector.in_channels,
        "connector_hidden_size": config.connector.hidden_size,
        "connector_heads_num": config.connector.heads,
        "connector_depth": config.connector.depth,
        "guidance_embeds": False,
        "axes_dims_rope": list(config.rope_axes),
        "enable_text_token_mapping": config.text_token_mapping,
        "rope_theta": config.rope_theta,
    }


def vae_as_official(config: VAEConfig) -> dict[str, Any]:
    """The official constructor arguments of an autoencoder of these sizes."""
    base = math.gcd(*config.channels)
    return {
        "args": {
            "in_channels": config.in_channels,
            "ch": base,
            "out_ch": config.in_channels,
            "ch_mult": [width // base for width in config.channels],
            "num_res_blocks": config.res_blocks,
            "z_channels": config.z_channels,
            "scale_factor": config.scale_factor,
            "shift_factor": config.shift_factor,
        },
        "norm_num_groups": config.groups,
    }


def vae_as_diffusers(config: VAEConfig) -> dict[str, Any]:
    """The diffusers config.json of an autoencoder of these sizes (§4)."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.res_blocks,
        "act_fn": "silu",
        "latent_channels": config.z_channels,
        "norm_num_groups": config.groups,
        "sample_size": 1024,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }
