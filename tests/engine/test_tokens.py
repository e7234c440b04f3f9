import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from step1x.engine.errors import InputError
from step1x.engine.tokens import HEADER, PICTURE, TAIL, Tokens
from step1x.engine.variants import DIFFUSERS_V12, OFFICIAL_V11, PREFIX_V1, PREFIX_V12, Variant
from step1x.training.tokenizer import SPECIAL_TOKENS, count_template_tokens, train_tokenizer

TEXTS = (PREFIX_V1, PREFIX_V12, "make the sky blue", "add “x” to 'y'", "把图片变成“黑白”") * 3
TOKENIZER = train_tokenizer(TEXTS, 500)
SPELLED = HEADER + PREFIX_V1 + PICTURE


def fitted(variant: Variant, tokenizer: Qwen2Tokenizer = TOKENIZER) -> Variant:
    return variant.override({"template_tokens": count_template_tokens(tokenizer, variant.prefix)})


V11, V12 = fitted(OFFICIAL_V11), fitted(DIFFUSERS_V12)


def encode(text: str) -> list[int]:
    return list(TOKENIZER.backend_tokenizer.encode(text).ids)


def behind_picture(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids[ids.index(TOKENIZER.convert_tokens_to_ids("<|vision_end|>")) + 1 :]))


def test_offsets_of_the_chat_string() -> None:
    """model.md §1.2: where header, prefix and instruction begin."""
    assert len(HEADER) == 75
    assert len(PREFIX_V1) == 1058
    assert len(SPELLED) == 1187
    assert len(PREFIX_V12) == 449


@settings(deadline=None)
@given(st.text(st.characters(blacklist_characters="'\"“”", blacklist_categories=["Cs"]), max_size=40))
def test_plain_text_is_tokenised_in_one_piece(instruction: str) -> None:
    first = Tokens(TOKENIZER, V11).tokenise(instruction, 1)
    assert first.ids == encode(SPELLED + instruction + TAIL)
    second = Tokens(TOKENIZER, V12).tokenise(instruction, 1)
    assert second.ids == encode(f"{HEADER}{PREFIX_V12} {instruction}{PICTURE}{TAIL}")
    assert not any(second.quoted)


@pytest.mark.parametrize("variant", [V11, V12], ids=["v1.1", "v1.2"])
def test_the_first_kept_token_is_the_colon_of_the_prefix(variant: Variant) -> None:
    ids = Tokens(TOKENIZER, variant).tokenise("make it blue", 3).ids
    assert TOKENIZER.decode(ids[variant.template_tokens]).startswith(":")
    head = TOKENIZER.decode(ids[: variant.template_tokens])
    assert head == (HEADER + variant.prefix)[:-1]


@pytest.mark.parametrize("variant", [V11, V12], ids=["v1.1", "v1.2"])
def test_the_picture_takes_as_many_tokens_as_it_has(variant: Variant) -> None:
    tokens = Tokens(TOKENIZER, variant)
    one, many = tokens.tokenise("a “b”", 1), tokens.tokenise("a “b”", 7)
    assert many.ids.count(tokens.image_pad) == 7
    pad = one.ids.index(tokens.image_pad)
    assert many.ids == one.ids[:pad] + [tokens.image_pad] * 7 + one.ids[pad + 1 :]
    assert len(many.quoted) == len(many.ids)
    assert sum(many.quoted) == sum(one.quoted) == (variant is V12)


def test_quoted_text_is_spelled() -> None:
    ids = Tokens(TOKENIZER, V11).tokenise("write 'sky'", 1).ids
    spelled = [*encode('write "'), *encode("s"), *encode("k"), *encode("y"), *encode('"' + TAIL)]
    assert ids == encode(SPELLED) + spelled


def test_an_apostrophe_destroys_the_tail_unless_repaired() -> None:
    instruction = "paint this girl's neck."
    strict = Tokens(TOKENIZER, V11).tokenise(instruction, 1).ids
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert behind_picture(strict) == 'paint this girl"s neck.<|im_end|>\n<|im_start|>assistant\n'
    assert strict.count(end) == 1  # the header's; the tail is spelled as ordinary text
    repaired = Tokens(TOKENIZER, V11, fix_quotes=True).tokenise(instruction, 1).ids
    assert repaired == encode(SPELLED + instruction + TAIL)


