"""docs/cards.md is what the code says."""

from pathlib import Path

from step1x.bench import cards


def test_the_tables_of_cards_are_those_of_the_code() -> None:
    """If not: python -m step1x.bench.cards > docs/cards.md"""
    assert (Path(cards.__file__).parents[1] / "docs" / "cards.md").read_text() == cards.document()


def test_every_card_is_in_both_tables() -> None:
    text = cards.document()
    for label in cards.CARDS:
        assert text.count(f"| {label} |") == 2
