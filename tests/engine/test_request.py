"""Options and what they refuse, seeds, canvases, and what a profile says of an edit."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from step1x.engine.errors import InputError
from step1x.engine.image import Canvas
from step1x.engine.picture import open_picture
from step1x.engine.policy import Dense
from step1x.engine.request import MAX_SEED, Defaults, Noise, Options, canvas_of, checked_seed, chosen
from step1x.engine.variants import VARIANTS
from step1x.profiles import load_profile


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"guidance": -1.0}, "guidance must be a finite number"),
        ({"strength": 0.0}, "strength must be above 0"),
        ({"posterior": "mode"}, "posterior must be"),
        ({"branches": "both"}, "branches must be"),
        ({"speed": "slow"}, "speed must be one of exact, balanced, fast, turbo, got 'slow'"),
        ({"speed": "exact", "policy": Dense()}, "give one"),
        ({"exact_algebra": "on"}, "exact_algebra must be"),
        ({"colour": "red"}, "unknown option colour; known: negative_prompt, steps"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        chosen(Options, options)
    assert "\n" not in str(error.value)


def test_facts_are_of_the_variant_where_options_do_not_say() -> None:
    row = VARIANTS["official-v1.1"]
    facts = {"negative_prompt": "", "steps": row.steps, "guidance": row.guidance, "size": row.size, "variant": row.name}
    assert Options().facts(row) == facts
    given = {"negative_prompt": "fog", "steps": 3, "guidance": 1.5, "size": 64, "strength": 0.5}
    assert Options(**given).facts(row) == facts | given  # type: ignore[arg-type]


def test_seeds() -> None:
    assert [checked_seed(seed) for seed in (0, 5, MAX_SEED)] == [0, 5, MAX_SEED]
    drawn = {checked_seed(None) for _ in range(5)}
    assert len(drawn) > 1
    assert all(0 <= seed < 2**32 for seed in drawn)
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(InputError, match="seed must be between"):
            checked_seed(seed)


def test_a_batch_has_one_canvas() -> None:
    wide, also, tall = (open_picture(Image.new("RGB", size)) for size in ((60, 40), (120, 80), (40, 60)))
    assert canvas_of([wide, also], 64) == Canvas(64, 48)
    with pytest.raises(InputError, match="at one size, these at 48x64, 64x48"):
        canvas_of([wide, tall], 64)


def test_a_profile_says_how_edits_are_made(tmp_path: Path) -> None:
    own = load_profile("cpu")
    assert Defaults.of(own) == Defaults()
    assert Defaults.of(own.changed({"speed": "fast"})) == Defaults(speed="fast")
    assert Defaults.of(own.changed({"branches": "batched"})) == Defaults(branches="batched")
    assert Defaults.of(own.changed({"kv_dtype": "float8"})) == Defaults(eight_bit_keys=True)
    assert Defaults.of(load_profile("int4-12gb")) == Defaults(branches="sequential", eight_bit_keys=True)


def test_noise_of_the_posterior_is_drawn_first() -> None:
    """The order of the released pipelines: one generator, first the reference's posterior, then the latents (§5.2)."""
    canvas, generator = Canvas(32, 48), torch.Generator().manual_seed(7)
    drawn = Noise.draw(7, canvas, 16)
    assert torch.equal(drawn.posterior, torch.randn(1, 16, 6, 4, generator=generator))
    assert torch.equal(drawn.latents, torch.randn(1, 16, 6, 4, generator=generator))
    assert not torch.equal(drawn.posterior, drawn.latents)
