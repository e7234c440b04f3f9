"""What differs between the released Step1X-Edit models, as rows of a table.

A row fixes everything that is not in the weights: position ids, guidance rule, resize filters, prompt template,
dtype flow. Sizes of the network are never here; they come from the checkpoint (`weights.py`).
Source of every constant: model.md, section numbers in the comments.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

# §1.2: character for character what the models were trained with; a model interface constant.
PREFIX_V1 = (
    'Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for '
    "image generation. Evaluate the level of detail in the user prompt:\n"
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.\n"
    "- If the prompt is already detailed, refine and enhance the existing details slightly without "
    "overcomplicating.\n\n"
    "Here are examples of how to transform or refine prompts:\n"
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.\n"
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.\n\n"
    "Please generate only the enhanced description for the prompt below and avoid including any additional "
    "commentary or evaluations:\nUser Prompt:"
)
# §1.9
PREFIX_V12 = (
    "Given a reference image and a user editing instruction.\n"
    "You need to understand the information of the reference image and the content of the editing instruction,\n"
    "and then generate a detailed description of the edited target image based on the reference image and the "
    "editing instruction. \n"
    "The description should include the requirements in the editing instruction and try to closely match the "
    "content of the target image.\n"
    "The editing instruction is:"
)
# §1.7
NEGATIVE_T2I = (
    "worst quality, wrong limbs, unreasonable limbs, normal quality, low quality, low res, blurry, text, "
    "watermark, logo, banner, extra digits, cropped, jpeg artifacts, signature, username, error, sketch "
    ",duplicate, ugly, monochrome, horror, geometry, mutation, disgusting"
)


Resize = Literal["bicubic", "lanczos", "bilinear-antialias"]
DtypeFlow = Literal["autocast-state", "autocast-fp32", "pure"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run Step1X-Edit: a released version as its own code runs it."""

    name: str  # the parity preset's name
    version: Literal["v1.0", "v1.1", "v1.2"]
    # text (§1)
    prefix: str
    image_first: bool  # v1.0/v1.1 put the picture before the instruction, v1.2 after it
    template_tokens: int  # leading hidden states that are dropped (§1.3)
    text_tokens: int  # kept length: padded to it (v1.0, v1.1) or cut at it (v1.2)
    pad_text: bool
    quote_rule: Literal["toggle", "pairs"]  # §1.4 | §1.9
    pre_resize: bool  # qwen_vl_utils' smart_resize before the processor's own (§1.5)
    min_pixels: int
    max_pixels: int
    signed_text_ids: bool  # §1.9: text RoPE ids that are not zero
    # picture (§5.1)
    resize: Resize
    truncate_output: bool  # float -> byte by truncation (official) or rounding (diffusers)
    reference_ids: tuple[int, int, int]  # added to the (0, row, col) ids of the reference tokens (§3.7)
    clamp_logvar: bool  # diffusers clamps the posterior's log variance to [-30, 20] (§4)
    # sampler (§5.4)
    rescale_above: float  # norm-rescaled guidance where t in [0, 1] is above this; 1.0 never, 0.0 every step
    batched_guidance: bool  # conditional and unconditional rows in one forward
    dtype_flow: DtypeFlow  # §3.14, §5.4; see denoise.py
    # defaults
    size: int
    steps: int
    guidance: float

    def __post_init__(self) -> None:
        if self.text_tokens < 1 or self.template_tokens < 0:
            raise ValueError("text_tokens must be at least 1 and template_tokens at least 0")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels, got {self.min_pixels} and {self.max_pixels}")
        if self.size < 16 or self.steps < 1:
            raise ValueError(f"size must be at least 16 and steps at least 1, got {self.size} and {self.steps}")

    def override(self, values: dict[str, Any]) -> "Variant":
        """This row with some fields replaced. Raises ValueError for a field that does not exist."""
        try:
            return replace(self, **values)
        except TypeError:
            unknown = sorted(set(values) - set(self.__dataclass_fields__))
            raise ValueError(f"unknown variant field {', '.join(unknown)}") from None


OFFICIAL_V10 = Variant(
    name="official-v1.0",
    version="v1.0",
    prefix=PREFIX_V1,
    image_first=True,
    template_tokens=217,
    text_tokens=640,
    pad_text=True,
    quote_rule="toggle",
    pre_resize=True,
    min_pixels=256 * 28 * 28,
    max_pixels=324 * 28 * 28,
    signed_text_ids=False,
    resize="bicubic",
    truncate_output=True,
    reference_ids=(0, 0, 0),
    clamp_logvar=False,
    rescale_above=1.0,
    batched_guidance=True,
    dtype_flow="autocast-state",
    size=512,
    steps=28,
    guidance=6.0,
)
OFFICIAL_V11 = replace(
    OFFICIAL_V10,
    name="official-v1.1",
    version="v1.1",
    resize="lanczos",
    reference_ids=(1, 1, 1),
    rescale_above=0.93,
    dtype_flow="autocast-fp32",
)
DIFFUSERS_V11 = replace(
    OFFICIAL_V11,
    name="diffusers-v1.1",
    truncate_output=False,
    clamp_logvar=True,
    rescale_above=0.93e-3,  # 0.93 compared with a timestep in [0, 1000]: fires at every step (§5.4)
    batched_guidance=False,
    dtype_flow="pure",
    size=1024,
)
DIFFUSERS_V12 = replace(
    DIFFUSERS_V11,
    name="diffusers-v1.2",
    version="v1.2",
    prefix=PREFIX_V12,
    image_first=False,
    template_tokens=90,
    text_tokens=2048,
    pad_text=False,
    quote_rule="pairs",
    pre_resize=False,
    max_pixels=400 * 28 * 28,
    signed_text_ids=True,
    resize="bilinear-antialias",
    reference_ids=(1, 0, 0),
    steps=50,
)

VARIANTS = {row.name: row for row in (OFFICIAL_V10, OFFICIAL_V11, DIFFUSERS_V11, DIFFUSERS_V12)}
DEFAULTS = {"v1.0": OFFICIAL_V10, "v1.1": OFFICIAL_V11, "v1.2": DIFFUSERS_V12}


def variant(name: str) -> Variant:
    """The row of a preset ("official-v1.1") or of a version ("v1.1": the code it was released with)."""
    row = VARIANTS.get(name) or DEFAULTS.get(name)
    if row is None:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join([*VARIANTS, *DEFAULTS])}")
    return row