@settings(deadline=None)
@given(st.text(st.sampled_from("ab '\"“”中!"), max_size=20))
def test_repaired_instructions_always_keep_their_tail(instruction: str) -> None:
    ids = Tokens(TOKENIZER, V11, fix_quotes=True).tokenise(instruction, 1).ids
    tail = encode(TAIL)
    assert ids[-len(tail) :] == tail


@settings(deadline=None)
@given(st.text(st.sampled_from("ab '\"“”中!"), max_size=20))
def test_the_part_before_the_instruction_never_changes(instruction: str) -> None:
    for variant in (V11, V12):
        head = encode(SPELLED) if variant is V11 else encode(HEADER + PREFIX_V12)
        assert Tokens(TOKENIZER, variant).tokenise(instruction, 1).ids[: len(head)] == head


def test_v12_flags_quoted_characters() -> None:
    prompt = Tokens(TOKENIZER, V12).tokenise("write \"sky\" and “中”, not 'x'", 2)
    quoted = [token for token, flag in zip(prompt.ids, prompt.quoted, strict=True) if flag]
    assert TOKENIZER.decode(quoted) == "sky中"


def test_v12_does_not_scan_as_many_characters_as_the_prefix_has() -> None:
    """They are counted from the start of the chat string, so the end of the prefix is scanned (§1.9)."""
    padding = "x" * 100
    early = V12.override({"prefix": f'The "word"{padding}:', "template_tokens": 1})
    late = V12.override({"prefix": f'{padding}the "word":', "template_tokens": 1})
    assert not any(Tokens(TOKENIZER, early).tokenise("a", 1).quoted)
    assert any(Tokens(TOKENIZER, late).tokenise("a", 1).quoted)


def byte_level(text: str) -> str:
    """Text in the alphabet of byte-level BPE."""
    return str(ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0])


def handmade(*merges: tuple[str, str]) -> Qwen2Tokenizer:
    """A vocabulary of bytes, `“`, `”` and the given merges of two pieces."""
    vocabulary = json.loads(train_tokenizer([], 270).backend_tokenizer.to_str())["model"]["vocab"]
    pairs = []
    for quote in (byte_level("“"), byte_level("”")):
        pairs += [(quote[0], quote[1]), (quote[:2], quote[2])]
    pairs += [(byte_level(left), byte_level(right)) for left, right in merges]
    for left, right in dict.fromkeys(pairs):
        vocabulary.setdefault(left + right, len(vocabulary))
    special = list(SPECIAL_TOKENS[1:])
    return Qwen2Tokenizer(vocab=vocabulary, merges=list(dict.fromkeys(pairs)), extra_special_tokens=special)


def test_wrappers_stay_where_they_merge_with_the_character() -> None:
    """§1.4: in Qwen's vocabulary `“A` and `.”` are tokens, so `A` and `.` keep their wrapper, unlike `B`."""
    tokenizer = handmade(("“", "A"), (".", "”"))
    ids = Tokens(tokenizer, fitted(OFFICIAL_V11, tokenizer)).tokenise('"BA."', 1).ids
    pieces = tokenizer.convert_ids_to_tokens(ids[ids.index(tokenizer.convert_tokens_to_ids("<|vision_end|>")) :])
    opening, closing = byte_level("“"), byte_level("”")
    assert pieces[1:8] == ['"', "B", f"{opening}A", closing, opening, f".{closing}", '"']


@pytest.mark.parametrize("variant", [V11, V12], ids=["v1.1", "v1.2"])
def test_the_picture_token_is_refused_in_an_instruction(variant: Variant) -> None:
    with pytest.raises(InputError, match="image_pad"):
        Tokens(TOKENIZER, variant).tokenise("a <|image_pad|> b", 3)


def test_other_special_tokens_pass() -> None:
    ids = Tokens(TOKENIZER, V11).tokenise("a <|vision_end|> b", 3).ids
    assert behind_picture(ids).startswith("a <|vision_end|> b")


def test_a_foreign_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="image_pad"):
        Tokens(Qwen2Tokenizer(vocab={"a": 0}, merges=[]), V11)


def test_a_cut_behind_the_template_is_refused() -> None:
    tokens = len(encode(HEADER + PREFIX_V1))
    with pytest.raises(InputError, match=f"has {tokens} tokens"):
        Tokens(TOKENIZER, V11.override({"template_tokens": tokens}))
