"""Steps that compute some rows and see the others as they were kept (step-skipping.md §6.4 A)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from step1x.engine import released
from step1x.engine.dit import DiT, Step, Text
from step1x.engine.fused import Fused
from step1x.engine.image import image_ids
from step1x.engine.kept import Active, Kept, Rows8, kept_bytes
from step1x.training.recipe import dit_config

TEXT, GRID = 5, (4, 6)
TARGET = GRID[0] * GRID[1]
EDITED = {
    "some": [3, 4, 9, 10, 17],
    "one": [13],
    "corner": [0, 1, 6, 7],
    "last": [TARGET - 1],
    "all": list(range(TARGET)),
}


def transformer(dtype: torch.dtype, fp32_norms: bool = True) -> DiT:
    torch.manual_seed(1)
    dit = DiT(dit_config(64, 2, 3, 32), fp32_norms)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit.to(dtype).eval().requires_grad_(False)


def conditioned(dit: DiT, branches: int, seed: int = 0, timestep: float = 0.7) -> tuple[Step, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    text = Text(torch.randn(branches, TEXT, 32, generator=generator).to(dit.dtype), torch.ones(branches, TEXT))
    step = dit.condition(dit.prepare(text), torch.full((branches,), timestep, dtype=dit.dtype))
    ids = image_ids(GRID, (0, 0, GRID[1])).expand(branches, -1, -1)
    return step, dit.rope(torch.zeros(branches, TEXT, 3), ids)


def tokens(dit: DiT, branches: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 2 * TARGET, dit.config.in_channels, generator=generator).to(dit.dtype)
    return latents.expand(branches, -1, -1)


def both(
    dit: DiT, rows: Tensor, branches: int, drift: float = 0.0, *, eight_bit: bool = False, poison: bool = False
) -> tuple[Tensor, Tensor]:
    """A step at all rows that keeps them, and one at `rows` alone, of latents that have moved by `drift` meanwhile."""
    fused = Fused(dit)
    step, rope = conditioned(dit, branches)
    kept = Kept(dit, branches, TEXT + 2 * TARGET, eight_bit=eight_bit)
    whole = fused.velocity(tokens(dit, branches), step, rope, TARGET, Active.all(kept, TEXT))
    if poison:
        for keys, values in kept.blocks:
            assert isinstance(keys, Tensor)
            assert isinstance(values, Tensor)
            keys.zero_()
            values.zero_()
    active = Active.of(kept, rows, TEXT)
    img = tokens(dit, branches) + drift * tokens(dit, branches, seed=5)
    some = fused.velocity(active.gathered(img), step, active.rope(rope), None, active)
    return whole.gather(1, rows.expand(branches, -1)[..., None].expand(-1, -1, whole.shape[2])), some


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("edited", EDITED)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_the_same_step_again_gives_the_same(edited: str, branches: int, dtype: torch.dtype, bound: float) -> None:
    """By induction over the blocks: keys and values of every row are the same."""
    expected, found = both(transformer(dtype), torch.tensor([EDITED[edited]]), branches)
    assert error(found, expected) <= bound


def test_controls_differ() -> None:
    dit, rows = transformer(torch.float64), torch.tensor([EDITED["some"]])
    for changed in ({"drift": 0.1}, {"poison": True}):
        expected, found = both(dit, rows, 2, **changed)  # type: ignore[arg-type]
        assert error(found, expected) > 1e-3


def test_rows_in_any_order_and_of_each_picture() -> None:
    dit = transformer(torch.float64)
    expected, found = both(dit, torch.tensor([[7, 2, 20], [23, 0, 5]]), 2)
    assert error(found, expected) <= 1e-12


def test_more_rows_than_needed_change_nothing() -> None:
    dit = transformer(torch.float64)
    _, few = both(dit, torch.tensor([[3, 4, 9]]), 2)
    _, more = both(dit, torch.tensor([[3, 4, 9, 1, 22]]), 2)
    assert error(more[:, :3], few) <= 1e-12


def test_keeping_changes_no_bit() -> None:
    dit = transformer(torch.float32)
    fused = Fused(dit)
    step, rope = conditioned(dit, 2)
    kept = Kept(dit, 2, TEXT + 2 * TARGET)
    img = tokens(dit, 2)
    assert torch.equal(
        fused.velocity(img, step, rope, TARGET, Active.all(kept, TEXT)), fused.velocity(img, step, rope, TARGET)
    )


def test_biased_text_rows_stay_biased() -> None:
    dit, rows = transformer(torch.float64), torch.tensor([EDITED["some"]])
    fused = Fused(dit)
    step, rope = conditioned(dit, 1)
    step = replace(step, bias=torch.tensor([[0.0, 0, 0, 2.5, 2.5]]).double(), biased=2)
    kept = Kept(dit, 1, TEXT + 2 * TARGET)
    whole = fused.velocity(tokens(dit, 1), step, rope, TARGET, Active.all(kept, TEXT))
    active = Active.of(kept, rows, TEXT)
    some = fused.velocity(active.gathered(tokens(dit, 1)), step, active.rope(rope), None, active)
    assert error(some, whole[:, rows[0]]) <= 1e-12
    plain = fused.velocity(tokens(dit, 1), replace(step, bias=None, biased=0), rope, TARGET)
    assert error(plain, whole) > 1e-3


def test_only_computed_rows_are_replaced() -> None:
    dit, rows = transformer(torch.float32), torch.tensor([EDITED["some"]])
    step, rope = conditioned(dit, 1)
    kept = Kept(dit, 1, TEXT + 2 * TARGET)
    fused = Fused(dit)
    fused.velocity(tokens(dit, 1), step, rope, TARGET, Active.all(kept, TEXT))
    before = [(keys.clone(), values.clone()) for keys, values in kept.blocks]  # type: ignore[union-attr]
    active = Active.of(kept, rows, TEXT)
    fused.velocity(active.gathered(tokens(dit, 1, seed=3)), step, active.rope(rope), None, active)
    stays = torch.ones(kept.rows, dtype=torch.bool)
    stays[active.joint[0]] = False
    for (keys, values), (old_keys, old_values) in zip(kept.blocks, before, strict=True):
        for new, old in ((keys, old_keys), (values, old_values)):
            assert isinstance(new, Tensor)
            assert torch.equal(new[:, :, stays], old[:, :, stays])
            assert not torch.equal(new[:, :, ~stays], old[:, :, ~stays])


def test_in_8_bits_half_the_memory_and_near() -> None:
    dit, rows = transformer(torch.bfloat16), torch.tensor([EDITED["some"]])
    expected, found = both(dit, rows, 2, eight_bit=True)
    assert error(found, expected) < 0.1
    wide, narrow = (kept_bytes(released.dit_config("v1.1"), 2 * 8832, itemsize) for itemsize in (2, 1))
    assert wide == pytest.approx(12.4e9, rel=0.01)  # of both branches at 1024; performance.md §C says 12.1 GB
    assert narrow / wide == pytest.approx(0.5, rel=0.04)
    for eight_bit in (False, True):
        kept = Kept(dit, 2, 53, eight_bit=eight_bit)
        assert kept.nbytes == kept_bytes(dit.config, 2 * 53, 1 if eight_bit else 2)
        assert isinstance(kept.blocks[0][0], Rows8) is eight_bit
