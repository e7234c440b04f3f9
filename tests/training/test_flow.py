import torch

from step1x.engine.dit import DiT, Text
from step1x.training.flow import flow_loss, times
from step1x.training.recipe import dit_config
from step1x.training.tiny import init_dit


def test_times_are_shifted_logit_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, shifted = times(4000, 1.0, generator), times(4000, 3.0, generator)
    assert ((plain > 0) & (plain < 1)).all()
    assert abs(plain.median() - 0.5) < 0.02
    assert abs(shifted.median() - 0.75) < 0.02  # 3 s / (1 + 2 s) at s = 1/2


def test_loss_of_a_silent_network_is_the_velocity_itself() -> None:
    """A fresh network says 0, so its loss is the mean square of noise - target, whatever the level."""
    torch.manual_seed(0)
    dit = DiT(dit_config(32, 1, 1, 16))
    init_dit(dit)
    source, target, noise = torch.randn(3, 2, 16, 4, 6).unbind()
    text = Text(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.long))
    got = flow_loss(dit, text, (source, target), (1, 1, 1), torch.tensor([0.1, 0.9]), noise)
    assert torch.allclose(got, (noise - target).square().mean((1, 2, 3)), atol=1e-5)


def test_loss_reaches_every_weight() -> None:
    torch.manual_seed(0)
    dit = DiT(dit_config(32, 2, 1, 16))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text = Text(torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    latents = (torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4))
    flow_loss(dit, text, latents, (1, 1, 1), torch.tensor([0.3, 0.6]), torch.randn(2, 16, 4, 4)).sum().backward()
    silent = [
        name for name, parameter in dit.named_parameters() if parameter.grad is None or not parameter.grad.abs().any()
    ]
    # The last double block's text stream still feeds the single blocks, so nothing may be silent.
    assert silent == []
