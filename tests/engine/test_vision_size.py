import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step1x.engine.errors import InputError
from step1x.engine.vision_size import MAX_RATIO, pre_size, processor_size

GOLDEN = Path(__file__).parents[1] / "golden" / "resize.json"
FACTOR = 28
MIN_PIXELS = 256 * FACTOR**2
# column of the file -> (column of its input size, has a first stage, largest area in merged patches)
COLUMNS = {
    "qwen_v1p0_512": ("official_512", True, 324),
    "qwen_v1p0_768": ("official_768", True, 324),
    "qwen_v1p0_1024": ("official_1024", True, 324),
    "qwen_v1p1_1024": ("v1p1_1024", True, 324),
    "qwen_v1p2_1024": ("v1p2_1024", False, 400),
}


def golden_rows() -> list[dict[str, Any]]:
    rows = json.loads(GOLDEN.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 40
    return list(rows)


def check_column(row: dict[str, Any], name: str) -> int:
    """Compares one picture with one column; returns the number of sizes that were compared."""
    source, staged, tokens = COLUMNS[name]
    expected = row[name]
    if expected is None:  # the level size itself does not exist
        assert "error" in row[source]
        return 0
    size = tuple(row[source])
    if staged:
        size = pre_size(*size, FACTOR)
        if "error" not in expected["stage1"]:
            assert list(size) == expected["stage1"]
    # The reference may refuse a strip in either stage; we do in the second.
    if "error" in expected.get("stage1", {}) or "error" in expected["processor"]:
        with pytest.raises(InputError, match="too long and thin"):
            processor_size(*size, FACTOR, MIN_PIXELS, tokens * FACTOR**2)
        return 1
    width, height = processor_size(*size, FACTOR, MIN_PIXELS, tokens * FACTOR**2)
    assert [width, height] == expected["processor"]
    assert (width // FACTOR) * (height // FACTOR) == expected["n_vision_tokens"]
    return 1


@pytest.mark.golden
def test_golden_qwen_columns() -> None:
    rows = golden_rows()
    compared = sum(check_column(row, name) for row in rows for name in COLUMNS)
    print(f"golden resize.json qwen_* worst=0 ({compared} sizes equal)")


@pytest.mark.golden
def test_golden_rules() -> None:
    for row in golden_rows():
        size = (row["w"], row["h"])
        assert list(pre_size(*size, FACTOR)) == row["rule_v1p1_inline"]
        if "error" not in row["rule_qwen_vl_utils"]:
            assert list(pre_size(*size, FACTOR)) == row["rule_qwen_vl_utils"]
        for tokens in (324, 400):
            expected = row[f"rule_processor_{tokens}"]
            if "error" in expected:
                with pytest.raises(InputError, match=f"{size[0]}x{size[1]}"):
                    processor_size(*size, FACTOR, MIN_PIXELS, tokens * FACTOR**2)
            else:
                assert list(processor_size(*size, FACTOR, MIN_PIXELS, tokens * FACTOR**2)) == expected
    print("golden resize.json rule_* worst=0 (160 sizes equal)")


sides = st.integers(min_value=1, max_value=5000)


@settings(deadline=None)  # the first call imports transformers
@given(sides, sides, st.sampled_from([14, 28, 32]))
def test_processor_size_is_as_transformers_computes_it(width: int, height: int, factor: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limits = (256 * factor**2, 324 * factor**2)
    try:
        rows, columns = smart_resize(height, width, factor, *limits)
    except ValueError:
        assert max(width, height) > MAX_RATIO * min(width, height)
        with pytest.raises(InputError):
            processor_size(width, height, factor, *limits)
        return
    assert processor_size(width, height, factor, *limits) == (columns, rows)


@given(sides, sides, st.sampled_from([14, 28]))
def test_sides_are_multiples_and_never_zero(width: int, height: int, factor: int) -> None:
    for side in pre_size(width, height, factor):
        assert side >= factor
        assert side % factor == 0


@pytest.mark.parametrize("turned", [False, True])
def test_the_longest_strip_is_taken_and_the_next_refused(turned: bool) -> None:
    longest, beyond = (20000, 100), (20001, 100)
    if turned:
        longest, beyond = longest[::-1], beyond[::-1]
    assert min(processor_size(*longest, FACTOR, MIN_PIXELS, 324 * FACTOR**2)) == FACTOR
    with pytest.raises(InputError, match="at most 200 times the other"):
        processor_size(*beyond, FACTOR, MIN_PIXELS, 324 * FACTOR**2)
