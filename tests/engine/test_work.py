"""FLOPs in closed form: against the counter, and against the tables of step-skipping.md §6.5."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from step1x.engine import released
from step1x.engine.dit import DiT, Text
from step1x.engine.image import Canvas, image_ids
from step1x.engine.plan import Guide, Mode, StepPlan
from step1x.engine.policy import CfgReuse, Policy, RefFreeze, StepMask, Together, regione
from step1x.engine.schedule import timesteps
from step1x.engine.work import Rows, flops, forward, speedup
from step1x.training.recipe import dit_config

RELEASED = released.dit_config("v1.1")
TOKENS = {512: 1024, 768: 2304, 1024: 4096}
SHARES = (0, 0.10, 0.25, 0.50, 0.75, 1.0)
SMALL = dit_config(96, 2, 3, 56)


def rows(side: int, share: float = 1.0) -> Rows:
    tokens = TOKENS[side]
    return Rows(text=640, target=tokens, reference=tokens, active=round(share * tokens))


@pytest.mark.parametrize("prune", [True, False])
def test_full_step_as_counted(prune: bool) -> None:
    canvas, texts = Canvas(80, 48), 21
    sizes = Rows(text=texts, target=canvas.tokens, reference=canvas.tokens, active=3)
    with torch.device("meta"), torch.no_grad():
        model = DiT(SMALL)
        rope = model.rope(torch.zeros(1, texts, 3), image_ids(canvas.grid, (1, 1, 1)).to("meta"))
        request = model.prepare(Text(torch.zeros(1, texts, 56), torch.ones(1, texts, dtype=torch.long)))
        step = model.condition(request, torch.zeros(1))
        tokens = torch.zeros(1, 2 * canvas.tokens, 64)
        with FlopCounterMode(display=False) as counter:
            model.velocity(tokens, step, rope, canvas.tokens if prune else None)
    assert counter.get_total_flops() == forward(SMALL, sizes, Mode.FULL, prune)


@pytest.mark.parametrize(("side", "teraflops"), [(512, 39.8), (768, 87.0), (1024, 168.7)])
def test_full_step_of_the_reference(side: int, teraflops: float) -> None:
    assert forward(RELEASED, rows(side), Mode.FULL, prune=False) == pytest.approx(teraflops * 1e12, rel=1e-3)


@pytest.mark.parametrize(
    ("share", "wanted"), list(zip(SHARES, (0.072, 0.119, 0.188, 0.304, 0.420, 0.536), strict=True))
)
def test_share_of_a_region_step(share: float, wanted: float) -> None:
    sizes = rows(1024, share)
    assert sizes.share(Mode.REGION) == pytest.approx(wanted, abs=6e-4)
    full = forward(RELEASED, sizes, Mode.FULL, prune=False)
    assert forward(RELEASED, sizes, Mode.REGION, prune=False) / full == pytest.approx(
        sizes.share(Mode.REGION), rel=1e-3
    )


def test_shares_of_the_other_steps() -> None:
    sizes = rows(1024, 0.25)
    assert sizes.share(Mode.FULL) == 1
    assert sizes.share(Mode.NOISE) == rows(1024, 1.0).share(Mode.REGION)
    assert sizes.share(Mode.SKIP) == 0
    assert forward(RELEASED, sizes, Mode.SKIP) == 0
    assert forward(RELEASED, sizes, Mode.NOISE) == forward(RELEASED, rows(1024, 1.0), Mode.REGION)


@pytest.mark.parametrize(
    ("threshold", "side", "wanted"),
    [
        (0.02, 1024, (2.99, 2.92, 2.82, 2.66, 2.52, 2.40)),
        (0.02, 768, (2.88, 2.80, 2.69, 2.53, 2.39, 2.26)),
        (0.02, 512, (2.68, 2.63, 2.55, 2.42, 2.31, 2.20)),
        (0.0, 1024, (2.70, 2.49, 2.23, 1.89, 1.65, 1.46)),
        (0.0, 768, (2.47, 2.30, 2.09, 1.81, 1.59, 1.42)),
        (0.0, 512, (2.07, 1.97, 1.83, 1.63, 1.48, 1.35)),
    ],
)
def test_speed_ups_of_regione(threshold: float, side: int, wanted: tuple[float, ...]) -> None:
    plan = regione(threshold=threshold).plan(timesteps(28, TOKENS[side]).tolist(), True)
    made = [speedup(plan, RELEASED, rows(side, share), prune=False) for share in SHARES]
    assert made == pytest.approx(wanted, abs=0.0061)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ((), (2.92, 2.82, 2.66, 2.40)),  # A
        ((RefFreeze(),), (4.11, 3.91, 3.62, 3.15)),  # B
        ((CfgReuse(last=2),), (3.01, 2.96, 2.87, 2.71)),  # C
        ((CfgReuse(),), (3.37, 3.31, 3.20, 3.00)),  # D
        ((RefFreeze(), CfgReuse()), (4.68, 4.55, 4.35, 3.99)),  # E
    ],
)
def test_speed_ups_beyond_regione(parts: tuple[Policy, ...], wanted: tuple[float, ...]) -> None:
    plan = Together((regione(), *parts)).plan(timesteps(28, 4096).tolist(), True)
    made = [speedup(plan, RELEASED, rows(1024, share), prune=False) for share in (0.10, 0.25, 0.50, 1.0)]
    assert made == pytest.approx(wanted, abs=0.0061)


def test_pruning_moves_no_speed_up_by_more_than_half_a_percent() -> None:
    plan = Together((regione(), RefFreeze(), CfgReuse())).plan(timesteps(28, 1024).tolist(), True)
    for share in SHARES:
        plain, pruned = (speedup(plan, RELEASED, rows(512, share), prune=prune) for prune in (False, True))
        assert pruned == pytest.approx(plain, rel=5e-3)
        assert flops(plan, RELEASED, rows(512, share)) < flops(plan, RELEASED, rows(512, share), prune=False)


def test_half_the_steps_are_half_the_work() -> None:
    plan = StepMask(every=2).plan(timesteps(28, 4096).tolist(), False)
    assert speedup(plan, RELEASED, rows(1024)) == pytest.approx(2, rel=1e-4)
    assert speedup(plan, RELEASED, rows(1024), guided=False) == pytest.approx(2, rel=1e-4)


def test_branches_and_batch() -> None:
    sizes = rows(512)
    one = forward(RELEASED, sizes, Mode.FULL)
    plan = [StepPlan(Mode.FULL), StepPlan(Mode.FULL, guide=Guide.REUSE), StepPlan(Mode.FULL, guide=Guide.COND)]
    assert flops(plan, RELEASED, sizes) == 4 * one
    assert flops(plan, RELEASED, sizes, guided=False) == 3 * one
    assert flops(plan, RELEASED, sizes, batch=3) == 3 * 4 * one
