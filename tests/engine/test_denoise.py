"""The sampling loop on a small random model: branches, batches, guidance, dtype flows, callbacks."""

import pytest
import torch
from torch import Tensor

from step1x.engine.algebra import OFF
from step1x.engine.connector import ConnectorConfig
from step1x.engine.denoise import Branch, Guidance, Loop, Runner, branches, denoise, joined, velocities
from step1x.engine.dit import DiT, DiTConfig, Request, Step, Text
from step1x.engine.image import image_ids
from step1x.engine.schedule import timesteps
from step1x.engine.text import Conditioning
from step1x.engine.variants import Variant, variant

CONFIG = DiTConfig(
    in_channels=8,
    out_channels=8,
    hidden_size=16,
    heads=2,
    depth=1,
    depth_single=1,
    mlp_hidden=24,
    context_channels=10,
    pooled_channels=9,
    timestep_channels=16,
    rope_axes=(2, 2, 4),
    rope_theta=10000.0,
    connector=ConnectorConfig(
        in_channels=6,
        hidden_size=10,
        heads=2,
        depth=1,
        mlp_hidden=12,
        timestep_channels=16,
        pooled_channels=9,
        has_scale_factor=False,
    ),
    text_token_mapping=False,
)
GRID = (2, 3)
TARGET = 6
OFFICIAL_V10, OFFICIAL_V11, DIFFUSERS = (variant(name) for name in ("official-v1.0", "official-v1.1", "diffusers-v1.1"))
ROWS = [OFFICIAL_V10, OFFICIAL_V11, DIFFUSERS]


class Watched(DiT):
    """Keeps what each evaluation was given."""

    def __init__(self, config: DiTConfig, fp32_norms: bool) -> None:
        super().__init__(config, fp32_norms)
        self.times: list[Tensor] = []
        self.tokens: list[Tensor] = []

    def condition(self, request: Request, timestep: Tensor) -> Step:
        self.times.append(timestep)
        return super().condition(request, timestep)

    def velocity(self, tokens: Tensor, step: Step, rope: tuple[Tensor, Tensor], kept: int | None = None) -> Tensor:
        self.tokens.append(tokens)
        return super().velocity(tokens, step, rope, kept)


