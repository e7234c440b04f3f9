"""The bundled checkpoint `step1x-tiny` as data: sizes, wording, schedule. Everything specific to it is here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiTConfig
from step1x.engine.vae import VAEConfig
from step1x.engine.variants import DIFFUSERS_V11, Variant

PATCH_PIXELS = 28  # pixels on a side of one token of the text model's picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stretch of the transformer's training: canvases (width, height) of one batch size, and its share of time.

    first: share of the samples that are noise alone, where an edit is decided. own: share that lie on the model's own
    way, where later steps mend what the first one left. emphasis: added to the weight 1 of tokens that a local edit
    changes. log_floor: above 0, the mean of log(loss + log_floor) over the samples is descended, not that of the loss.
    """

    canvases: tuple[tuple[int, int], ...]
    batch: int
    share: float
    first: float = 0.0
    own: float = 0.0
    emphasis: float = 0.0
    log_floor: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Sizes and schedule of one training run; `hours` scales all stages."""

    name: str
    vae: VAEConfig
    dit: DiTConfig
    text: dict[str, int]  # keywords of tokenizer.small_text_model
    vocabulary: int
    variant: Variant
    # autoencoder
    vae_share: float  # of the time
    chain_steps: int
    vae_canvases: tuple[int, ...]  # sides of the pictures that windows are cut from
    vae_crops: tuple[tuple[int, int], ...]  # (side, batch) of the windows
    vae_lr: float
    # transformer, connector and text model
    stages: tuple[Stage, ...]
    lr: float
    scale_lr: float  # of the QK norms' scales
    text_lr: float  # of the text model: at faster rates it drifts as a whole, and instructions grow alike
    weight_decay: float
    ema: float
    shift: float  # of the noise levels: an edit is decided near 1, where only the reference shows the picture
    spread: float
    drop_instruction: float
    weights: Mapping[str, float]  # how often a family of edits is drawn; 1 for those not named
    scenes: float  # share of procedural pictures
    pool: int  # encoded pairs kept per canvas
    refresh: float  # share of a batch that is newly encoded each step


def dit_config(width: int, double: int, single: int, text_width: int) -> DiTConfig:
    return DiTConfig(
        in_channels=64,
        out_channels=64,
        hidden_size=width,
        heads=width // 32,
        depth=double,
        depth_single=single,
        mlp_hidden=4 * width,
        context_channels=128,
        pooled_channels=128,
        timestep_channels=256,
        rope_axes=(8, 12, 12),
        rope_theta=10.0,
        connector=ConnectorConfig(
            in_channels=text_width,
            hidden_size=128,
            heads=4,
            depth=2,
            mlp_hidden=512,
            timestep_channels=256,
            pooled_channels=128,
            has_scale_factor=False,
        ),
        text_token_mapping=False,
    )


# Weights in the v1.1 diffusers layout; what a small model needs otherwise is overridden, and stored beside it.
TINY_VARIANT = DIFFUSERS_V11.override(
    {
        "text_tokens": 160,  # a quarter of the rows at the 256 level, as 640 are at 512 in the released models
        "min_pixels": 4 * PATCH_PIXELS**2,
        "max_pixels": 4 * PATCH_PIXELS**2,
        "pre_resize": False,
        "size": 256,
        "steps": 2,  # what the first step says is hardly changed by more of them, and the error grows (docs/log.md)
        "guidance": 1.0,  # none: an edit that is a function of its source needs no pull away from others
    }
)

CPU = Recipe(
    name="cpu",
    vae=VAEConfig(
        in_channels=3,
        channels=(24, 32, 64, 96),
        res_blocks=1,
        z_channels=16,
        groups=4,
        scale_factor=1.0,
        shift_factor=0.0,
    ),
    dit=dit_config(192, 3, 4, 128),
    text={
        "hidden": 128,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "intermediate": 256,
        "vision_hidden": 64,
        "vision_depth": 2,
        "vision_heads": 2,
        "vision_intermediate": 128,
    },
    vocabulary=2000,
    variant=TINY_VARIANT,
    vae_share=0.2,
    chain_steps=600,
    vae_canvases=(128, 256),
    vae_crops=((128, 4), (128, 4), (256, 1)),
    vae_lr=4e-4,
    stages=(
        Stage(canvases=((64, 64),), batch=16, share=0.2),
        Stage(canvases=((64, 64), (128, 128), (144, 96), (96, 144)), batch=16, share=0.45),
        Stage(
            canvases=((192, 192), (256, 256), (304, 208), (208, 304), (288, 208), (320, 192)),
            batch=8,
            share=0.35,
            first=0.375,
            own=0.125,
            emphasis=7.0,
            log_floor=0.08,
        ),
    ),
    lr=1e-3,
    scale_lr=6e-3,
    text_lr=3e-5,
    weight_decay=0.01,
    ema=0.998,
    shift=5.0,
    spread=1.3,
    drop_instruction=0.07,
    # Where and which shape are learned last, and from the least of the picture.
    weights={"add": 12.0, "reshape": 12.0, "remove": 8.0, "recolour": 8.0, "paint_half": 8.0},
    scenes=0.15,
    pool=512,
    refresh=0.12,
)

# Goes on from a trained model (`--init`): the last stage alone, and mostly the edits that are learned last.
CPU_LOCAL = replace(
    CPU,
    name="cpu-local",
    stages=(replace(CPU.stages[-1], share=1.0),),
    lr=5e-4,
    scale_lr=3e-3,
    weights={"add": 6.0, "reshape": 30.0, "remove": 4.0, "recolour": 6.0, "paint_half": 3.0},
    pool=230,
)

# Ten minutes of one data-centre GPU: a wider network, larger batches, more of the 256 level.
GPU = replace(
    CPU,
    name="gpu",
    vae=VAEConfig(
        in_channels=3,
        channels=(32, 64, 96, 128),
        res_blocks=2,
        z_channels=16,
        groups=4,
        scale_factor=1.0,
        shift_factor=0.0,
    ),
    dit=dit_config(256, 4, 6, 128),
    vae_share=0.3,
    vae_crops=((128, 16), (256, 4)),
    stages=(
        replace(CPU.stages[0], batch=128, share=0.15),
        replace(CPU.stages[1], batch=128, share=0.45),
        replace(CPU.stages[2], batch=48, share=0.4),
    ),
    pool=2048,
    refresh=0.15,
)

RECIPES = {recipe.name: recipe for recipe in (CPU, CPU_LOCAL, GPU)}
