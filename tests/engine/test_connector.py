"""The connector on small random weights: who sees whom, what the mean is over, what is constant over steps."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.engine.connector import Connector, ConnectorConfig, sinusoid, visible_pairs, wide

SMALL = ConnectorConfig(
    in_channels=12,
    hidden_size=20,
    heads=2,
    depth=2,
    mlp_hidden=24,
    timestep_channels=16,
    pooled_channels=9,
    has_scale_factor=False,
)


def connector(config: ConnectorConfig = SMALL, dtype: torch.dtype = torch.float32) -> Connector:
    torch.manual_seed(5)
    return Connector(config).to(dtype).requires_grad_(False)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return random(batch, length, SMALL.in_channels)


def mask(*valid: int, length: int = 7) -> Tensor:
    """Row i has `valid[i]` leading valid tokens."""
    return (torch.arange(length) < torch.tensor(valid)[:, None]).long()


def test_visible_pairs() -> None:
    seen = visible_pairs(torch.tensor([[1, 1, 0], [0, 1, 1]]))
    assert seen.shape == (2, 1, 3, 3)
    assert seen[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert seen[1, 0].int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]


def test_padding_reaches_neither_valid_rows_nor_the_pooled_vector() -> None:
    model, text, t = connector(), tokens(), torch.tensor([0.3, 0.8])
    changed = text.clone()
    changed[0, 4:] = 50.0
    changed[1, 1:] = -50.0
    one, other = (model.prepare(rows, mask(4, 1)) for rows in (text, changed))
    torch.testing.assert_close(one.pooled, other.pooled)
    torch.testing.assert_close(one.context, other.context)
    a, b = model(one, t), model(other, t)
    torch.testing.assert_close(a[0, :4], b[0, :4])
    torch.testing.assert_close(a[1, :1], b[1, :1])
    assert (a[0, 4:] - b[0, 4:]).abs().min() > 1e-3  # padded rows carry their own content on


def test_valid_rows_are_those_of_the_text_without_padding() -> None:
    model, text, t = connector(), tokens(1), torch.tensor([0.4])
    padded = model.prepare(text, mask(5))
    cut = model.prepare(text[:, :5], mask(5, length=5))
    torch.testing.assert_close(model(padded, t)[:, :5], model(cut, t))
    torch.testing.assert_close(padded.pooled, cut.pooled)


def test_all_valid_mask_is_plain_attention() -> None:
    model, text, t = connector(), tokens(), torch.tensor([0.9, 0.1])
    prepared = model.prepare(text, torch.ones(2, 7, dtype=torch.long))
    assert prepared.visible.all()
    torch.testing.assert_close(prepared.pooled, model.global_proj_out(text.mean(1)))
    # without an order of positions, the rows of a shuffled text are the shuffled rows
    order = torch.tensor([3, 0, 6, 5, 1, 2, 4])
    shuffled = model.prepare(text[:, order], torch.ones(2, 7, dtype=torch.long))
    torch.testing.assert_close(model(shuffled, t), model(prepared, t)[:, order])


def test_one_valid_token() -> None:
    model, text, t = connector(), tokens(1), torch.tensor([0.5])
    prepared = model.prepare(text, mask(1))
    torch.testing.assert_close(prepared.pooled, model.global_proj_out(text[:, 0]))
    rows = model(prepared, t)
    assert rows.isfinite().all()
    alone = model(model.prepare(text[:, :1], mask(1, length=1)), t)
    torch.testing.assert_close(rows[:, :1], alone)


def test_masks_of_integers_and_booleans_are_one() -> None:
    model, t = connector(), torch.tensor([0.5, 0.5])
    integers, booleans = (model.prepare(tokens(), valid) for valid in (mask(3, 7), mask(3, 7).bool()))
    assert torch.equal(integers.pooled, booleans.pooled)
    assert torch.equal(model(integers, t), model(booleans, t))


def test_scale_factor_scales_the_pooled_mean_alone() -> None:
    model = connector(replace(SMALL, has_scale_factor=True))
    text, valid = tokens(), mask(3, 7)
    assert model.scale_factor.shape == (1,)
    model.scale_factor.fill_(-1.0)
    gone = model.prepare(text, valid)
    torch.testing.assert_close(gone.pooled, model.global_proj_out.bias.expand(2, -1))
    model.scale_factor.fill_(0.0)
    plain = model.prepare(text, valid)
    model.scale_factor.fill_(0.5)
    half_more = model.prepare(text, valid)
    bias = model.global_proj_out.bias
    torch.testing.assert_close(half_more.pooled - bias, 1.5 * (plain.pooled - bias))
    for one in (gone, half_more):
        torch.testing.assert_close(one.context, plain.context)
    assert "scale_factor" not in connector().state_dict()


def test_rows_depend_on_the_timestep_of_their_own_batch_row() -> None:
    model, text, valid = connector(), tokens(), mask(3, 7)
    prepared = model.prepare(text, valid)
    both = model(prepared, torch.tensor([0.2, 0.7]))
    for t, index in ((0.2, 0), (0.7, 1)):
        one = slice(index, index + 1)
        alone = model(model.prepare(text[one], valid[one]), torch.tensor([t]))
        torch.testing.assert_close(both[one], alone)
    assert not torch.allclose(both, model(prepared, torch.tensor([0.7, 0.2])))


def test_prepared_attention_is_the_one_of_the_first_block() -> None:
    model, t = connector(), torch.tensor([0.2, 0.7])
    prepared = model.prepare(tokens(), mask(3, 7))
    torch.testing.assert_close(model(replace(prepared, attention=None), t), model(prepared, t))


def test_no_blocks() -> None:
    model = connector(replace(SMALL, depth=0))
    prepared = model.prepare(tokens(), mask(3, 7))
    assert prepared.attention is None
    torch.testing.assert_close(model(prepared, torch.tensor([0.1, 0.2])), prepared.rows)


@pytest.mark.parametrize("heads", [1, 4, 20])
def test_any_number_of_heads(heads: int) -> None:
    model = connector(replace(SMALL, heads=heads))
    block = model.S.individual_token_refiner.blocks[0]
    rows = random(3, 7, 20)
    visible = visible_pairs(mask(3, 7, 1))
    q, k, v = block.self_attn_qkv(block.norm1(rows)).split(20, dim=-1)
    outputs = []
    for columns in torch.arange(20).split(20 // heads):
        scores = q[..., columns] @ k[..., columns].mT / (20 // heads) ** 0.5
        weights = scores.masked_fill(~visible[:, 0], -torch.inf).softmax(-1)
        outputs.append(weights @ v[..., columns])
    wanted = block.self_attn_proj(torch.cat(outputs, dim=-1))
    torch.testing.assert_close(block.attention(rows, visible), wanted)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="connector width 20 is no multiple of its 3 heads"):
        replace(SMALL, heads=3)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float32, 1e-5), (torch.float64, 0.0)])
def test_dtypes(dtype: torch.dtype, bound: float) -> None:
    text, valid, t = tokens(), mask(3, 7), torch.tensor([0.25, 0.5])
    exact, model = connector(dtype=torch.float64), connector(dtype=dtype)
    wanted = exact(exact.prepare(text.double(), valid), t.double())
    prepared = model.prepare(text.to(dtype), valid)
    got = model(prepared, t.to(dtype))
    assert {got.dtype, prepared.pooled.dtype, prepared.context.dtype} == {dtype}
    assert (got.double() - wanted).abs().max() <= bound * wanted.abs().max()


def test_mean_of_many_half_precision_tokens() -> None:
    model = connector(dtype=torch.bfloat16)
    text = torch.ones(1, 640, SMALL.in_channels, dtype=torch.bfloat16)
    text[:, 500:] = 7.0
    pooled = model.prepare(text, mask(500, length=640)).pooled
    torch.testing.assert_close(pooled, model.global_proj_out(text[:, 0]))


def test_sinusoid() -> None:
    got = sinusoid(torch.tensor([0.0, 1.0, 1000.0]), 8)
    assert got.shape == (3, 8)
    assert got[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(got[1], torch.cat((frequencies.cos(), frequencies.sin())))
    assert sinusoid(torch.tensor([1.0], dtype=torch.bfloat16)).dtype == torch.float32
    assert sinusoid(torch.tensor([1.0], dtype=torch.float64)).dtype == torch.float64


def test_wide() -> None:
    for dtype, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert wide(torch.ones(1, dtype=dtype)).dtype == wanted


def test_gates_close_the_refiner() -> None:
    """With gates of zero only the input rows are left; SiLU(c) scales nothing else."""
    model = connector()
    for block in model.S.individual_token_refiner.blocks:
        block.adaLN_modulation[1].weight.zero_()
        block.adaLN_modulation[1].bias.zero_()
    text = tokens()
    rows = model(model.prepare(text, mask(3, 7)), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(rows, F.linear(text, model.S.input_embedder.weight, model.S.input_embedder.bias))
