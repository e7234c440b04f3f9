import pytest
import torch

from step1x.engine.dit import DiT, DoubleBlock, Text, apply_rope
from step1x.engine.image import image_ids, pack, unpack
from step1x.training.flow import altered, flow_loss, times
from step1x.training.initialisation import init_dit
from step1x.training.recipe import dit_config


def test_times_are_shifted_logit_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, shifted = times(4000, 1.0, 1.0, generator), times(4000, 3.0, 1.0, generator)
    assert ((plain > 0) & (plain < 1)).all()
    assert abs(plain.median() - 0.5) < 0.02
    assert abs(shifted.median() - 0.75) < 0.02  # 3 s / (1 + 2 s) at s = 1/2
    assert abs((plain / (1 - plain)).log().std() - 1) < 0.02
    wide = times(4000, 1.0, 1.5, generator)
    assert abs((wide / (1 - wide)).log().std() - 1.5) < 0.03


def test_a_batch_of_times_has_one_in_each_stratum() -> None:
    levels = times(8, 1.0, 1.0, torch.Generator().manual_seed(0))
    shares = torch.special.ndtr((levels / (1 - levels)).log())  # back to uniform
    assert sorted((shares * 8).long().tolist()) == list(range(8))


def test_fresh_heads_look_at_their_place_in_the_reference() -> None:
    torch.manual_seed(0)
    config, rows, grid = dit_config(192, 1, 1, 16), 6, (4, 5)
    dit = DiT(config)
    for offset in ((1, 0, 0), (1, 1, 1)):
        init_dit(dit, offset)
        rope = dit.rope(torch.zeros(1, rows, 3), image_ids(grid, offset))
        x, tokens = torch.randn(2, 2 * 20 + rows, 192), torch.arange(20)
        for layer, norm in (
            (dit.double_blocks[0].img_attn.qkv, dit.double_blocks[0].img_attn.norm),
            (dit.single_blocks[0].linear1, dit.single_blocks[0].norm),
        ):
            q, k, _ = norm(layer(x)[..., : 3 * 192], config.heads)
            logits = apply_rope(q, rope) @ apply_rope(k, rope).transpose(-1, -2) / config.head_dim**0.5
            weights = logits[:, :, rows : rows + 20, rows:].softmax(-1)  # of target tokens, over image tokens
            found = weights[:, :, tokens, 20 + tokens].mean((0, 2))
            assert (found[:2] > 0.3).all()
            assert (found[2:] < 0.1).all()


def test_loss_of_a_silent_network_is_the_velocity_itself() -> None:
    """A fresh network says 0, so its loss is the mean square of noise - target, whatever the level."""
    torch.manual_seed(0)
    dit = DiT(dit_config(32, 1, 1, 16))
    init_dit(dit, (1, 1, 1))
    source, target, noise = torch.randn(3, 2, 16, 4, 6).unbind()
    text = Text(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.long))
    got = flow_loss(dit, text, (source, target), (1, 1, 1), torch.tensor([0.1, 0.9]), noise)
    assert torch.allclose(got, (noise - target).square().mean((1, 2, 3)), atol=1e-5)


def test_samples_on_the_models_own_way_lead_from_there_to_the_target() -> None:
    torch.manual_seed(0)
    dit = DiT(dit_config(32, 1, 1, 16))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    source, target, noise = torch.randn(3, 3, 16, 4, 6).unbind()
    text, level = Text(torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.long)), torch.tensor([0.6, 0.5, 0.9])
    got = flow_loss(dit, text, (source, target), (1, 1, 1), level, noise, own=2)
    rope = dit.rope(torch.zeros(1, 5, 3), image_ids((2, 3), (1, 1, 1)))

    def velocity(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        return unpack(dit(torch.cat((pack(x), pack(source)), 1), text, levels, rope)[:, :6], (2, 3))

    step, away = velocity(noise, torch.ones(3)), level[:, None, None, None]
    arrived = noise - (1 - away) * step
    arrived[2] = 0.1 * target[2] + 0.9 * noise[2]
    ends = arrived - away * velocity(arrived, level)
    want = ((ends - target) / away).square().mean((1, 2, 3))  # an error at the end is the velocity's times the level
    assert torch.allclose(got, want, rtol=1e-4)


def test_altered_tokens_are_those_of_local_edits_and_their_neighbours() -> None:
    source = torch.zeros(2, 16, 12, 12)
    target = torch.stack((torch.zeros(16, 12, 12), torch.ones(16, 12, 12)))
    target[0, :, 4, 9] = 1.0  # in the token of row 2, column 4
    found = altered(source, target)
    local = torch.zeros(6, 6)
    local[1:4, 3:6] = 1
    assert torch.equal(found[0, :, 0].reshape(6, 6), local)
    assert not found[1].any()


@pytest.mark.parametrize("own", [0, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_reaches_every_weight(own: int, autocast: bool) -> None:
    torch.manual_seed(0)
    dit = DiT(dit_config(32, 2, 1, 16))
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text = Text(torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    latents = (torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4))
    levels, noise = torch.tensor([0.3, 0.6]), torch.randn(2, 16, 4, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = flow_loss(dit, text, latents, (1, 1, 1), levels, noise, own=own)
    loss.sum().backward()
    silent = [
        name for name, parameter in dit.named_parameters() if parameter.grad is None or not parameter.grad.abs().any()
    ]
    # The last double block's text stream still feeds the single blocks, so nothing may be silent.
    assert silent == []


def test_channel_weights_weigh_the_error() -> None:
    torch.manual_seed(0)
    dit = DiT(dit_config(32, 1, 1, 16))
    init_dit(dit, (1, 1, 1))
    source, target, noise = torch.randn(3, 2, 16, 4, 6).unbind()
    text = Text(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.long))
    weights = torch.arange(16.0)
    got = flow_loss(
        dit, text, (source, target), (1, 1, 1), torch.tensor([0.1, 0.9]), noise, weights.repeat_interleave(4)
    )
    want = ((noise - target).square().mean((2, 3)) * weights).mean(1)
    assert torch.allclose(got, want, atol=1e-4)


def test_fresh_heads_measure_the_way_from_the_origin() -> None:
    """The share of attention that the last two heads give the text falls with the row, or with the column."""
    torch.manual_seed(0)
    config, rows, grid = dit_config(192, 3, 1, 16), 6, (8, 8)
    dit = DiT(config)
    init_dit(dit, (1, 1, 1))
    rope = dit.rope(torch.zeros(1, rows, 3), image_ids(grid, (1, 1, 1)))
    for block in dit.double_blocks:
        assert isinstance(block, DoubleBlock)
        image = block.img_attn.norm(block.img_attn.qkv(torch.randn(8, 128, 192)), config.heads)
        text = block.txt_attn.norm(block.txt_attn.qkv(torch.randn(8, rows, 192)), config.heads)
        q, k = (torch.cat((ours, theirs), dim=2) for ours, theirs in zip(text[:2], image[:2], strict=True))
        logits = apply_rope(q, rope) @ apply_rope(k, rope).transpose(-1, -2) / config.head_dim**0.5
        share = logits.softmax(-1)[:, :, rows : rows + 64, :rows].sum(-1).mean(0).reshape(-1, *grid)
        for head, axis in ((-1, 1), (-2, 0)):  # the mean over the other axis
            along = share[head].mean(axis)
            assert along[0] > 1.5 * along[-1]
            assert (along.diff() < 0.02).all()
        assert abs(share[0].mean(1)[0] - share[0].mean(1)[-1]) < 0.1
