"""The layers that the rules name, in the models that they are for."""

import pytest
import torch

from step1x.engine.dit import is_modulation
from step1x.engine.weights import load
from step1x.quant.linear import chosen
from step1x.quant.rules import COMPONENTS, rules


@pytest.fixture(scope="module")
def bundled():
    return load(None, device="cpu", dtype=torch.float32)


def test_the_transformer(bundled):
    names = chosen(bundled.dit, "dit", "int8")
    assert len(names) == 3 * 8 + 4 * 2
    assert not any(is_modulation(f"{name}.weight") for name in names)
    folded = chosen(bundled.dit, "folded", "int8")
    weights = [name for name, _ in bundled.dit.named_parameters() if is_modulation(name) and name.endswith(".weight")]
    assert [f"{name}.weight" for name in folded] == weights


def test_the_text_model(bundled):
    config = bundled.conditioner.model.config
    assert len(chosen(bundled.conditioner.model, "text", "int8-weight")) == 7 * config.text_config.num_hidden_layers
    assert len(chosen(bundled.conditioner.model, "vision", "int8-weight")) == 5 * config.vision_config.depth


@pytest.mark.parametrize("component", COMPONENTS)
def test_plain_is_plain_everywhere(bundled, component):
    model = bundled.dit if component in ("dit", "folded") else bundled.conditioner.model
    assert chosen(model, component, "plain") == {}


def test_unknown_words_are_errors():
    with pytest.raises(ValueError, match="unknown component 'vae'; known: dit, folded, text, vision"):
        rules("vae", "fp8")
    with pytest.raises(ValueError, match="unknown scheme 'fp4'; known: plain, fp8"):
        rules("dit", "fp4")
