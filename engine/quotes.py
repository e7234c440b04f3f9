"""Quoted text in an instruction: the model spells it character by character. Pure string functions.

Two released rules: `toggle_chunks` of v1.0 and v1.1 (model.md §1.4), `pair_segments` of v1.2 (§1.9). Both
keep their quirks, because the models were trained with them; `stray_quotes` finds what to exempt from the
first one to be rid of the worst.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable

# §1.4: the rule was written for one template, whose own quotes end at character 124.
FIRST_QUOTE = 156
QUOTES = "'\"“”"
STRAIGHT = {"'": '"', "“": '"', "”": '"'}
CLOSING = {'"': '"', "“": "”"}


def toggle_chunks(text: str, exempt: Collection[int] = ()) -> list[str]:
    """Splits a chat string by the rule of v1.0 and v1.1: every quote from character 156 on opens or closes.

    All quotes, apostrophes too, become `"`. A chunk ends with the opening quote, the next one begins with the
    closing one, and each character between them is a chunk `“c”`. A quotation that never closes runs to the
    end of the text. Quotes at the `exempt` indices stay as they are and neither open nor close.
    """
    chunks = []
    running = ""
    inside = False
    for index, character in enumerate(text):
        character = character if index in exempt else STRAIGHT.get(character, character)
        if character == '"' and index >= FIRST_QUOTE and index not in exempt:
            running += character
            if not inside:
                chunks.append(running)
                running = ""
            inside = not inside
        elif inside:
            chunks.append(f"“{character}”")
        else:
            running += character
    return [*chunks, running] if running else chunks


def _joins(character: str) -> bool:
    """Whether an apostrophe beside it belongs to a word: a letter or digit where words have spaces."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


def _closing(text: str, opening: int) -> int | None:
    """Index of the quote that closes the one at `opening`, if that one opens a quotation at all."""
    behind = range(opening + 1, len(text))
    character = text[opening]
    if character in CLOSING:
        same = text.find(CLOSING[character], opening + 1)
        return same if same >= 0 else next((index for index in behind if text[index] in '"”'), None)
    if character == "”" or (opening > 0 and _joins(text[opening - 1])):
        return None
    return next((index for index in behind if text[index] == "'" and not _joins(text[index + 1 : index + 2])), None)


def stray_quotes(text: str) -> frozenset[int]:
    """Indices of the quotes of an instruction that quote nothing: `cat's`, `the dogs' bowl`, one `"` alone.

    Quotations are read from left to right; quotes of another kind inside one count as stray, so that it is
    spelled whole. In balanced text with straight or curly double quotes nothing is stray.
    """
    stray = set()
    start = 0
    while start < len(text):
        if text[start] in QUOTES:
            closing = _closing(text, start)
            if closing is None:
                stray.add(start)
            else:
                stray |= {index for index in range(start + 1, closing) if text[index] in QUOTES}
                start = closing
        start += 1
    return frozenset(stray)


def pair_segments(text: str, exempt: int) -> list[tuple[str, bool]]:
    """Splits one piece of text by the rule of v1.2: `"…"` and `“…”` pairs; a quoted character is a segment.

    The first `exempt` characters cannot open a quotation. Returns (segment, is quoted); the quotes themselves
    belong to the unquoted neighbours. A quotation that never closes is ordinary text. Quirk of the source:
    `“` as the very first character of a piece disappears.
    """
    segments: list[tuple[str, bool]] = []
    running = ""
    index = 0
    while index < len(text):
        character = text[index]
        index += 1
        if index <= exempt or character not in CLOSING:
            running += character
            continue
        opened = running + character if running or character == '"' else ""
        end = text.find(CLOSING[character], index)
        if end < 0:
            running = opened + text[index:]
            break
        if opened:
            segments.append((opened, False))
        segments += [(quoted, True) for quoted in text[index:end]]
        running = text[end]
        index = end + 1
    return [*segments, (running, False)] if running else segments


def quoted_segments(text: str, exempt: int, special_tokens: Iterable[str]) -> list[tuple[str, bool]]:
    """Splits a chat string by the rule of v1.2: at special tokens first, then at quotations within a piece.

    So a quotation cannot run over a special token. The string's first `exempt` characters are not scanned.
    """
    pattern = "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
    segments = []
    start = 0
    for piece in re.split(f"({pattern})", text) if pattern else [text]:
        segments += pair_segments(piece, max(0, exempt - start))
        start += len(piece)
    return segments
