"""The loop by a plan (step-skipping.md §6.4 A): the dense one bit for bit, exact where it must be, no global state."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from step1x.bench.counters import photograph
from step1x.bench.counting import flop_counter
from step1x.engine import Engine
from step1x.engine.backends import Exported
from step1x.engine.denoise import Guidance, Halves, Loop, Runner, branches, denoise, folded
from step1x.engine.dit import DiT, Text
from step1x.engine.errors import InputError
from step1x.engine.fused import Fused
from step1x.engine.image import image_ids
from step1x.engine.plan import Mode, spelled
from step1x.engine.policy import (
    CfgReuse,
    Dense,
    GuidanceInterval,
    Policy,
    RefFreeze,
    Region,
    StepMask,
    TeaCache,
    Together,
    regione,
)
from step1x.engine.presets import MASKED, PRESETS
from step1x.engine.schedule import timesteps
from step1x.engine.selection import Selection, choose
from step1x.engine.skipping import Done, Skipping, bucket, by_mask, by_similarity, skip
from step1x.engine.text import Conditioning
from step1x.engine.variants import VARIANTS, Variant
from step1x.engine.work import Rows, flops
from step1x.export.exported import runner_of
from step1x.quant.linear import QuantizedLinear, quantise_layers
from step1x.training.recipe import dit_config

POLICIES: dict[str, Policy] = {
    **{name: policy for name, policy in PRESETS.items() if name != "exact"},
    "regione": regione(),
    "ref-freeze": RefFreeze(every=4),
    "step-mask": StepMask(every=3),
    "interval": GuidanceInterval(low=0.2, high=0.8),
    "dense": Dense(),
}
RARELY = TeaCache(rule=replace(TeaCache().rule, threshold=1e9))  # computes the first and the last step alone
OFTEN = TeaCache(rule=replace(TeaCache().rule, threshold=0.4))
TEACACHES: dict[str, Policy] = {
    "alone": OFTEN,
    "regions": Together((Region(warmup=3, post=2, refreshes=()), OFTEN)),
    "regions, rarely": Together((Region(warmup=3, post=2, refreshes=(6,)), RARELY)),
    "frozen reference": Together((RefFreeze(first=2), OFTEN)),
    "difference": Together((CfgReuse(first=2, every=4), OFTEN)),
    "interval": Together((GuidanceInterval(low=0.2, high=0.8), OFTEN)),
    "decay": Together((regione(), OFTEN)),
}
GRID = (6, 8)
TARGET = GRID[0] * GRID[1]
ROWS = [VARIANTS[name] for name in ("official-v1.0", "official-v1.1", "diffusers-v1.1")]
SELECT = by_similarity(GRID)


def transformer(row: Variant, dtype: torch.dtype = torch.float64) -> DiT:
    torch.manual_seed(2)
    dit = DiT(dit_config(64, 2, 3, 32), row.dtype_flow != "pure")
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit.to(dtype).eval().requires_grad_(False)


def instruction(seed: int, valid: int) -> Conditioning:
    tokens = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(12) < valid).long()[None]
    return Conditioning(Text(tokens * mask[..., None], mask), torch.zeros(1, 12, 3), valid)


def looped(
    dit: DiT, row: Variant, *, steps: int = 12, batched: bool = True, scale: float | None = 3.0, batch: int = 1
) -> Loop:
    groups = [[instruction(10 * index + seed, 5 + index) for index in range(batch)] for seed in (1, 2)]
    fused = Fused(dit)
    forwards = branches(
        dit,
        groups if scale else groups[:1],
        image_ids(GRID, row.reference_ids),
        batched,
        runner=Runner(
            fused.velocity, rows=fused.velocity, halves=Halves(fused.blocks, fused.blocks, fused.final_block)
        ),
    )
    return Loop(forwards, timesteps(steps, 1024), Guidance(scale, row.rescale_above) if scale else None, row)


def state(batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise, reference = torch.randn(2, batch, TARGET, 64, generator=generator, dtype=dtype)
    return noise, reference


def by(policy: Policy, chosen: list[int] | None = None) -> Skipping:
    if chosen is None:
        return Skipping(policy=policy, select=SELECT)
    mask = torch.zeros(1, TARGET, dtype=torch.bool)
    mask[0, chosen] = True
    return Skipping(policy=policy, select=lambda *_: choose(mask, mask.float(), 1))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_of_full_steps_gives_the_same_bits(row: Variant, batched: bool, dtype: torch.dtype) -> None:
    dit = transformer(row, dtype)
    for scale in (3.0, None):
        loop = looped(dit, row, steps=4, batched=batched, scale=scale)
        expected = denoise(dit, loop, state(dtype=dtype))
        for policy in (Dense(), StepMask(mask="1111"), CfgReuse(every=1)):
            assert torch.equal(skip(dit, loop, state(dtype=dtype), by(policy)).latents, expected)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("batched", [True, False])
def test_on_a_straight_way_nothing_is_lost(name: str, batched: bool) -> None:
    """A velocity that is constant for each token: skips, jumps and frozen rows land where all steps do."""
    row = ROWS[0]
    dit = transformer(row)
    dit.final_layer.linear.weight.zero_()
    loop = looped(dit, row, batched=batched)
    expected = denoise(dit, loop, state())
    done = skip(dit, loop, state(), by(POLICIES[name], [3, 4, 11, 12, 40]))
    scaled = any(step.mode is Mode.SKIP and step.scale != 1 for step in done.steps)
    assert error(done.latents, expected) < (0.2 if scaled else 1e-6)
    assert len(done.steps) == 12


def test_tokens_left_behind_are_parked_and_come_back() -> None:
    row, chosen = ROWS[2], [3, 4, 11, 12, 40]
    dit = transformer(row)
    trail: list[Tensor] = []
    loop = looped(dit, row)
    done = skip(dit, loop, state(), by(Region(warmup=3, post=2, refreshes=()), chosen), trail=trail)
    assert spelled(done.steps) == "FFFRRRRRRRFF"
    others = [token for token in range(TARGET) if token not in chosen]
    for before, after in pairwise(trail[2:10]):
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before[:, chosen], after[:, chosen])
    assert not torch.equal(trail[9][:, others], trail[10][:, others])


def test_a_region_of_everything_is_the_frozen_reference() -> None:
    row = ROWS[1]
    dit = transformer(row)
    loop = looped(dit, row)
    region = skip(dit, loop, state(), by(Region(warmup=3, post=2, refreshes=()), list(range(TARGET))))
    frozen = skip(dit, loop, state(), by(RefFreeze(first=3, last=2)))
    assert region.selection is not None
    assert region.selection.fell_back
    assert error(region.latents, frozen.latents) < 1e-12


@pytest.mark.parametrize("name", POLICIES)
def test_branches_one_by_one_and_batches_are_equal(name: str) -> None:
    row = ROWS[2]
    dit = transformer(row)
    mask = torch.zeros(2, TARGET, dtype=torch.bool)
    mask[0, :9], mask[1, 20:24] = True, True
    both = skip(dit, looped(dit, row, batch=2), state(2), Skipping(policy=POLICIES[name], select=by_mask(mask, GRID)))
    apart = skip(
        dit,
        looped(dit, row, batch=2, batched=False),
        state(2),
        Skipping(policy=POLICIES[name], select=by_mask(mask, GRID)),
    )
    assert error(apart.latents, both.latents) < 1e-10
    assert both.steps == apart.steps


def test_the_difference_is_reused_where_the_plan_says() -> None:
    row = ROWS[0]
    dit = transformer(row)
    loop = looped(dit, row)
    dense = denoise(dit, loop, state())
    reused = skip(dit, loop, state(), by(CfgReuse(first=2, every=3)))
    assert spelled(reused.steps).count("f") > 5
    assert 1e-9 < error(reused.latents, dense) < 0.5


def test_a_probe_may_veto() -> None:
    row = ROWS[1]
    dit = transformer(row)
    loop = looped(dit, row)
    always = TeaCache(rule=replace(TeaCache().rule, threshold=0.0))
    never = TeaCache(rule=replace(TeaCache().rule, threshold=1e9))
    computed = skip(dit, loop, state(), by(always))
    assert spelled(computed.steps) == "F" * 12
    assert torch.equal(computed.latents, denoise(dit, loop, state()))
    assert spelled(skip(dit, loop, state(), by(never)).steps) == "F" + "s" * 10 + "F"


@pytest.mark.parametrize("name", POLICIES)
def test_work_is_what_is_counted(name: str) -> None:
    row = ROWS[1]
    dit = transformer(row, torch.float32)
    loop = looped(dit, row)
    loop = replace(
        loop, forwards=folded(dit, loop.forwards, [torch.ones(1)] * 12), algebra=replace(loop.algebra, fold=False)
    )
    with flop_counter() as counter:
        done = skip(dit, loop, state(dtype=torch.float32), by(POLICIES[name], list(range(12))))
    texts = loop.forwards[0].request.text.rows.shape[1]
    rows = Rows(text=texts, target=TARGET, reference=TARGET, active=12)
    expected = flops(done.steps, dit.config, rows)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_requests_in_two_threads_do_not_meet() -> None:
    engine = Engine.load(device="cpu", cache=False)

    def edited(index: int) -> bytes:
        options = {"seed": index, "size": 96, "steps": 10, "guidance": 2.0, "speed": ("fast", "balanced")[index]}
        return engine.edit(photograph(96, 96, index), "add a red circle at the left", **options).image.tobytes()

    alone = [edited(index) for index in range(2)]
    found: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: edited(i)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(2)] == alone


@pytest.mark.parametrize("speed", list(MASKED))
def test_pixels_outside_a_mask_are_the_sources(speed: str) -> None:
    engine, shown = Engine.load(device="cpu", cache=False), photograph(120, 90)
    marked = np.zeros((90, 120), np.uint8)
    marked[20:60, 30:80] = 255
    result = engine.edit(
        shown, "invert the colours", seed=1, size=128, steps=8, mask=Image.fromarray(marked), speed=speed
    )
    source, found = np.asarray(shown), np.asarray(result.image)
    assert np.array_equal(found[marked == 0], source[marked == 0])
    assert np.abs(found[40, 55].astype(int) - source[40, 55]).max() > 30
    assert "R" in str(result.metadata["plan"]).upper()
    assert int(result.metadata["edited_tokens"]) < 64


def test_mistakes_in_masks_and_speeds() -> None:
    engine, shown = Engine.load(device="cpu", cache=False), photograph(64, 48)
    for options, message in [
        ({"mask": Image.new("L", (10, 10), 255)}, "the mask is 10 x 10, the picture 64 x 48"),
        ({"mask": Image.new("L", (64, 48), 0)}, "the mask marks nothing"),
        ({"speed": "ludicrous"}, "speed must be one of exact, balanced, fast, turbo"),
        ({"speed": "fast", "policy": Dense()}, "give one"),
        ({"speed": "fast", "exact_algebra": False}, "leave it on"),
    ]:
        with pytest.raises(InputError, match=message):
            engine.edit(shown, "make it darker", seed=1, size=64, **options)


def test_eight_bit_keys_are_near() -> None:
    row = ROWS[1]
    dit = transformer(row, torch.bfloat16)
    loop = looped(dit, row)
    results: list[Done] = [
        skip(dit, loop, state(dtype=torch.bfloat16), replace(by(RefFreeze()), eight_bit=eight_bit))
        for eight_bit in (False, True)
    ]
    assert 0 < error(results[1].latents, results[0].latents) < 0.1


def silenced(dit: DiT) -> DiT:
    """Blocks that add nothing: their gates are shut, whatever the step."""
    for name, parameter in dit.named_parameters():
        if "img_mod." in name or "txt_mod." in name or ".modulation." in name:
            parameter.zero_()
    return dit


@pytest.mark.parametrize("name", ["alone", "regions", "regions, rarely", "frozen reference"])
@pytest.mark.parametrize("scale", [3.0, None])
def test_a_residual_that_does_not_change_costs_nothing(name: str, scale: float | None) -> None:
    """Skipped steps have their own rows and their own modulation of the final layer, so only the residual is old."""
    row = ROWS[1]
    dit = silenced(transformer(row))
    loop = looped(dit, row, scale=scale)
    policy = TEACACHES[name]
    others = tuple(one for one in getattr(policy, "policies", ()) if not isinstance(one, TeaCache))
    expected = skip(dit, loop, state(), by(Together(others), [3, 4, 11, 12, 40]))
    done = skip(dit, loop, state(), by(policy, [3, 4, 11, 12, 40]))
    assert "s" in spelled(done.steps)
    assert error(done.latents, expected.latents) < 1e-12
    velocities = skip(dit, loop, state(), by(StepMask(mask="100000000001")))
    assert error(velocities.latents, denoise(dit, loop, state())) > 1e-3


@pytest.mark.parametrize("name", TEACACHES)
@pytest.mark.parametrize("first", [0, 3])
def test_residuals_of_branches_one_by_one_and_of_batches_are_equal(name: str, first: int) -> None:
    """Also where the schedule is a part of one (strength)."""
    row = ROWS[2]
    dit = transformer(row)
    mask = torch.zeros(2, TARGET, dtype=torch.bool)
    mask[0, :9], mask[1, 20:24] = True, True
    made = []
    for batched in (True, False):
        loop = looped(dit, row, batch=2, batched=batched, steps=14)
        loop = replace(loop, schedule=loop.schedule[first:])
        made.append(skip(dit, loop, state(2), Skipping(policy=TEACACHES[name], select=by_mask(mask, GRID))))
    assert error(made[1].latents, made[0].latents) < 1e-10
    assert made[0].steps == made[1].steps
    assert "s" in spelled(made[0].steps)
    assert len(made[0].steps) == 14 - first


def test_a_skip_by_a_residual_brings_no_block_and_costs_two_small_layers() -> None:
    row = ROWS[1]
    dit = transformer(row, torch.float32)
    brought: list[object] = []

    @contextmanager
    def present(block: object) -> Iterator[None]:
        brought.append(block)
        yield

    dit.present = present
    loop = looped(dit, row)
    width, blocks = dit.config.hidden_size, dit.config.depth + dit.config.depth_single
    counts = []
    for steps in (12, 11):
        shorter = replace(loop, schedule=timesteps(12, 1024)[12 - steps :])
        forwards = folded(dit, loop.forwards, [torch.ones(1)] * steps)
        shorter = replace(shorter, forwards=forwards, algebra=replace(loop.algebra, fold=False))
        with flop_counter() as counter:
            done = skip(dit, shorter, state(dtype=torch.float32), by(RARELY))
        assert spelled(done.steps) == "F" + "s" * (steps - 2) + "F"
        assert len(brought) == 2 * blocks
        brought.clear()
        counts.append(counter.get_total_flops())
    # The probe's and the step's own img_in of both rows of guidance, and the final layer.
    assert counts[0] - counts[1] == 2 * 64 * width * TARGET * (2 + 2 + 2)


def test_the_residual_with_eight_bits() -> None:
    row = ROWS[1]
    dit = transformer(row, torch.bfloat16)
    quantise_layers(dit, "dit", "fp8")
    assert any(isinstance(layer, QuantizedLinear) for layer in dit.modules())
    loop, given = looped(dit, row), state(dtype=torch.bfloat16)
    never = TeaCache(rule=replace(TeaCache().rule, threshold=0.0))
    assert torch.equal(skip(dit, loop, given, by(never)).latents, denoise(dit, loop, given))
    kept = replace(by(TEACACHES["frozen reference"]), eight_bit=True)
    wide = skip(dit, loop, given, by(TEACACHES["frozen reference"]))
    assert "s" in spelled(wide.steps)
    assert 0 < error(skip(dit, loop, given, kept).latents, wide.latents) < 0.1


def test_an_exported_engine_refuses_teacache() -> None:
    row = ROWS[1]
    dit = transformer(row)
    loop = looped(dit, row)
    exported = [replace(branch, runner=runner_of(cast("Exported", None), None)) for branch in loop.forwards]
    for policy in (OFTEN, TEACACHES["decay"]):
        with pytest.raises(InputError, match=r"exported engine .* use --backend torch"):
            skip(dit, replace(loop, forwards=exported), state(), by(policy))


def test_an_edit_by_teacache() -> None:
    engine = Engine.load(device="cpu", cache=False)
    result = engine.edit(
        photograph(64, 64), "make it darker", seed=1, size=64, steps=8, guidance=2.0, policy=TEACACHES["alone"]
    )
    assert "s" in str(result.metadata["plan"])


def test_buckets_are_a_sixteenth_but_not_too_small() -> None:
    assert [bucket(grid) for grid in ((64, 64), (32, 48), (16, 16), (8, 8), (1, 1))] == [256, 96, 16, 16, 16]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_region_is_told_by_the_end_that_a_step_points_to(row: Variant) -> None:
    """What is compared with the reference is the latents at level 0, were the step one of the whole way."""
    dit = transformer(row)
    seen: list[Tensor] = []

    def select(estimate: Tensor, reference: Tensor) -> Selection:
        seen.append(estimate)
        return SELECT(estimate, reference)

    loop = looped(dit, row)
    done = skip(dit, loop, state(), Skipping(policy=regione(), select=select))
    at = next(index for index, step in enumerate(done.steps) if step.jump is not None)
    to_the_end = torch.cat((loop.schedule[: at + 1], torch.zeros(1)))
    expected = denoise(dit, replace(loop, schedule=to_the_end), state())
    assert len(seen) == 1
    assert error(seen[0], expected) < 1e-9


@pytest.mark.parametrize(
    ("grid", "tokens"), [((64, 64), 256), ((48, 64), 192), ((32, 32), 64), ((8, 8), 16), ((4, 6), 16)]
)
def test_a_bucket_is_a_sixteenth_of_the_picture(grid: tuple[int, int], tokens: int) -> None:
    assert bucket(grid) == tokens
