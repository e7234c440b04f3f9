"""The transformer on small random weights: shapes and dtypes, batches, what a token sees, rotary positions."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.engine.connector import ConnectorConfig
from step1x.engine.dit import DiT, DiTConfig, RMSNorm, Text, apply_rope, modulate, rope_tables
from step1x.engine.image import image_ids
from step1x.quant.linear import quantise_layers
from step1x.quant.schemes import Scheme

CONNECTOR = ConnectorConfig(
    in_channels=12,
    hidden_size=20,
    heads=2,
    depth=1,
    mlp_hidden=24,
    timestep_channels=16,
    pooled_channels=9,
    has_scale_factor=False,
)
SMALL = DiTConfig(
    in_channels=8,
    out_channels=6,
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
    connector=CONNECTOR,
    text_token_mapping=False,
)
GRID, LENGTH = (2, 3), 5
COUNT = 2 * GRID[0] * GRID[1]


def transformer(config: DiTConfig = SMALL, dtype: torch.dtype = torch.float32, fp32_norms: bool = True) -> DiT:
    torch.manual_seed(7)
    return DiT(config, fp32_norms).to(dtype).requires_grad_(False)


def random(*shape: int, seed: int = 8) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(batch: int = 1) -> Text:
    valid = torch.arange(LENGTH) < torch.tensor([3, 5, 1])[:batch, None]
    return Text(random(batch, LENGTH, 12), valid.long())


def ids() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, LENGTH, 3), image_ids(GRID, (1, 1, 1))


def velocity(dit: DiT, batch: int = 1) -> Tensor:
    dtype = dit.dtype
    timestep = torch.tensor([0.9, 0.4, 0.1])[:batch].to(dtype)
    return dit(random(batch, COUNT, 8, seed=9).to(dtype), text(batch), timestep, dit.rope(*ids()))


@pytest.mark.parametrize("fp32_norms", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.08), (torch.float32, 1e-5), (torch.float64, 1e-14)])
def test_dtypes(dtype: torch.dtype, bound: float, fp32_norms: bool) -> None:
    got = velocity(transformer(dtype=dtype, fp32_norms=fp32_norms), 2)
    wanted = velocity(transformer(dtype=torch.float64), 2)
    assert (got.dtype, got.shape) == (dtype, (2, COUNT, 6))
    assert (got.double() - wanted).abs().max() <= bound * wanted.abs().max()


def test_norms_of_half_precision_round_once_or_at_each_operation() -> None:
    x, shift, scale = (random(1, rows, 32, seed=rows).bfloat16() for rows in (40, 1, 1))
    # 1 + scale is an operation of its own in both flows: autocast leaves additions in bf16 (§3.14)
    exact = (1 + scale).double() * F.layer_norm(x.double(), (32,), eps=1e-6) + shift.double()
    once, often = (modulate(x, shift, scale, fp32) for fp32 in (True, False))
    assert once.dtype == often.dtype == torch.bfloat16
    assert torch.equal(once, exact.bfloat16())
    assert (often - exact).abs().sum() > 1.3 * (once - exact).abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_flows_agree_in_full_precision(dtype: torch.dtype) -> None:
    one, other = (velocity(transformer(dtype=dtype, fp32_norms=flow), 2) for flow in (True, False))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "axes"), [(1, (8, 12, 12)), (2, (4, 6, 6)), (4, (2, 2, 4)), (8, (0, 2, 2)), (16, (2, 0, 0))]
)
def test_any_head_width(heads: int, axes: tuple[int, ...]) -> None:
    config = replace(SMALL, heads=heads, rope_axes=axes)
    assert config.head_dim == 32 // heads
    assert velocity(transformer(config), 2).isfinite().all()


@pytest.mark.parametrize(("depth", "depth_single"), [(0, 0), (1, 0), (0, 1), (3, 4)])
def test_any_depth(depth: int, depth_single: int) -> None:
    config = replace(SMALL, depth=depth, depth_single=depth_single)
    assert velocity(transformer(config)).shape == (1, COUNT, 6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"heads": 3}, "width 32 is no multiple of 3 heads"),
        ({"rope_axes": (4, 6, 4)}, r"rope axes \(4, 6, 4\) must be even and add up to head_dim 16"),
        ({"rope_axes": (5, 5, 6)}, r"rope axes \(5, 5, 6\) must be even"),
    ],
)
def test_impossible_sizes(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_is_its_rows(batch: int) -> None:
    dit, together = transformer(), velocity(transformer(), batch)
    for index in range(batch):
        one, whole = slice(index, index + 1), text(batch)
        alone = dit(
            random(batch, COUNT, 8, seed=9)[one],
            Text(whole.tokens[one], whole.mask[one]),
            torch.tensor([0.9, 0.4, 0.1])[one],
            dit.rope(*ids()),
        )
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-5)


def test_ids_of_each_row_are_its_own() -> None:
    dit, text_ids, picture_ids = transformer(), *ids()
    shifted = picture_ids + torch.tensor([0.0, 5.0, 0.0])
    both = dit.rope(text_ids.expand(2, -1, -1), torch.cat((picture_ids, shifted)))
    whole = text(1)
    pair = Text(whole.tokens.expand(2, -1, -1), whole.mask.expand(2, -1))
    tokens, t = random(1, COUNT, 8, seed=9), torch.tensor([0.5])
    got = dit(tokens.expand(2, -1, -1), pair, t.expand(2), both)
    for index, one in enumerate((picture_ids, shifted)):
        torch.testing.assert_close(
            got[index : index + 1], dit(tokens, whole, t, dit.rope(text_ids, one)), atol=1e-5, rtol=1e-5
        )
    assert not torch.allclose(got[0], got[1], atol=1e-4)


def test_the_parts_make_the_whole() -> None:
    dit, rope, t = transformer(), transformer().rope(*ids()), torch.tensor([0.9, 0.4])
    request = dit.prepare(text(2))
    step = dit.condition(request, t)
    rows = dit.transform(dit.img_in(random(2, COUNT, 8, seed=9)), step, rope)
    assert torch.equal(dit.final_layer(rows, step.mods.final), velocity(dit, 2))
    assert len(step.mods.double) == len(step.mods.single) == 2
    assert step.text.shape == (2, LENGTH, 32)
    assert step.mods.final.shape == (2, 1, 64)


def test_padded_text_takes_part_in_attention() -> None:
    """The connector masks the padding, the blocks do not (§2, §3.2)."""
    dit, whole = transformer(), text(1)
    changed = Text(whole.tokens.clone(), whole.mask)
    changed.tokens[:, 3:] = 9.0
    one, other = dit.prepare(whole), dit.prepare(changed)
    torch.testing.assert_close(one.text.pooled, other.text.pooled)
    t = torch.tensor([0.5])
    rows, other_rows = dit.condition(one, t).text, dit.condition(other, t).text
    torch.testing.assert_close(rows[:, :3], other_rows[:, :3])
    tokens, rope = random(1, COUNT, 8, seed=9), dit.rope(*ids())
    difference = dit(tokens, whole, t, rope) - dit(tokens, changed, t, rope)
    assert difference.abs().max() > 1e-3


def test_image_tokens_have_no_order_but_their_ids() -> None:
    dit, (text_ids, picture_ids) = transformer(), ids()
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    tokens, t = random(1, COUNT, 8, seed=9), torch.tensor([0.5])
    plain = dit(tokens, text(1), t, dit.rope(text_ids, picture_ids))
    shuffled = dit(tokens[:, order], text(1), t, dit.rope(text_ids, picture_ids[:, order]))
    torch.testing.assert_close(shuffled, plain[:, order], atol=1e-5, rtol=1e-5)
    moved = dit(tokens[:, order], text(1), t, dit.rope(text_ids, picture_ids))
    assert not torch.allclose(moved, plain[:, order], atol=1e-3)


def test_token_mapping_adds_to_quoted_rows() -> None:
    dit, plain = transformer(replace(SMALL, text_token_mapping=True)), transformer()
    plain.load_state_dict({key: value for key, value in dit.state_dict().items() if "mapping" not in key})
    whole, embeds, t = text(1), random(1, LENGTH, 12, seed=4), torch.tensor([0.5])
    wanted = plain.condition(plain.prepare(whole), t).text
    for quoted in (torch.zeros(1, LENGTH), torch.tensor([[0, 1, 0, 0, 1]])):
        given = Text(whole.tokens, whole.mask, embeds, quoted)
        changed = (dit.condition(dit.prepare(given), t).text - wanted).abs().amax(-1)[0] > 1e-4
        assert changed.tolist() == quoted[0].bool().tolist()


@pytest.mark.parametrize("missing", ["embeds", "quoted"])
def test_token_mapping_needs_embeddings(missing: str) -> None:
    dit, whole = transformer(replace(SMALL, text_token_mapping=True)), text(1)
    given = Text(whole.tokens, whole.mask, random(1, LENGTH, 12), torch.ones(1, LENGTH))
    with pytest.raises(ValueError, match="embeds and quoted are needed"):
        dit.prepare(replace(given, **{missing: None}))


def test_rope_at_the_origin_changes_nothing() -> None:
    x = random(2, 3, 4, 16)
    assert torch.equal(apply_rope(x, rope_tables(torch.zeros(1, 4, 3), (4, 6, 6), 10000.0)), x)


@settings(deadline=None, max_examples=40)
@given(
    here=st.tuples(*[st.floats(-300, 300)] * 3),
    there=st.tuples(*[st.floats(-300, 300)] * 3),
    move=st.tuples(*[st.floats(-300, 300)] * 3),
)
def test_rope_turns_by_distance(here: tuple[float, ...], there: tuple[float, ...], move: tuple[float, ...]) -> None:
    """Lengths stay, and products of rotated rows depend on where they are to each other alone."""
    q, k = random(1, 1, 1, 16, seed=1).double(), random(1, 1, 1, 16, seed=2).double()

    def rotated(x: Tensor, at: Tensor) -> Tensor:
        return apply_rope(x, rope_tables(at[None, None], (4, 6, 6), 10000.0, torch.float64))

    a, b, by = (torch.tensor(place, dtype=torch.float64) for place in (here, there, move))
    torch.testing.assert_close(rotated(q, a).norm(), q.norm())
    product = (rotated(q, a) * rotated(k, b)).sum()
    torch.testing.assert_close((rotated(q, a + by) * rotated(k, b + by)).sum(), product)


def test_rope_pairs_adjacent_channels_axis_by_axis() -> None:
    x = torch.zeros(1, 1, 1, 8)
    x[..., 0::2] = 1.0
    cos, sin = rope_tables(torch.tensor([[[1.0, 2.0, 3.0]]]), (2, 2, 4), 100.0)
    assert cos.shape == (1, 1, 1, 4)
    got = apply_rope(x, (cos, sin)).flatten()
    angles = torch.tensor([1.0, 2.0, 3.0, 0.3])  # the third axis has two frequencies: 1 and 100^(-1/2)
    torch.testing.assert_close(got[0::2], angles.cos())
    torch.testing.assert_close(got[1::2], angles.sin())


def test_rope_keeps_half_precision_and_far_positions_exact() -> None:
    x = random(1, 1, 2, 16).bfloat16()
    far = torch.tensor([[[1.0, 4097.0, 8191.5], [-700.0, 0.0, 0.0]]])
    cos, sin = rope_tables(far, (4, 6, 6), 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    exact = rope_tables(far, (4, 6, 6), 10000.0, torch.float64)
    frequencies = [10000.0 ** (-2 * k / width) for width in (4, 6, 6) for k in range(width // 2)]
    angles = far.double().repeat_interleave(torch.tensor([2, 3, 3]), dim=-1) * torch.tensor(
        frequencies, dtype=torch.float64
    )
    torch.testing.assert_close(exact[0][:, 0], angles.cos(), atol=1e-9, rtol=0)
    torch.testing.assert_close(cos.double(), exact[0], atol=1e-7, rtol=0)
    got = apply_rope(x, (cos, sin))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rope(x.double(), exact).bfloat16())


def test_tables_are_as_wide_as_the_model() -> None:
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert {table.dtype for table in transformer(dtype=dtype).rope(*ids())} == {wanted}


@pytest.mark.parametrize("scheme", ["plain", "fp8", "int8-weight"])
def test_modulations_may_be_quantised_and_elsewhere(small_dit: Callable[..., DiT], scheme: Scheme) -> None:
    """Those on another device are copied for the call, tensor by tensor of their scheme."""
    dit = small_dit(dtype=torch.float32)
    vec = torch.randn(2, dit.config.hidden_size)
    wanted = dit.modulate(vec)
    quantise_layers(dit, "folded", scheme)
    got = dit.modulate(vec)
    bound = 0 if scheme == "plain" else 0.05
    assert float((got.final - wanted.final).norm()) <= bound * float(wanted.final.norm())
    there = dit.modulate(vec.to("meta"))
    assert there.single[0].shape == wanted.single[0].shape
    assert {part.device.type for part in (*there.double[0], *there.single, there.final)} == {"meta"}


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_rows_are_normed_with_their_epsilon(size: float) -> None:
    """Rows as small as the epsilon of 1e-6 are not brought to length 1 by all of it."""
    x = size * torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = RMSNorm(8).double()
    torch.nn.init.uniform_(norm.scale, 0.5, 2)
    for row, found in zip(x.tolist(), norm(x).tolist(), strict=True):
        length = math.sqrt(sum(value * value for value in row) / 8 + 1e-6)
        assert found == pytest.approx(
            [v / length * s for v, s in zip(row, norm.scale.tolist(), strict=True)], rel=1e-12
        )
