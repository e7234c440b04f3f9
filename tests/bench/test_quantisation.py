"""What quantisation may cost on the bundled checkpoint, and the figures' own arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from step1x.bench import quantisation
from step1x.bench.counters import photograph
from step1x.bench.quant_commands import quant
from step1x.bench.quantisation import MOST_DB, psnr, quantised_layers, recorded, replaced, worst
from step1x.engine import Engine
from step1x.engine.errors import InputError
from step1x.quant.linear import QuantizedLinear

COFFEE = Path(__file__).parents[2] / "docs" / "pictures" / "coffee.jpg"
# Least mean PSNR in dB of pictures edited with all layers quantised that the rules name, against float32.
GATES = {"fp8": 40, "fp8-weight": 40, "int8": 40, "int8-weight": 40, "int4-weight": 30, "nvfp4": 30}
EDITS = (
    (photograph(256, 256), "make it black and white"),
    (photograph(256, 256, 80), "paint the left half blue"),
    (COFFEE, "add a red circle at the right"),
)
Plain = tuple[Engine, list[Image.Image]]


def edited(engine: Engine, count: int) -> list[Image.Image]:
    return [engine.edit(*one, seed=seed).image for seed, one in enumerate(EDITS[:count])]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """The bundled model, and its pictures without quantisation."""
    engine = Engine.load(cache=False)
    return engine, edited(engine, len(EDITS))


@pytest.mark.parametrize("scheme", GATES)
def test_quality_gates(plain: Plain, scheme: str) -> None:
    engine, wanted = plain
    count = 3 if scheme in ("fp8", "int8", "int4-weight") else 1
    with replaced(engine.dit, quantised_layers(engine.dit, "dit", scheme)):
        values = [psnr(got, one) for got, one in zip(edited(engine, count), wanted, strict=False)]
    assert GATES[scheme] < sum(values) / count < MOST_DB - 15, values


def test_replaced_puts_everything_back(plain: Plain) -> None:
    engine, _ = plain
    before = dict(engine.dit.named_modules())
    with replaced(engine.dit, quantised_layers(engine.dit, "dit", "int8")):
        assert sum(isinstance(layer, QuantizedLinear) for layer in engine.dit.modules()) == 32
    assert dict(engine.dit.named_modules()) == before


def test_a_model_that_is_quantised_already_is_refused(plain: Plain) -> None:
    engine, _ = plain
    layers = quantised_layers(engine.dit, "dit", "int8")
    with replaced(engine.dit, layers), pytest.raises(InputError, match="no layer of dit can be fp8"):
        quantised_layers(engine.dit, "dit", "fp8")


def test_psnr_of_a_known_error() -> None:
    black, grey = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (51, 51, 51))
    assert psnr(black, grey) == pytest.approx(13.979, abs=1e-3)  # 20 log10(255 / 51)
    assert psnr(black, black) == MOST_DB


def test_worst_is_a_mean_of_the_least() -> None:
    assert worst([3.0, 1.0, 2.0]) == 1
    assert worst([5.0] * 38 + [1.0, 2.0]) == 1.5


def test_sqnr_of_a_known_error() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False))
    off = nn.Linear(4, 4, bias=False)
    off.weight = nn.Parameter(1.1 * module[0].weight)
    with recorded(module, {"0": off}) as errors, torch.no_grad():
        module(torch.randn(2, 4))
        module(torch.randn(3, 4))
    assert errors["0"].sqnr == pytest.approx(20, abs=1e-3)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers and each alone, of the component asked for; JSON holds what is printed."""
    monkeypatch.setattr(quantisation, "INSTRUCTIONS", quantisation.INSTRUCTIONS[:2])
    words = ["report", "--component", "text", "--scheme", "int8-weight", "--size", "32", "--steps", "1"]
    result = CliRunner().invoke(quant, [*words, "--json", str(tmp_path / "out.json")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["suite"], found["notes"]["component"], found["notes"]["edits"]) == ("quantisation", "text", "2")
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    mean, least = values["int8-weight.mean"], values["int8-weight.worst"]
    assert 25 < least <= mean < MOST_DB
    assert f"PSNR {mean:.1f} dB, worst 5 % {least:.1f} dB" in result.output
    layers = [name for name in values if name.endswith(".sqnr")]
    assert layers
    assert all(20 < values[name] < 80 for name in layers)
    assert all(name.replace(".sqnr", ".psnr") in values for name in layers)
    assert len(result.output.splitlines()) == 2 + len(layers)


def test_photographs_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.jpg photographs"):
        quantisation.pictures(tmp_path, 64)
    photograph(40, 32).save(tmp_path / "one.jpg")
    assert quantisation.pictures(tmp_path, 64) == [(tmp_path / "one.jpg", words) for words in quantisation.INSTRUCTIONS]