def transformer(row: Variant, dtype: torch.dtype = torch.float32) -> Watched:
    torch.manual_seed(11)
    return Watched(CONFIG, row.dtype_flow != "pure").to(dtype).requires_grad_(False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def instruction(seed: int, length: int = 5, valid: int = 4) -> Conditioning:
    mask = (torch.arange(length) < valid).long()[None]
    return Conditioning(Text(random(1, length, 6, seed=seed), mask), torch.zeros(1, length, 3))


def state(batch: int = 1) -> tuple[Tensor, Tensor]:
    return random(batch, TARGET, 8, seed=1), random(batch, TARGET, 8, seed=2)


def forwards(dit: DiT, row: Variant, *groups: list[Conditioning]) -> list[Branch]:
    return branches(dit, groups, image_ids(GRID, row.reference_ids), row.batched_guidance)


def run(
    row: Variant,
    dtype: torch.dtype = torch.float32,
    scale: float = 6.0,
    steps: int = 3,
    schedule: Tensor | None = None,
) -> tuple[Tensor, Watched]:
    """A guided loop over one picture, `steps` of the 28-step schedule by default."""
    dit = transformer(row, dtype)
    made = forwards(dit, row, [instruction(21)], [instruction(22, valid=2)])
    schedule = timesteps(28, 4096)[: steps + 1] if schedule is None else schedule
    return denoise(dit, Loop(made, schedule, Guidance(scale, row.rescale_above), row, algebra=OFF), state()), dit


def test_batched_guidance_equals_one_forward_after_the_other() -> None:
    for row in ROWS:
        together, one = run(row.override({"batched_guidance": True}), steps=6)
        apart, other = run(row.override({"batched_guidance": False}), steps=6)
        assert (len(one.tokens), len(other.tokens)) == (6, 12)
        assert (together - apart).abs().max() <= 1e-5 * apart.abs().max()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_batch_of_two_equals_two_singles(row: Variant) -> None:
    dit, latents = transformer(row), state(2)
    conds, unconds = [instruction(21), instruction(23, valid=3)], [instruction(22), instruction(24, valid=1)]
    schedule, guidance = timesteps(4, 1024), Guidance(6.0, row.rescale_above)
    both = denoise(dit, Loop(forwards(dit, row, conds, unconds), schedule, guidance, row), latents)
    for index in range(2):
        one = slice(index, index + 1)
        single = (latents[0][one], latents[1][one])
        alone = denoise(dit, Loop(forwards(dit, row, conds[one], unconds[one]), schedule, guidance, row), single)
        assert (both[one] - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_without_guidance_there_is_one_forward_and_the_conditional_velocity(row: Variant) -> None:
    dit, schedule = transformer(row), timesteps(4, 1024)
    conditional = forwards(dit, row, [instruction(21)])
    got = denoise(dit, Loop(conditional, schedule, None, row), state())
    assert len(dit.tokens) == 4
    assert {tokens.shape[0] for tokens in dit.tokens} == {1}
    pair = forwards(dit, row, [instruction(21)], [instruction(22)])
    of_one = denoise(dit, Loop(pair, schedule, Guidance(1.0, 1.0), row), state())
    torch.testing.assert_close(got, of_one, atol=1e-5, rtol=1e-5)


def test_guidance_is_rescaled_above_its_gate_only() -> None:
    schedule = timesteps(4, 1024)  # 1, 0.85, 0.65, 0.38, 0
    dit = transformer(OFFICIAL_V11)
    dit.final_layer.linear.weight.mul_(50)  # so that the branches differ by norms above 1
    pair = forwards(dit, OFFICIAL_V11, [instruction(21)], [instruction(22)])

    def end(above: float) -> Tensor:
        return denoise(dit, Loop(pair, schedule, Guidance(6.0, above), OFFICIAL_V11), state())

    assert torch.equal(end(0.86), end(0.99))  # both on the first step alone
    assert not torch.equal(end(0.86), end(0.7))
    assert not torch.equal(end(0.86), end(1.0))
    at_the_gate = schedule[1].item()
    assert torch.equal(end(at_the_gate), end(0.86))  # strictly above


def test_reference_tokens_stay_and_the_callers_tensors_too() -> None:
    dit, (latents, reference) = transformer(OFFICIAL_V10), state()
    before = latents.clone()
    made = forwards(dit, OFFICIAL_V10, [instruction(21)], [instruction(22)])
    denoise(dit, Loop(made, timesteps(3, 1024), Guidance(6.0, 1.0), OFFICIAL_V10), (latents, reference))
    assert torch.equal(latents, before)
    for tokens in dit.tokens:
        assert tokens.shape == (2, 2 * TARGET, CONFIG.in_channels)
        assert torch.equal(tokens[0], tokens[1])
        assert torch.equal(tokens[:1, TARGET:], reference)
    assert not torch.equal(dit.tokens[0][:, :TARGET], dit.tokens[1][:, :TARGET])


def test_text_to_image_has_no_reference() -> None:
    dit, row = transformer(OFFICIAL_V11), OFFICIAL_V11
    made = branches(dit, [[instruction(21)], [instruction(22)]], image_ids(GRID, None), batched=True)
    end = denoise(dit, Loop(made, timesteps(3, 1024), Guidance(6.0, 0.93), row), (state()[0], None))
    assert end.shape == (1, TARGET, 8)
    assert {tokens.shape[1] for tokens in dit.tokens} == {TARGET}


def test_branches_of_different_lengths() -> None:
    row = variant("diffusers-v1.2")
    dit = transformer(row)
    made = forwards(dit, row, [instruction(21, length=7, valid=7)], [instruction(22, length=3, valid=3)])
    assert [branch.request.text.rows.shape[1] for branch in made] == [7, 3]
    end = denoise(dit, Loop(made, timesteps(3, 1024), Guidance(6.0, row.rescale_above), row), state())
    assert end.isfinite().all()


def test_joined_keeps_what_only_v12_has() -> None:
    plain, ids = joined([instruction(21), instruction(22)])
    assert (plain.tokens.shape, plain.mask.shape, ids.shape) == ((2, 5, 6), (2, 5), (2, 5, 3))
    assert plain.embeds is None
    assert plain.quoted is None
    one = Text(random(1, 5, 6, seed=1), torch.ones(1, 5), random(1, 5, 6, seed=2), torch.zeros(1, 5))
    both, _ = joined([Conditioning(one, torch.zeros(1, 5, 3))] * 2)
    assert both.embeds is not None
    assert both.quoted is not None
    assert (both.embeds.shape, both.quoted.shape) == ((2, 5, 6), (2, 5))


def test_velocities_are_those_of_the_target_conditional_first() -> None:
    dit, (latents, reference) = transformer(DIFFUSERS), state()
    tokens, t = torch.cat((latents, reference), dim=1), torch.tensor([0.5])
    pair = forwards(dit, DIFFUSERS, [instruction(21)], [instruction(22)])
    got = velocities(dit, pair, tokens, (0, 1), t)[:, :TARGET]
    assert got.shape == (2, TARGET, 8)
    for index, branch in enumerate(pair):
        alone = dit.velocity(tokens, dit.condition(branch.request, t), branch.rope)[:, :TARGET]
        assert torch.equal(got[index : index + 1], alone)


# §5.4: state after the first and the second step, and the times the model sees, in a bf16 model.
FLOWS = [
    (OFFICIAL_V10, torch.bfloat16, [1.0, 0.98828125, 0.9765625]),
    (OFFICIAL_V11, torch.float32, [1.0, 0.988409, 0.976222]),
    (DIFFUSERS, torch.bfloat16, [1.0, 0.98828125, 0.9765625]),
]


@pytest.mark.parametrize(("row", "dtype", "times"), FLOWS, ids=lambda value: getattr(value, "name", ""))
def test_dtype_flows_of_a_half_precision_model(row: Variant, dtype: torch.dtype, times: list[float]) -> None:
    for steps in (1, 2, 3):
        end, dit = run(row, torch.bfloat16, steps=steps)
        assert end.dtype == dtype
    seen = dit.times[:: len(dit.times) // 3]
    assert [t.dtype for t in seen] == [torch.bfloat16, dtype, dtype]
    assert [t[0].item() for t in seen] == pytest.approx(times, abs=1e-6)


def test_a_state_once_wide_stays_wide() -> None:
    """Of these four steps only the first is rescaled, and makes the state float32 (§5.4)."""
    end, dit = run(OFFICIAL_V11, torch.bfloat16, schedule=timesteps(4, 1024))
    assert [t.dtype for t in dit.times] == [torch.bfloat16] + [torch.float32] * 3
    assert end.dtype == torch.float32


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_keeps_its_dtype(row: Variant, dtype: torch.dtype) -> None:
    end, dit = run(row, dtype)
    assert {end.dtype} == {tokens.dtype for tokens in dit.tokens} == {t.dtype for t in dit.times} == {dtype}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_half_precision_stays_near(row: Variant) -> None:
    exact, single, rounded = (
        run(row, dtype, schedule=timesteps(6, 4096))[0] for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    scale = exact.abs().max()
    assert (single - exact).abs().max() <= 1e-5 * scale
    assert (rounded - exact).abs().max() <= 0.1 * scale


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_constant_velocity_is_followed_exactly(row: Variant, steps: int) -> None:
    """Whatever the schedule, x moves by -v from t = 1 to 0."""
    dit = transformer(row, torch.float64)
    dit.final_layer.linear.weight.zero_()
    pair = forwards(dit, row, [instruction(21)], [instruction(22)])
    latents, reference = state()
    end = denoise(dit, Loop(pair, timesteps(steps, 1024), Guidance(6.0, 1.0), row), (latents, reference))
    torch.testing.assert_close(end, latents - dit.final_layer.linear.bias, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "row",
    [
        OFFICIAL_V10,
        OFFICIAL_V11,
        DIFFUSERS,
    ],
    ids=lambda row: row.name,
)
def test_a_half_precision_step_is_as_long_as_the_schedule_says(row: Variant) -> None:
    """The times are Python floats in the official loop: only the model sees them rounded to bf16."""
    dit = transformer(row, torch.bfloat16)
    dit.final_layer.linear.weight.zero_()
    dit.final_layer.linear.bias.fill_(1.0)
    pair = forwards(dit, row, [instruction(21)], [instruction(22)])
    schedule = timesteps(28, 4096)[:2]  # 1, 0.988409
    end = denoise(dit, Loop(pair, schedule, Guidance(6.0, 1.0), row), (torch.zeros(1, TARGET, 8), state()[1]))
    torch.testing.assert_close(end.float(), torch.full_like(end, -0.011591).float(), rtol=4e-3, atol=0)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_on_step_is_called_after_each_step(row: Variant) -> None:
    dit, calls = transformer(row), []
    pair = forwards(dit, row, [instruction(21)], [instruction(22)])

    def on_step(step: int, steps: int) -> None:
        calls.append((step, steps, len(dit.tokens)))

    denoise(dit, Loop(pair, timesteps(3, 1024), Guidance(6.0, 1.0), row), state(), on_step)
    each = len(pair)
    assert calls == [(1, 3, each), (2, 3, 2 * each), (3, 3, 3 * each)]


def test_an_error_in_on_step_stops_the_loop() -> None:
    dit = transformer(OFFICIAL_V10)
    pair = forwards(dit, OFFICIAL_V10, [instruction(21)], [instruction(22)])

    def on_step(step: int, _steps: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise(dit, Loop(pair, timesteps(5, 1024), Guidance(6.0, 1.0), OFFICIAL_V10), state(), on_step)
    assert len(dit.tokens) == 2


def test_calls_share_nothing() -> None:
    dit = transformer(OFFICIAL_V11)
    pair = forwards(dit, OFFICIAL_V11, [instruction(21)], [instruction(22)])
    ends = [denoise(dit, Loop(pair, timesteps(3, 1024), Guidance(6.0, 0.93), OFFICIAL_V11), state()) for _ in range(2)]
    assert torch.equal(*ends)


def test_a_coarse_velocity_runs_its_stretch_of_the_steps() -> None:
    def exact(*_: object) -> Tensor:
        raise NotImplementedError

    def coarse(*_: object) -> Tensor:
        raise NotImplementedError

    runner = Runner(exact, coarse=coarse, stretch=(0.25, 0.75))
    assert [runner.at(index / 4) for index in range(4)] == [exact, coarse, coarse, exact]
    assert Runner(exact).at(0.5) is exact


@pytest.mark.parametrize(("tokens", "rescaled"), [(1024, 4), (2304, 5), (4096, 6)])
def test_the_gate_of_v11_is_open_for_the_steps_of_the_release(tokens: int, rescaled: int) -> None:
    """Of 28 steps at 512, 768 and 1024 pixels (§5.4)."""
    gate = variant("official-v1.1").rescale_above
    assert int((timesteps(28, tokens)[:-1] > gate).sum()) == rescaled
