"""The whole training, at toy size, for seconds: it runs, resumes, and what it writes is an ordinary model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from step1x.engine import Engine
from step1x.training import recipe, state, tiny
from step1x.training.__main__ import program
from step1x.training.edits import words
from step1x.training.flow import flow_loss
from step1x.training.recipe import Stage, dit_config
from step1x.training.tiny import LEAST, Clock, new_text

TOY = replace(
    recipe.CPU,
    dit=dit_config(32, 1, 1, 32),
    text={**recipe.CPU.text, "hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 32},
    vocabulary=400,
    chain_steps=2,
    vae_canvases=(64,),
    vae_crops=((64, 2),),
    stages=(
        Stage(canvases=((32, 32),), batch=4, share=0.5),
        Stage(canvases=((48, 32),), batch=2, share=0.5, first=0.5, own=0.5, emphasis=7.0, log_floor=0.08),
    ),
    pool=8,
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    return folder


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe.RECIPES, "cpu", TOY)


def train(photos: Path, folder: Path, output: Path, *more: str) -> str:
    line = ["tiny", "--photos", str(photos), "--hours", "0.0015", "--device", "cpu", "--recipe", "cpu"]
    result = CliRunner().invoke(program, [*line, "--run", str(folder), "-o", str(output), *more])
    assert result.exit_code == 0, result.output
    return result.output


def test_trains_resumes_and_writes_a_model(photos: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "model"
    train(photos, run, output)
    saved = state.load(run / "editor.pt", torch.device("cpu"))
    assert saved is not None
    assert saved["step"] > 0
    edited = Engine.load(output, device="cpu").edit(Image.new("RGB", (40, 32)), "make it darker", size=32, steps=2)
    assert edited.image.size == (40, 32)
    # The time is used up, so the same command adds nothing and writes the same weights.
    train(photos, run, tmp_path / "again")
    for part in ("transformer", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (output / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    train(photos, tmp_path / "more", tmp_path / "from-model", "--init", str(output))
    assert Engine.load(tmp_path / "from-model", device="cpu").variant == Engine.load(output, device="cpu").variant


def test_samples_are_drawn_as_their_stage_says(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, int, float]] = []
    descended: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(*given: Any) -> torch.Tensor:
        *_, sigma, _, weights, own = given
        seen.append((sigma, own, float((weights.amax(1) - weights.amin(1)).max())))
        losses = flow_loss(*given)
        losses.register_hook(lambda gradient: descended.append((losses.detach(), gradient)))
        return losses

    monkeypatch.setattr(tiny, "flow_loss", watched)
    train(photos, tmp_path / "run", tmp_path / "model")
    early, late = ([one for one in seen if len(one[0]) == batch] for batch in (4, 2))
    assert early
    assert all(own == 0 and spread == 0 and (sigma < 1).all() for sigma, own, spread in early)
    assert late
    assert all(own == 1 and LEAST <= sigma[0] < sigma[1] == 1 for sigma, own, _ in late)
    assert any(spread > 0 for *_, spread in late)  # an edit of a part was drawn, and its tokens count more
    assert len(descended) == len(seen)
    for losses, gradient in descended:
        slope = 0.25 * torch.ones(4) if len(losses) == 4 else 0.5 / (losses + 0.08)
        torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("one", recipe.RECIPES.values(), ids=recipe.RECIPES)
def test_stages_take_all_of_the_time(one: recipe.Recipe) -> None:
    assert sum(stage.share for stage in one.stages) == pytest.approx(1)


def test_an_existing_output_is_refused(photos: Path, tmp_path: Path) -> None:
    line = ["tiny", "--photos", str(photos), "--hours", "1", "-o", str(tmp_path)]
    result = CliRunner().invoke(program, line)
    assert result.exit_code == 2
    assert "exists already" in result.output


def test_no_photographs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = ["tiny", "--photos", str(tmp_path / "empty"), "--hours", "1", "-o", str(tmp_path / "model")]
    result = CliRunner().invoke(program, line)
    assert result.exit_code == 2
    assert "no photographs" in result.output


@pytest.mark.parametrize(
    "instruction",
    ["add a red circle at the top left", "在右下角画一个紫色正方形", "把蓝色的圆变成正方形", "左半边变成橙色"],
)
def test_colours_shapes_and_places_have_tokens_of_their_own(instruction: str) -> None:
    """What a word means is then learned once, not once for every instruction that it stands in."""
    tokenizer = new_text(replace(TOY, vocabulary=recipe.CPU.vocabulary), 0).tokenizer
    pieces = [tokenizer.decode([one]).strip() for one in tokenizer(instruction)["input_ids"]]
    assert pieces == (instruction.split() if " " in instruction else words([instruction]))


def test_text_side_in_training_equals_the_engine() -> None:
    """Batched rows with a shared template run equal `Conditioner.encode`, row for row."""
    text = new_text(TOY, 0)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    prompts = ["make it black and white", "把圆变成蓝色", ""]
    patches, grid = text.conditioner.patches(image)
    batch = text(torch.stack([patches] * 3), grid, prompts)
    for row, one in enumerate(text.conditioner.encode(image, prompts)):
        assert torch.equal(batch.mask[row], one.text.mask[0])
        assert torch.allclose(batch.tokens[row], one.text.tokens[0], atol=2e-5)


def test_clock_goes_from_warm_up_to_almost_nothing() -> None:
    assert Clock(100.0).factor(0, 10) == pytest.approx(0.1, rel=1e-3)
    assert Clock(100.0).factor(50, 10) == pytest.approx(1.0, rel=1e-3)
    assert Clock(100.0, used=100.0).factor(50, 10) == pytest.approx(0.02, rel=1e-3)
    assert Clock(100.0, used=300.0).done == 1.0
