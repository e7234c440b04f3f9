"""Models with random weights are what a GPU will time: they run on a CPU at small sizes, whatever the profile."""

from dataclasses import replace

import pytest
import torch

from step1x.bench import full
from step1x.bench.counters import photograph
from step1x.engine.engine_config import model_sizes
from step1x.engine.variants import VARIANTS
from step1x.profiles import load_profile, profile_names
from step1x.quant.linear import QuantizedLinear

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_edits(name: str) -> None:
    """With the released preset, whose template the bundled tokenizer cuts otherwise."""
    profile = load_profile(name)
    sizes = replace(model_sizes(None), variant=VARIANTS["official-v1.1"])
    engine = full.engine(CPU, profile, sizes)
    result = engine.edit(photograph(), "make it darker", size=48, steps=1, seed=0)
    assert result.image.size == (96, 96)
    quantised = {layer.scheme for layer in engine.dit.modules() if isinstance(layer, QuantizedLinear)}
    assert quantised == ({profile.weights.dit} - {"plain"})


def test_quantised_weights_stand_for_normal_ones() -> None:
    for name in ("fp8-24gb", "int8-24gb", "int4-12gb"):
        engine = full.engine(CPU, load_profile(name), model_sizes(None))
        layers = [layer for layer in engine.dit.modules() if isinstance(layer, QuantizedLinear)]
        rows = torch.randn(64, layers[0].in_features).bfloat16()
        assert 0.1 < layers[0](rows).float().std() < 10
