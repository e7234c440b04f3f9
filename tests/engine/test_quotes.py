import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step1x.engine.quotes import (
    FIRST_QUOTE,
    STRAIGHT,
    pair_segments,
    quoted_segments,
    stray_quotes,
    toggle_chunks,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "split_string.json"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_end|>")
PADDING = "x" * FIRST_QUOTE  # what the toggle rule does not scan

texts = st.text(st.sampled_from("ab' \"“”中!\n"), max_size=30)
plain_texts = st.text(st.characters(blacklist_characters="'\"“”", blacklist_categories=["Cs"]), max_size=60)


def straight(text: str) -> str:
    return "".join(STRAIGHT.get(character, character) for character in text)


def unwrapped(chunk: str) -> str:
    return chunk[1:-1] if len(chunk) == 3 and chunk[0] == "“" and chunk[-1] == "”" else chunk


def golden_cases() -> tuple[dict[str, Any], list[Any]]:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return golden["templates"], golden["cases"]


def chat_strings(templates: dict[str, Any], case: dict[str, Any]) -> tuple[str, str, str, str]:
    """The texts of v1.0/v1.1 and v1.2, and the heads that the file abbreviates."""
    if case["kind"] == "raw":
        return case["prompt"], case["prompt"], "", ""
    first, second = templates["v1p1"], templates["v1p2"]
    chat = first["head"] + case["prompt"] + first["tail"]
    chat_v12 = second["head"] + " " + case["prompt"] + second["vision"] + second["tail"]
    return chat, chat_v12, straight(first["head"]), second["head"]


@pytest.mark.golden
def test_golden_toggle_chunks() -> None:
    templates, cases = golden_cases()
    for case in cases:
        chat, _, head, _ = chat_strings(templates, case)
        expected = [chunk.replace("{HEAD}", head) for chunk in case["official_used"]]
        assert toggle_chunks(chat) == expected, case["prompt"]
    print(f"golden split_string.json official_used worst=0 ({len(cases)} texts equal)")


@pytest.mark.golden
def test_golden_pair_segments() -> None:
    templates, cases = golden_cases()
    for case in cases:
        _, chat, _, head = chat_strings(templates, case)
        expected = case["v1p2_quotation_only"]
        segments = pair_segments(chat, case["v1p2_prefix_len"])
        assert [text for text, _ in segments] == [text.replace("{HEAD}", head) for text in expected["segments"]]
        assert "".join(str(int(quoted)) for _, quoted in segments) == expected["in_quotation"]
    print(f"golden split_string.json v1p2_quotation_only worst=0 ({len(cases)} texts equal)")


@pytest.mark.golden
def test_golden_quoted_segments() -> None:
    templates, cases = golden_cases()
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    special = [re.sub(r"\\(.)", r"\1", token) for token in golden["special_tokens_escaped"]]
    for case in cases:
        _, chat, _, head = chat_strings(templates, case)
        user = head[head.index("user\n") :] if head else ""
        segments = quoted_segments(chat, case["v1p2_prefix_len"], special)
        expected = [text.replace("{UHEAD}", user) for text in case["v1p2"]["segments"]]
        assert [text for text, _ in segments] == expected, case["prompt"]
        assert "".join(str(int(quoted)) for _, quoted in segments) == case["v1p2"]["in_quotation"]
    print(f"golden split_string.json v1p2 worst=0 ({len(cases)} texts equal)")


@given(plain_texts)
def test_text_without_quotes_is_one_chunk(text: str) -> None:
    assert toggle_chunks(text) == ([text] if text else [])
    assert pair_segments(text, 0) == ([(text, False)] if text else [])


@given(texts)
def test_chunks_join_to_the_straightened_text(text: str) -> None:
    chat = PADDING + text
    assert "".join(unwrapped(chunk) for chunk in toggle_chunks(chat)) == straight(chat)


@given(texts)
def test_quotes_before_the_limit_are_only_straightened(text: str) -> None:
    assert toggle_chunks(text) == ([straight(text)] if text else [])


def test_first_index_that_opens_a_quotation() -> None:
    assert toggle_chunks("x" * 155 + '"a') == ["x" * 155 + '"a']
    assert toggle_chunks("x" * 156 + '"a') == ["x" * 156 + '"', "“a”"]


@given(texts)
def test_exempt_quotes_are_left_alone(text: str) -> None:
    chat = PADDING + text
    assert toggle_chunks(chat, range(len(chat))) == [chat]


@given(texts)
def test_pair_segments_join_to_the_text(text: str) -> None:
    segments = pair_segments("x" + text, 0)
    assert "".join(segment for segment, _ in segments) == "x" + text
    assert all(len(segment) == 1 for segment, quoted in segments if quoted)


@given(st.lists(st.tuples(plain_texts, st.sampled_from(['""', "“”"]), plain_texts), max_size=4))
def test_balanced_quotations_are_flagged_whole(parts: list[tuple[str, str, str]]) -> None:
    text = "x" + "".join(f"{before}{quotes[0]}{inside}{quotes[1]}" for before, quotes, inside in parts)
    segments = pair_segments(text, 0)
    assert "".join(segment for segment, quoted in segments if quoted) == "".join(inside for _, _, inside in parts)
    assert not any(quoted for _, quoted in pair_segments(text, len(text)))
    assert stray_quotes(text) == frozenset()


@pytest.mark.parametrize("text", ["“a”b", "“a"])
def test_curly_quote_at_the_very_start_disappears(text: str) -> None:
    assert "".join(segment for segment, _ in pair_segments(text, 0)) == text[1:]


@given(texts, st.sampled_from(SPECIAL), texts)
def test_special_tokens_are_segments_of_their_own(before: str, token: str, behind: str) -> None:
    segments = quoted_segments(f"x{before}{token}x{behind}", 0, SPECIAL)
    assert (token, False) in segments
    split = segments.index((token, False))
    assert segments[:split] == pair_segments("x" + before, 0)
    assert segments[split + 1 :] == pair_segments("x" + behind, 0)


def test_without_special_tokens_nothing_is_cut() -> None:
    assert quoted_segments("say <|im_end|>", 0, ()) == [("say <|im_end|>", False)]


@given(texts)
def test_what_is_not_stray_pairs_up(text: str) -> None:
    stray = stray_quotes(text)
    assert all(text[index] in "'\"“”" for index in stray)
    chat = PADDING + text + "<|im_end|>"
    chunks = toggle_chunks(chat, [len(PADDING) + index for index in stray])
    assert chunks[-1].endswith("<|im_end|>")  # no quotation runs over the end of the instruction


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "Replace 'TRAIN' with 'PLANE'",
        'write "a" and “b”',
        "把'好'改成“坏”",
    ],
)
def test_balanced_quotes_are_not_stray(text: str) -> None:
    assert stray_quotes(text) == frozenset()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("this girl's neck", ""),
        ("the dogs' bowl", ""),
        ("the dogs' sign says 'HELLO'", "''"),
        ("it's John's \"dog\"", '""'),
        ('a 5" pipe', ""),
        ("only closing” here, “here”", "“”"),
        ('mixed “kinds"', '“"'),
        ("write 'don't'", "''"),
        ('say "it\'s “fine”"', '""'),
        ("'90s style", ""),
        ("” then 'a'", "''"),
    ],
)
def test_stray_quotes(text: str, kept: str) -> None:
    stray = stray_quotes(text)
    quotes = [index for index, character in enumerate(text) if character in "'\"“”"]
    assert "".join(text[index] for index in quotes if index not in stray) == kept
