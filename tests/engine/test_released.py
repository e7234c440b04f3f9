import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from step1x.engine import released
from step1x.engine.dit import DiT, Text
from step1x.engine.image import Canvas, image_ids
from step1x.engine.vae import VAE


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("version", "parameters"), [("v1.0", 12_427_800_385), ("v1.1", 12_427_800_384), ("v1.2", 12_442_484_544)]
)
def test_transformer(version: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(DiT(released.dit_config(version))) == parameters


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"v2\.0"):
        released.dit_config("v2.0")


def test_autoencoder_and_text_model() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    with torch.device("meta"):
        assert count(VAE(released.VAE)) == 83_819_683
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig(**released.QWEN))
    assert count(model.language_model) == 7_070_619_136
    assert count(model.visual) == 676_550_144


@pytest.mark.parametrize(("side", "teraflops"), [(512, 40.3), (1024, 169.2)])
def test_arithmetic_of_one_forward(side: int, teraflops: float) -> None:
    """Batch 1, 640 text rows (model.md §3.13)."""
    canvas = Canvas(side, side)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        dit = DiT(released.dit_config("v1.1"))
        request = dit.prepare(Text(torch.zeros(1, 640, 3584), torch.ones(1, 640, dtype=torch.long)))
        rope = dit.rope(torch.zeros(1, 640, 3), image_ids(canvas.grid, (1, 1, 1)).to("meta"))
        step = dit.condition(request, torch.zeros(1))
        dit.velocity(torch.zeros(1, 2 * canvas.tokens, 64), step, rope)
    assert counter.get_total_flops() == pytest.approx(teraflops * 1e12, rel=0.01)
