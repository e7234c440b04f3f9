"""Picture and instruction -> the tokens that condition the DiT: Qwen2.5-VL and its cut (model.md §1).

`Conditioner.encode` is all the engine calls, so that a cache can stand in for it. The language model's
head is never built; the vision tower runs once for all instructions about one picture, and what a string shares with
the one before it is not read again (prefix.py).
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.engine.dit import Text, here
from step1x.engine.errors import InputError
from step1x.engine.prefix import Layer, Reading, stops
from step1x.engine.qwen import going_on, load_image_processor, load_model, load_tokenizer, read_config
from step1x.engine.text_ids import Grid, rope_positions, signed_ids
from step1x.engine.tokens import Tokens
from step1x.engine.variants import Variant
from step1x.engine.vision_size import pre_size, processor_size

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLModel,
        Qwen2VLImageProcessorPil,
    )

T2I_SIZE = (1024, 1024)  # §1.8: for text to image the model is shown a black picture


@dataclass(frozen=True, slots=True)
class Conditioning:
    """One encoded instruction: its text rows (batch 1, T of them) and their RoPE ids (1, T, 3), float32.

    valid: rows that are no padding; the others follow them. None: not known.
    """

    text: Text
    ids: Tensor
    valid: int | None = None


class Conditioner:
    """Encodes instructions about a picture with Qwen2.5-VL, the way one variant of Step1X-Edit does."""

    def __init__(
        self,
        model: "Qwen2_5_VLModel",
        tokenizer: "PreTrainedTokenizerFast",
        image_processor: "Qwen2VLImageProcessorPil",
        variant: Variant,
        *,
        fix_quotes: bool = False,
    ) -> None:
        """The model is the one without a head, and where it is now it runs.

        fix_quotes: no apostrophe and no lone quote opens a quotation (v1.0, v1.1; off reproduces them).
        Raises InputError if the tokenizer does not fit the variant.
        """
        self.model = model
        self.device = model.device
        self.using: Callable[[str], AbstractContextManager[None]] = here  # "vision", "text": residency.py
        self.tokens = Tokens(tokenizer, variant, fix_quotes=fix_quotes)
        self.variant = variant
        self.settings = f"{variant!r} fix_quotes={fix_quotes}"
        self._image_processor = image_processor
        # Both are replaced whole and never changed, so threads may share them.
        self._seen: Seen | None = None
        self._readings: tuple[Reading, ...] = ()

    @property
    def known(self) -> "tuple[Seen | None, tuple[Reading, ...]]":
        """The picture encoded last, and the beginnings of its strings."""
        return self._seen, self._readings

    def recall(self, seen: "Seen", readings: tuple[Reading, ...]) -> None:
        """Takes what was `known` before, in this process or another with the same weights and settings."""
        self._seen, self._readings = seen, readings

    def tokenise(self, instruction: str, image_tokens: int) -> list[int]:
        """Ids of the whole chat string, template included, before anything is cut."""
        return self.tokens.tokenise(instruction, image_tokens).ids

    @torch.no_grad()
    def encode(self, image: "Image | None", prompts: Sequence[str], *, share: bool = True) -> list[Conditioning]:
        """One `Conditioning` per prompt, each encoded on its own (§1.6).

        image: the level-resized RGB picture; None shows the black one of text to image. Text rows are
        (1, T, width of the model) in the model's dtype, T = text_tokens where the variant pads.
        share: do not see the picture seen last again, nor read its template and picture (prefix.py).
        Raises InputError for an instruction or a picture the model cannot take.
        """
        if image is None:
            image = black_picture()
        seen = self._see(image, share)
        with self.using("text"):
            return [self._read(prompt, seen, share) for prompt in prompts]

    def _see(self, image: "Image", share: bool) -> "Seen":
        """The vision tower's output for a picture (§1.5)."""
        digest = digest_of(image)
        last = self._seen if share else None
        if last is not None and last.digest == digest and last.features.device == self.device:
            return last
        patches, grid = self.patches(image)
        merge = self.model.config.vision_config.spatial_merge_size
        shape = torch.tensor([[1, grid.rows * merge, grid.columns * merge]], device=self.device)
        with self.using("vision"):
            features = self.model.visual(patches.to(self.device), grid_thw=shape).pooler_output
        seen = Seen(digest, features, grid)
        if share:
            self._seen = seen
        return seen

    def patches(self, image: "Image") -> tuple[Tensor, Grid]:
        """A picture as rows (patches, 3 * 2 * patch * patch) float32 in the order of §1.5, and its grid.

        Raises InputError for one side over 200 times the other.
        """
        from PIL.Image import Resampling

        variant = self.variant
        vision = self.model.config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        picture = image
        if variant.pre_resize:
            picture = image.resize(pre_size(*image.size, factor), Resampling.BICUBIC)
        width, height = processor_size(*picture.size, factor, variant.min_pixels, variant.max_pixels)
        limits = {"shortest_edge": variant.min_pixels, "longest_edge": variant.max_pixels}
        pixels = self._image_processor(images=[picture], size=limits, return_tensors="pt")["pixel_values"]
        grid = Grid(height // factor, width // factor, factor, *image.size)
        return pixels, grid

    def _read(self, prompt: str, seen: "Seen", share: bool) -> Conditioning:
        variant, grid = self.variant, seen.grid
        tokens = self.tokens.tokenise(prompt, grid.rows * grid.columns)
        # Attention is causal: what lies behind the last kept row cannot reach it, so it is not computed.
        kept = slice(variant.template_tokens, variant.template_tokens + variant.text_tokens)
        listed = torch.tensor(tokens.ids[: kept.stop])
        ids = listed.to(self.device)
        is_picture = ids == self.tokens.image_pad
        table = self.model.language_model.embed_tokens.weight  # of a streamed model, in host memory
        embeds = F.embedding(ids if table.device == ids.device else listed, table).to(self.device)
        embeds[is_picture] = seen.features[: int(is_picture.sum())].to(embeds.dtype)
        positions = rope_positions(ids, self.tokens.image_pad, grid)
        if share:
            hidden = self._read_on(tokens.ids[: kept.stop], seen.digest, embeds, positions)
        else:
            hidden, _ = self._language(tokens.ids[: kept.stop], embeds, positions)

        rows = hidden[kept]
        placed = torch.zeros(len(rows), 3, device=rows.device)
        if variant.signed_text_ids:
            placed = signed_ids(positions[:, kept], is_picture[kept], grid)
        text = Text(tokens=rows[None], mask=torch.ones(1, len(rows), dtype=torch.long, device=rows.device))
        if variant.quote_rule == "pairs":
            quoted = torch.tensor([tokens.quoted[kept]], dtype=torch.long, device=rows.device)
            text = Text(tokens=text.tokens, mask=text.mask, embeds=embeds[None, kept], quoted=quoted)
        conditioning = Conditioning(text=text, ids=placed[None], valid=len(rows))
        return padded(conditioning, variant.text_tokens) if variant.pad_text else conditioning

    def _read_on(self, ids: list[int], picture: bytes, embeds: Tensor, positions: Tensor) -> Tensor:
        """`_language` piece by piece; the first pieces are kept for the next string (prefix.py)."""
        pad = self.tokens.image_pad
        read, known = Reading([], b"", embeds[:0], []), self._readings
        made = []
        for index, stop in enumerate(stops(ids, self.variant.template_tokens, pad, self.variant.image_first)):
            start, some = len(read.ids), ids[:stop]
            shown = picture if pad in some else b""
            if index < len(known) and known[index].begins(some, shown, embeds):
                read = known[index]
            else:
                new = slice(start, stop)
                hidden, layers = self._language(some, embeds[new], positions[:, new], read.layers)
                read = Reading(some, shown, torch.cat((read.hidden, hidden)), layers)
            made.append(read)
        self._readings = tuple(made[:-1])
        return read.hidden

    def _language(
        self, ids: list[int], embeds: Tensor, positions: Tensor, past: Sequence[Layer] | None = None
    ) -> tuple[Tensor, list[Layer]]:
        """Hidden states (T, width) after the final norm, of the tokens behind `past`, and all keys and values.

        ids: of all tokens; embeds (T, width), positions (3, T): of the new ones. past None: none are kept.
        """
        from transformers import DynamicCache

        # §1.4: v1.0 and v1.1 mask what has id 0 (`!`); v1.2 uses that mask for the positions only.
        mask = None
        if self.variant.quote_rule == "toggle":
            mask = torch.tensor([[int(token > 0) for token in ids]], device=embeds.device)
        cache = None if past is None else DynamicCache(past or None)
        hidden = self.model.language_model(
            inputs_embeds=embeds[None],
            attention_mask=mask,
            position_ids=positions[:, None],
            use_cache=cache is not None,
            **going_on(self.model.language_model, cache),
        ).last_hidden_state
        return hidden[0], [] if cache is None else [(layer.keys, layer.values) for layer in cache.layers]


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture as the vision tower left it."""

    digest: bytes
    features: Tensor  # (rows * columns, width)
    grid: Grid


def load_conditioner(
    text_encoder: Path,
    processor: Path,
    variant: Variant,
    device: torch.device | str,
    dtype: torch.dtype | None,
    *,
    fix_quotes: bool = False,
    at_host: Callable[[str], bool] | None = None,
) -> Conditioner:
    """A conditioner from files: the model in `text_encoder`, tokenizer and picture processor in `processor`.

    The two are one folder in the official layout. Parameters of the model that `at_host` picks by their key stay in
    host memory, though it is to run on `device`. Raises InputError naming a file that is missing or wrong.
    """
    tools = load_processor(processor, read_config(text_encoder / "config.json"), text_encoder)
    model = load_model(text_encoder, device, dtype, at_host)  # last: it takes the longest
    conditioner = Conditioner(model, *tools, variant, fix_quotes=fix_quotes)
    conditioner.device = torch.device(device)
    return conditioner


def load_processor(
    folder: Path, config: "Qwen2_5_VLConfig", text_encoder: Path
) -> "tuple[PreTrainedTokenizerFast, Qwen2VLImageProcessorPil]":
    """Tokenizer and picture processor in `folder`, for the text model of this config, which is in `text_encoder`.

    Raises InputError naming a file that is missing or wrong, or does not fit the model.
    """
    tokenizer = load_tokenizer(folder)
    image_processor = load_image_processor(folder, config)
    rows = config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the text model in {text_encoder} only {rows}"
        )
    return tokenizer, image_processor


def digest_of(image: "Image") -> bytes:
    """Of an RGB picture's pixels and size."""
    return hashlib.blake2b(image.tobytes() + repr(image.size).encode()).digest()


def black_picture() -> "Image":
    """What the text model is shown where there is no picture (§1.8)."""
    from PIL import Image

    return Image.new("RGB", T2I_SIZE)


def padded(conditioning: Conditioning, length: int) -> Conditioning:
    """The same rows followed by zeros up to `length`; the mask is zero there (§1.6)."""
    text = conditioning.text
    missing = length - text.tokens.shape[1]

    def longer(rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, missing)) if rows.ndim == 3 else F.pad(rows, (0, missing))

    return Conditioning(
        text=Text(
            tokens=longer(text.tokens),
            mask=longer(text.mask),
            embeds=None if text.embeds is None else longer(text.embeds),
            quoted=None if text.quoted is None else longer(text.quoted),
        ),
        ids=longer(conditioning.ids),
        valid=conditioning.valid,
    )
