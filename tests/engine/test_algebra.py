"""Every exact rewrite against the plain path in float64, and all together; hypothesis over lengths and batches."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.bench.pretend import Pretend
from step1x.engine.algebra import OFF, ON, collapse, fold, spread
from step1x.engine.connector import ConnectorConfig
from step1x.engine.denoise import Guidance, Loop, Runner, branches, denoise, joined
from step1x.engine.dit import DiT, DiTConfig, Text, is_modulation
from step1x.engine.fused import Fused
from step1x.engine.image import image_ids
from step1x.engine.schedule import timesteps
from step1x.engine.text import Conditioning
from step1x.engine.variants import VARIANTS, Variant
from step1x.kernels.cfg_step import cfg_step

CONFIG = DiTConfig(
    in_channels=8,
    out_channels=8,
    hidden_size=32,
    heads=2,
    depth=2,
    depth_single=2,
    mlp_hidden=48,
    context_channels=20,
    pooled_channels=9,
    timestep_channels=16,
    rope_axes=(4, 6, 6),
    rope_theta=10000.0,
    connector=ConnectorConfig(
        in_channels=12,
        hidden_size=20,
        heads=2,
        depth=2,
        mlp_hidden=24,
        timestep_channels=16,
        pooled_channels=9,
        has_scale_factor=False,
    ),
    text_token_mapping=False,
)
GRID = (2, 3)
TARGET = GRID[0] * GRID[1]
PADDED = [row for row in VARIANTS.values() if row.pad_text]


def transformer(row: Variant | None = None) -> DiT:
    torch.manual_seed(7)
    model = DiT(CONFIG, row is None or row.dtype_flow != "pure").double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.normal_(std=0.3)  # large enough for softmax to be far from uniform
    return model


def random(*shape: int, seed: int = 8) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def instruction(rows: int, valid: int, seed: int) -> Conditioning:
    """Padded as text.py pads: zeros, mask zero."""
    tokens = random(1, rows, 12, seed=seed)
    tokens[:, valid:] = 0
    return Conditioning(Text(tokens, (torch.arange(rows) < valid).long()[None]), torch.zeros(1, rows, 3), valid)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def velocity(dit: DiT, conditionings: list[Conditioning]) -> Tensor:
    text, ids = joined(conditionings)
    rope = dit.rope(ids, image_ids(GRID, (1, 1, 1)).expand(len(ids), -1, -1))
    batch = len(conditionings)
    return dit(random(batch, 2 * TARGET, 8, seed=9), text, random(batch, seed=3).sigmoid(), rope)


@given(
    st.integers(2, 30),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.sampled_from([1, 4, 16]),
)
@settings(max_examples=60, deadline=None)
def test_collapsed_padding(rows: int, valid: list[int], multiple: int) -> None:
    given_ = [instruction(rows, min(count, rows), seed) for seed, count in enumerate(valid)]
    cut = collapse(given_, multiple)
    shorter = cut[0].text.tokens.shape[1]
    assert shorter == min(rows, -(-(max(one.valid or 0 for one in given_) + 2) // multiple) * multiple)
    dit = transformer()
    assert error(velocity(dit, cut), velocity(dit, given_)) < 1e-12


@given(st.integers(2, 640), st.integers(2, 64))
def test_biases_add_up_in_every_dtype(copies: int, rows: int) -> None:
    rows = min(rows, copies)
    biases = torch.tensor(spread(copies, rows), dtype=torch.float64)
    assert len(biases) == rows
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 5e-4)):
        assert abs(float(biases.to(dtype).double().exp().sum()) / copies - 1) < bound


def test_plain_trimming_is_wrong() -> None:
    given_ = [instruction(20, 5, 0)]
    (cut,) = collapse(given_)
    trimmed = Conditioning(replace(cut.text, bias=None), cut.ids, cut.valid)
    dit = transformer()
    assert error(velocity(dit, [trimmed]), velocity(dit, given_)) > 1e-3


def test_unknown_validity_is_left_alone() -> None:
    one = replace(instruction(20, 5, 0), valid=None)
    assert collapse([one]) == [one]


@pytest.mark.parametrize("count", [1, 3, 20])
def test_folded_steps(count: int) -> None:
    dit = transformer()
    requests = [dit.prepare(joined([instruction(9, 5, 0), instruction(9, 3, 1)])[0])]
    requests.append(dit.prepare(joined([instruction(7, 2, 4)])[0]))
    times = [time[None] for time in random(count, seed=2).sigmoid()]
    folded = [step for steps in fold(dit, requests, times) for step in steps]
    plain = [dit.condition(request, time.expand(request.rows)) for request in requests for time in times]
    for got, wanted in zip(folded, plain, strict=True):
        pairs = [(got.text, wanted.text), (got.mods.final, wanted.mods.final)]
        pairs += zip(got.mods.single, wanted.mods.single, strict=True)
        for ours, theirs in zip(got.mods.double, wanted.mods.double, strict=True):
            pairs += list(zip(ours, theirs, strict=True))
        assert max(error(a, b) for a, b in pairs) < 1e-12


@pytest.mark.parametrize("kept", [1, TARGET, 2 * TARGET])
def test_pruned_output(kept: int) -> None:
    dit = transformer()
    text, ids = joined(collapse([instruction(9, 5, 0), instruction(9, 3, 1)]))
    rope = dit.rope(ids, image_ids(GRID, (1, 1, 1)).expand(2, -1, -1))
    step = dit.condition(dit.prepare(text), torch.tensor([0.3, 0.8], dtype=torch.float64))
    tokens = random(2, 2 * TARGET, 8, seed=9)
    assert error(dit.velocity(tokens, step, rope, kept), dit.velocity(tokens, step, rope)[:, :kept]) < 1e-12


REWRITES = {
    **{name: replace(OFF, **{name: True}) for name in ("collapse", "fold", "prune", "fuse")},
    "all": ON,
}


@pytest.mark.parametrize("name", REWRITES)
def test_each_over_a_trajectory(name: str) -> None:
    """Six guided steps of two pictures, by every padding preset, branches batched and not; prints the worst error."""
    algebra, worst = REWRITES[name], 0.0
    groups = [[instruction(40, 11, 0), instruction(40, 7, 1)], [instruction(40, 3, 2), instruction(40, 4, 3)]]
    state = (random(2, TARGET, 8, seed=1), random(2, TARGET, 8, seed=2))
    for row in PADDED:
        dit, guidance = transformer(row), Guidance(3.0, row.rescale_above)
        ids, schedule = image_ids(GRID, row.reference_ids), timesteps(6, 1024)
        plain = denoise(dit, Loop(branches(dit, groups, ids, True, OFF), schedule, guidance, row, algebra=OFF), state)
        runner = Runner(Fused(dit).velocity, cfg_step) if algebra.fuse else None
        for batched in (True, False):
            made = branches(dit, groups, ids, batched, algebra, runner)
            assert (made[0].request.text.rows.shape[1] == 40) is not algebra.collapse
            worst = max(worst, error(denoise(dit, Loop(made, schedule, guidance, row, algebra=algebra), state), plain))
    print(f"{name}: {worst:.1e}")
    assert worst < (1e-11 if name == "all" else 1e-12)


@pytest.mark.parametrize("batched", [True, False])
def test_modulations_in_host_memory_are_copied_once_an_edit(batched: bool) -> None:
    """On the pretended accelerator, which refuses operands in two places."""
    row = VARIANTS["official-v1.1"]
    dit = transformer(row)
    groups = [[instruction(40, 11, 0)], [instruction(40, 3, 2)]]
    state = (random(1, TARGET, 8, seed=1), random(1, TARGET, 8, seed=2))
    pretend, size, parameters = Pretend(), 0, 0
    for name, parameter in dit.named_parameters():
        if is_modulation(name):
            size += parameter.numel() * parameter.element_size()
            parameters += parameter.numel()
        else:
            pretend.mark(parameter)
    for group in groups:
        for one in (group[0].text.tokens, group[0].text.mask):
            pretend.mark(one)
    for one in state:
        pretend.mark(one)
    width = CONFIG.hidden_size
    assert parameters == (width + 1) * width * (12 * CONFIG.depth + 3 * CONFIG.depth_single + 2)
    guidance = Guidance(3.0, row.rescale_above)
    with pretend:
        made = branches(dit, groups, image_ids(GRID, row.reference_ids), batched)
        before = pretend.to_device.total()
        pretend.stage("loop")
        denoise(dit, Loop(made, timesteps(6, 1024), guidance, row), state)
    assert size <= pretend.to_device["loop"] < size + 200  # and the six times of the schedule
    assert before < 10_000
