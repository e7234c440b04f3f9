"""The exported functions of tensors against `Fused.velocity`, bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from step1x.engine.dit import DiT, Step, Text
from step1x.engine.fused import Fused
from step1x.engine.image import image_ids
from step1x.engine.kept import Active, Kept
from step1x.engine.vae import VAE, VAEConfig
from step1x.export.core import Decoder, Encoder, Packed, RowsCore, StepCore, inputs_of, reference, rows_inputs_of
from step1x.training.recipe import dit_config

TEXT, GRID = 5, (2, 3)
TARGET = GRID[0] * GRID[1]


@pytest.fixture(params=[(2, 2), (1, 3), (0, 2), (2, 0)], ids=str)
def dit(request: pytest.FixtureRequest) -> DiT:
    torch.manual_seed(0)
    depth, single = request.param
    made = DiT(replace(dit_config(64, 2, 2, 32), depth=depth, depth_single=single))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval().requires_grad_(False)


def arguments(dit: DiT, batch: int, *, bias: bool = True) -> tuple[Tensor, Step, tuple[Tensor, Tensor]]:
    """What a `Velocity` is given; the rotary tables are of one batch row."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    text = Text(
        random(batch, TEXT, dit.config.connector.in_channels),
        torch.ones(batch, TEXT),
        bias=random(batch, TEXT) if bias else None,
        biased=None,
    )
    step = dit.condition(dit.prepare(text), torch.full((batch,), 0.4))
    rope = dit.rope(torch.zeros(1, TEXT, 3), image_ids(GRID, (0, 0, 3)))
    return random(batch, 2 * TARGET, dit.config.in_channels), step, rope


def plain(dit: DiT) -> Fused:
    return Fused(dit, reference)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_step_is_the_fused_one(dit: DiT, batch: int) -> None:
    tokens, step, rope = arguments(dit, batch)
    for kept in (None, TARGET, 1):
        velocity = StepCore(dit)(*inputs_of(tokens, step, rope, kept))
        assert torch.equal(velocity, plain(dit).velocity(tokens, step, rope, kept))


def test_no_bias_is_zeros(dit: DiT) -> None:
    tokens, step, rope = arguments(dit, 2, bias=False)
    velocity = StepCore(dit)(*inputs_of(tokens, step, rope, TARGET))
    expected = plain(dit).velocity(tokens, step, rope, TARGET)
    assert ((velocity - expected).abs().max() / expected.abs().max()).item() < 1e-5


def test_packed_gives_the_step_back(dit: DiT) -> None:
    _, step, rope = arguments(dit, 2)
    packed = Packed.of(step, rope)
    assert all(tensor.shape[0] == 2 for tensor in packed)
    found = packed.step().mods
    for given, made in zip(
        (*[one for pair in step.mods.double for one in pair], *step.mods.single, step.mods.final),
        (*[one for pair in found.double for one in pair], *found.single, found.final),
        strict=True,
    ):
        assert torch.equal(given, made)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rows", [[3], [0, 2, 5], list(range(2 * TARGET))], ids=["one", "some", "all"])
def test_a_step_of_rows_is_the_fused_one_and_pure(dit: DiT, batch: int, rows: list[int]) -> None:
    tokens, step, rope = arguments(dit, batch)
    kept, index = Kept(dit, batch, TEXT + 2 * TARGET), torch.tensor([rows])
    plain(dit).velocity(tokens, step, rope, TARGET, Active.all(kept, TEXT))
    keys, values = (torch.stack(stores, dim=1) for stores in zip(*kept.blocks, strict=True))
    before = keys.clone(), values.clone()
    active, moved = Active.of(kept, index, TEXT), tokens + 0.1
    some = active.gathered(moved)
    given = rows_inputs_of(some, index, (keys, values), step, active.rope(rope))
    velocity, new_keys, new_values = RowsCore(dit)(*given)
    assert torch.equal(velocity, plain(dit).velocity(some, step, active.rope(rope), None, active))
    stores = tuple(torch.stack(stores, dim=1) for stores in zip(*kept.blocks, strict=True))
    assert torch.equal(new_keys, stores[0])
    assert torch.equal(new_values, stores[1])
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
    assert not torch.equal(new_keys, keys)


def test_autoencoder_halves() -> None:
    torch.manual_seed(0)
    config = VAEConfig(
        in_channels=3,
        channels=(4, 4, 8, 8),
        res_blocks=1,
        z_channels=4,
        groups=2,
        scale_factor=0.5,
        shift_factor=0.1,
    )
    vae = VAE(config).eval().requires_grad_(False)
    pixels = torch.randn(2, 3, 32, 48)
    moments = Encoder(vae)(pixels)
    mean = moments.chunk(2, dim=1)[0]
    latents = config.scale_factor * (mean - config.shift_factor)
    assert torch.equal(latents, vae.encode(pixels))
    assert torch.equal(
        Decoder(vae)(latents / config.scale_factor + config.shift_factor),
        vae.decode(latents),
    )
