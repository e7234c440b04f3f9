"""Sizes of the networks: from the shapes in the files and, for what shapes do not show, a config beside them.

Not visible in shapes: rotary axes, heads of the connector, GroupNorm groups, scale and shift of the
latents. Without a config these are the released model's, or its proportions. A config that contradicts the
shapes is an error.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step1x.engine import layouts
from step1x.engine.checkpoint import Checkpoint
from step1x.engine.config_file import DIT_DIFFUSERS, DIT_OFFICIAL, VAE_DIFFUSERS, VAE_OFFICIAL, stated
from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiTConfig
from step1x.engine.errors import InputError
from step1x.engine.layouts import KeyMap
from step1x.engine.vae import VAEConfig

ROPE_THETA = 10000.0  # §3.1
CONNECTOR_HEAD_DIM = 128  # §2: 4096 = 32 heads × 128
CONNECTOR_HEADS = 32
NORM_GROUPS = 32  # §4
SCALE_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159  # §4


class Shapes:
    """Shapes of a checkpoint under official names, whichever layout it is in."""

    def __init__(self, checkpoint: Checkpoint, keys: KeyMap | None) -> None:
        self._checkpoint = checkpoint
        self._keys = keys  # None: the checkpoint is in the official layout

    def _name(self, key: str) -> str:
        return self._keys.names(key).keys[0] if self._keys else key

    def __contains__(self, key: str) -> bool:
        return self._name(key) in self._checkpoint

    def get(self, key: str, axes: int) -> tuple[int, ...]:
        """Raises InputError when the tensor is missing or has another number of axes, or an empty one."""
        name = self._name(key)
        if name not in self._checkpoint:
            raise InputError(f"{self.where}: missing {name}")
        entry = self._checkpoint[name]
        if len(entry.shape) != axes or not all(entry.shape):
            raise InputError(f"{entry.file}: misshapen {name}: {list(entry.shape)}, expected {axes} axes")
        return entry.shape

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), … there are in a row."""
        index = 0
        while pattern.format(index) in self:
            index += 1
        return index

    @property
    def where(self) -> Path:
        return self._checkpoint.where


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """The released model's split 16 + 56 + 56 of 128 channels in proportion, in even numbers."""
    side = 2 * (7 * head_dim // 32)
    return head_dim - 2 * side, side, side


def _connector_heads(width: int, where: Path) -> int:
    if width % CONNECTOR_HEAD_DIM == 0:
        return width // CONNECTOR_HEAD_DIM
    if width % CONNECTOR_HEADS == 0:
        return CONNECTOR_HEADS
    raise InputError(
        f"{where}: the heads of a connector of width {width} cannot be guessed; "
        "state connector_heads_num in the config beside the weights"
    )


def _dit_seen(shapes: Shapes) -> dict[str, Any]:
    """Everything that the shapes of a transformer show."""
    hidden, in_channels = shapes.get("img_in.weight", 2)
    depth = shapes.count("double_blocks.{}.img_mlp.0.weight")
    depth_single = shapes.count("single_blocks.{}.linear2.weight")
    if depth:
        head_dim = shapes.get("double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
        mlp_hidden = shapes.get("double_blocks.0.img_mlp.0.weight", 2)[0]
    else:
        head_dim = shapes.get("single_blocks.0.norm.query_norm.scale", 1)[0]
        mlp_hidden = shapes.get("single_blocks.0.linear2.weight", 2)[1] - hidden
    if hidden % head_dim:
        raise InputError(f"{shapes.where}: width {hidden} is no multiple of head width {head_dim}")
    return {
        "in_channels": in_channels,
        "out_channels": shapes.get("final_layer.linear.weight", 2)[0],
        "hidden_size": hidden,
        "heads": hidden // head_dim,
        "head_dim": head_dim,
        "depth": depth,
        "depth_single": depth_single,
        "mlp_hidden": mlp_hidden,
        "context_channels": shapes.get("txt_in.weight", 2)[1],
        "pooled_channels": shapes.get("vector_in.in_layer.weight", 2)[1],
        "timestep_channels": shapes.get("time_in.in_layer.weight", 2)[1],
        "text_token_mapping": "text_token_mapping.weight" in shapes,
    }


def _connector_seen(shapes: Shapes) -> dict[str, Any]:
    """Everything that the shapes of a connector show."""
    block = "connector.S.individual_token_refiner.blocks.{}.mlp.fc1.weight"
    hidden, in_channels = shapes.get("connector.S.input_embedder.weight", 2)
    depth = shapes.count(block)
    return {
        "in_channels": in_channels,
        "hidden_size": hidden,
        "depth": depth,
        "mlp_hidden": shapes.get(block.format(0), 2)[0] if depth else 4 * hidden,
        "timestep_channels": shapes.get("connector.S.t_embedder.mlp.0.weight", 2)[1],
        "pooled_channels": shapes.get("connector.global_proj_out.weight", 2)[0],
        "has_scale_factor": "connector.scale_factor" in shapes,
    }


def dit_config(checkpoint: Checkpoint, configs: Sequence[Path]) -> DiTConfig:
    """Sizes of the transformer in `checkpoint`, either layout; `configs` are files that may state them.

    Raises InputError when shapes and config disagree, or when something cannot be known.
    """
    layout = layouts.detect(checkpoint, checkpoint.where)
    shapes = Shapes(checkpoint, None if layout == "official" else layouts.dit_map())
    seen, connector = _dit_seen(shapes), _connector_seen(shapes)
    config = stated(configs, ("params", DIT_OFFICIAL), ("num_layers", DIT_DIFFUSERS))
    if "mlp_ratio" in config.values:
        config = config.derived("mlp_hidden", round(seen["hidden_size"] * config.real("mlp_ratio", 4.0)), "mlp_ratio")
    config.agree(seen, shapes.where)
    config.agree({f"connector.{name}": value for name, value in connector.items()}, shapes.where)
    heads = config.number("connector.heads", 0) if "connector.heads" in config.values else None
    try:
        connector_config = ConnectorConfig(
            heads=heads or _connector_heads(connector["hidden_size"], shapes.where), **connector
        )
        return DiTConfig(
            rope_axes=config.numbers("rope_axes", rope_axes(seen.pop("head_dim"))),
            rope_theta=config.real("rope_theta", ROPE_THETA),
            connector=connector_config,
            **seen,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{config.path or shapes.where}: {error}") from None


def _vae_seen(shapes: Shapes) -> dict[str, Any]:
    """Everything that the shapes of an autoencoder show."""
    levels = shapes.count("encoder.down.{}.block.0.conv1.weight")
    widths = (shapes.get(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels))
    return {
        "in_channels": shapes.get("encoder.conv_in.weight", 4)[1],
        "channels": tuple(widths),
        "res_blocks": shapes.count("encoder.down.0.block.{}.conv1.weight"),
        "z_channels": shapes.get("decoder.conv_in.weight", 4)[1],
    }


def vae_config(checkpoint: Checkpoint, configs: Sequence[Path]) -> VAEConfig:
    """Sizes of the autoencoder in `checkpoint`, either layout; `configs` are files that may state them.

    Raises InputError when shapes and config disagree.
    """
    layout = layouts.detect_vae(checkpoint, checkpoint.where)
    shapes = Shapes(checkpoint, None if layout == "official" else layouts.vae_map(0))
    config = stated(configs, ("args", VAE_OFFICIAL), ("block_out_channels", VAE_DIFFUSERS))
    if "ch" in config.values:
        widths = [config.number("ch", 1) * times for times in config.numbers("ch_mult", (1,))]
        config = config.derived("channels", widths, "ch_mult")
    seen = _vae_seen(shapes)
    if not seen["channels"]:
        raise InputError(f"{shapes.where}: missing encoder level 0")
    config.agree(seen, shapes.where)
    try:
        return VAEConfig(
            groups=config.number("groups", NORM_GROUPS),
            scale_factor=config.real("scale_factor", SCALE_FACTOR),
            shift_factor=config.real("shift_factor", SHIFT_FACTOR),
            **seen,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{config.path or shapes.where}: {error}; state norm_num_groups in the config") from None
