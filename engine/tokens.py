"""Instruction -> token ids of the whole chat string (model.md §1.2-1.4, §1.9).

The chat template is written out here; the quoted text of the instruction is spelled as `quotes.py` says.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step1x.engine import quotes
from step1x.engine.errors import InputError
from step1x.engine.variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# §1.2: Qwen2.5-VL's chat template with `add_vision_id`, character for character as in training.
HEADER = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
PICTURE = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one chat string, picture included, and which are quoted characters (v1.2 only)."""

    ids: list[int]
    quoted: list[bool]


class Tokens:
    """Tokenises instructions the way one variant does. Holds no state; any number of threads may share it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", variant: Variant, *, fix_quotes: bool = False) -> None:
        """Raises InputError if the tokenizer has no picture tokens or the variant's template does not fit."""
        # The Rust object itself: transformers' wrapper sets state on it at each call; threads trip over it.
        self._backend = tokenizer.backend_tokenizer
        self._special = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self._variant = variant
        self._fix_quotes = fix_quotes
        self.image_pad = self._single("<|image_pad|>")
        self._vision_end = self._single("<|vision_end|>")
        # One id each in Qwen's vocabulary (2073 and 854); a small vocabulary may need several.
        self._opening = self._encode("“")
        self._closing = self._encode("”")
        head = len(self._encode(HEADER + variant.prefix))
        if variant.template_tokens >= head:
            raise InputError(
                f"the prompt template has {head} tokens with this tokenizer, so its first "
                f"{variant.template_tokens} cannot be cut off: the tokenizer does not belong to this model, "
                "or template_tokens is wrong"
            )

    def tokenise(self, instruction: str, image_tokens: int) -> Prompt:
        """Ids of the chat string around `instruction`, its picture standing for `image_tokens` tokens.

        Raises InputError if the instruction contains the token that stands for the picture.
        """
        variant = self._variant
        if variant.image_first:
            before = HEADER + variant.prefix + PICTURE
            chat = before + instruction + TAIL
        else:
            before = f"{HEADER}{variant.prefix} "
            chat = before + instruction + PICTURE + TAIL
        if variant.quote_rule == "toggle":
            ids = self._toggled(chat, self._exempt(instruction, len(before)))
            quoted = [False] * len(ids)
        else:
            ids, quoted = self._paired(chat)
        if ids.count(self.image_pad) != 1:
            raise InputError("the instruction contains <|image_pad|>, which stands for the picture: remove it")
        pad = ids.index(self.image_pad)
        return Prompt(
            ids=[*ids[:pad], *[self.image_pad] * image_tokens, *ids[pad + 1 :]],
            quoted=[*quoted[:pad], *[False] * image_tokens, *quoted[pad + 1 :]],
        )

    def _single(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise InputError(f"the tokenizer has no {token}: it is not one of Qwen2.5-VL")
        return int(index)

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _exempt(self, instruction: str, offset: int) -> frozenset[int]:
        if not self._fix_quotes:
            return frozenset()
        return frozenset(offset + index for index in quotes.stray_quotes(instruction))

    def _toggled(self, chat: str, exempt: frozenset[int]) -> list[int]:
        """§1.4: plain ids up to the end of the picture, spelled ids from there on."""
        plain = self._encode(chat)
        spelled = []
        for chunk in quotes.toggle_chunks(chat, exempt):
            spelled += self._unwrapped(self._encode(chunk))
        return plain[: plain.index(self._vision_end)] + spelled[spelled.index(self._vision_end) :]

    def _unwrapped(self, ids: list[int]) -> list[int]:
        """Without the curly quotes around a spelled character, where both are tokens of their own."""
        opening, closing = len(self._opening), len(self._closing)
        wrapped = len(ids) >= opening + closing
        if wrapped and ids[:opening] == self._opening and ids[-closing:] == self._closing:
            return ids[opening:-closing]
        return ids

    def _paired(self, chat: str) -> tuple[list[int], list[bool]]:
        """§1.9: the length of the prefix is counted from the start of the chat string, as the source does."""
        ids: list[int] = []
        quoted: list[bool] = []
        for segment, is_quoted in quotes.quoted_segments(chat, len(self._variant.prefix), self._special):
            encoded = self._encode(segment)
            ids += encoded
            quoted += [is_quoted] * len(encoded)
        return ids, quoted
