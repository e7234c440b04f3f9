"""qk_norm_rope and its scatter: the engine's norm, join and rotation bit for bit, and the kernel against them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step1x.engine.dit import QKNorm, apply_rope
from step1x.kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_op,
    qk_norm_rope_reference,
    qk_norm_rope_scatter,
    qk_norm_rope_scatter_op,
    qk_norm_rope_scatter_reference,
    qk_norm_rope_scatter_triton,
    qk_norm_rope_single_op,
    qk_norm_rope_single_reference,
    qk_norm_rope_triton,
)

CPU = torch.device("cpu")
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is full of NaN: a value that is not written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Up to the order of the sum in the norm."""
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    if found.dtype == HALF:  # a sum may turn one rounding in a thousand, by one step of the larger of two channels
        difference = (found.float() - expected.float()).unflatten(-1, (-1, 2)).abs().amax(-1)
        assert (difference <= 2**-6 * expected.float().unflatten(-1, (-1, 2)).norm(dim=-1)).all()
        assert (found != expected).float().mean() <= 1e-3
    else:
        assert ((found - expected).abs() <= 4e-7 * expected.abs().amax(-1, keepdim=True)).all()


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments whose last two, the caches, may be changed."""
    return *arguments[:-2], arguments[-2].clone(), arguments[-1].clone()


def engines(scales: Tensor) -> QKNorm:
    norm = QKNorm(scales.shape[1]).to(scales.dtype)
    norm.load_state_dict({"query_norm.scale": scales[0], "key_norm.scale": scales[1]})
    return norm


@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE])
def test_reference_is_the_engines(dtype: torch.dtype) -> None:
    for image, text, image_scales, text_scales, cos, sin, heads in qk_norm_rope_op.examples(CPU, dtype):
        with torch.no_grad():
            streams = [engines(image_scales)(image, heads)]
            if text is not None:
                streams.insert(0, engines(text_scales)(text, heads))
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
        expected = apply_rope(q, (cos, sin)), apply_rope(k, (cos, sin)), v
        found = qk_norm_rope_reference(image, text, image_scales, text_scales, cos, sin, heads)
        assert all(map(torch.equal, found, expected))
        assert [one.dtype for one in found] == [dtype] * 3


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_kernel_is_the_reference(dtype: torch.dtype) -> None:
    for arguments in qk_norm_rope_op.examples(CPU, dtype):
        expected = qk_norm_rope_reference(*arguments)
        q, k, v = qk_norm_rope_triton(*arguments)
        assert_same(q, expected[0])
        assert_same(k, expected[1])
        assert torch.equal(v, expected[2])
        assert all(map(torch.equal, qk_norm_rope(*arguments), expected))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_scattering_kernel_is_the_reference(dtype: torch.dtype) -> None:
    for arguments in qk_norm_rope_scatter_op.examples(CPU, dtype):
        by_reference, by_kernel, by_op = copied(arguments), copied(arguments), copied(arguments)
        q = qk_norm_rope_scatter_reference(*by_reference)
        assert_same(qk_norm_rope_scatter_triton(*by_kernel), q)
        assert_same(by_kernel[-2], by_reference[-2])
        assert torch.equal(by_kernel[-1], by_reference[-1])
        assert torch.equal(qk_norm_rope_scatter(*by_op), q)
        assert all(map(torch.equal, by_op[-2:], by_reference[-2:]))


def test_kernel_is_near_the_exact_answer() -> None:
    for arguments in qk_norm_rope_op.examples(CPU, SINGLE):
        exact = qk_norm_rope_reference(*(one.double() if isinstance(one, Tensor) else one for one in arguments))
        for found, expected in zip(qk_norm_rope_triton(*arguments), exact, strict=True):
            assert ((found - expected).abs() <= 4e-7 * expected.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("scatter", [qk_norm_rope_scatter_reference, qk_norm_rope_scatter_triton])
def test_scattering_all_tokens_in_any_order_gives_the_whole(scatter: Any) -> None:
    arguments = next(iter(qk_norm_rope_op.examples(CPU, HALF)))
    image, text, image_scales, text_scales, cos, sin, heads = arguments
    q, k, v = qk_norm_rope_reference(*arguments)
    rows = torch.randperm(image.shape[1])
    joint = torch.cat((torch.arange(text.shape[1]), text.shape[1] + rows))
    chosen = (image[:, rows], text, image_scales, text_scales, cos[:, :, joint], sin[:, :, joint], heads)
    keys, values = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    assert_same(scatter(*chosen, rows[None], keys, values), q[:, :, joint])
    assert_same(keys, k)
    assert torch.equal(values, v)


@pytest.mark.parametrize("scatter", [qk_norm_rope_scatter_reference, qk_norm_rope_scatter_triton])
def test_other_rows_and_other_caches_stay(scatter: Any) -> None:
    *rest, rows, keys, values = next(iter(qk_norm_rope_scatter_op.examples(CPU, SINGLE)))
    text_rows = rest[1].shape[1]
    caches = torch.stack([keys, values] * 2).unflatten(0, (2, 2))  # of two blocks; the second is written
    before = caches.clone()
    scatter(*rest, rows, caches[1, 0], caches[1, 1])
    assert torch.equal(caches[0], before[0])
    for picture, own in enumerate(rows):
        stays = torch.ones(keys.shape[2], dtype=torch.bool)
        stays[:text_rows] = False
        stays[text_rows + own] = False
        assert stays.sum() == 3
        assert torch.equal(caches[1, :, picture][:, :, stays], before[1, :, picture][:, :, stays])
        assert (caches[1, :, picture] != before[1, :, picture])[:, :, ~stays].float().mean() > 0.99
    assert not torch.equal(rows[0], rows[1])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    text_rows=st.integers(0, 40),
    image_rows=st.integers(1, 40),
    heads=st.integers(1, 4),
    half=st.integers(1, 36),
    tables=st.booleans(),
)
def test_any_shape(batch: int, text_rows: int, image_rows: int, heads: int, half: int, tables: bool) -> None:
    image, text = (torch.randn(batch, rows, 6 * heads * half).to(HALF) for rows in (image_rows, text_rows))
    image_scales, text_scales = torch.randn(2, 2, 2 * half).to(HALF)
    cos, sin = torch.randn(2, batch if tables else 1, 1, text_rows + image_rows, half)
    arguments = (image, text, image_scales, text_scales, cos, sin, heads)
    for found, expected in zip(qk_norm_rope_triton(*arguments), qk_norm_rope_reference(*arguments), strict=True):
        assert_same(found, expected)


def test_columns_may_lie_apart_in_memory() -> None:
    image, scales = torch.randn(2, 96, 7).mT, torch.randn(16, 2).mT
    cos, sin = torch.randn(2, 1, 1, 8, 7).mT  # (1, 1, 7, 8), columns apart
    arguments = (image, None, scales, None, cos, sin, 2)
    for found, expected in zip(qk_norm_rope_triton(*arguments), qk_norm_rope_reference(*arguments), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize(("batch", "text_rows", "image_rows"), [(0, 3, 4), (1, 0, 0), (1, 3, 0), (2, 0, 4)])
def test_no_rows(batch: int, text_rows: int, image_rows: int) -> None:
    image, text = torch.randn(batch, image_rows, 48), torch.randn(batch, text_rows, 48)
    cos, sin = torch.randn(2, 1, 1, text_rows + image_rows, 4)
    arguments = (image, text, torch.ones(2, 8), torch.ones(2, 8), cos, sin, 2)
    for found, expected in zip(qk_norm_rope_triton(*arguments), qk_norm_rope_reference(*arguments), strict=True):
        assert found.shape == expected.shape == (batch, 2, text_rows + image_rows, 8)
        torch.testing.assert_close(found, expected)


def test_ops_are_registered_right() -> None:
    for arguments in list(qk_norm_rope_op.examples(CPU, HALF))[1:3]:
        torch.library.opcheck(qk_norm_rope, arguments)
    for arguments in list(qk_norm_rope_scatter_op.examples(CPU, HALF))[1:3]:
        torch.library.opcheck(qk_norm_rope_scatter, arguments)


def arguments_with(**changed: Any) -> tuple[Any, ...]:
    """Of a scatter with 3 text rows and 2 of 4 tokens, 2 heads of 8; in the order of the parameters."""
    right = {
        "image": torch.zeros(1, 2, 48),
        "text": torch.zeros(1, 3, 48),
        "image_scales": torch.ones(2, 8),
        "text_scales": torch.ones(2, 8),
        "cos": torch.zeros(1, 1, 5, 4),
        "sin": torch.zeros(1, 1, 5, 4),
        "heads": 2,
        "rows": torch.tensor([[3, 0]]),
        "keys": torch.zeros(1, 2, 7, 8),
        "values": torch.zeros(1, 2, 7, 8),
    }
    return tuple((right | changed).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": torch.zeros(2, 48)}, r"image must be \(batch, tokens, 3 \* 2 heads \* even\), got \(2, 48\)"),
        ({"heads": 0}, "image must be"),
        ({"heads": 16}, "image must be"),  # one channel a head
        ({"text": None}, "must come together"),
        ({"text_scales": None}, "must come together"),
        ({"text": torch.zeros(2, 3, 48)}, r"text must be \(1, 3, 48\), got \(2, 3, 48\)"),
        ({"text": torch.zeros(1, 3, 48, dtype=HALF)}, "dtypes of image"),
        ({"image_scales": torch.ones(8)}, r"image_scales must be \(2, 8\)"),
        ({"text_scales": torch.ones(2, 4)}, r"text_scales must be \(2, 8\)"),
        ({"cos": torch.zeros(1, 1, 2, 4)}, r"cos must be \(1, 1, 5, 4\)"),
        ({"sin": torch.zeros(1, 5, 4)}, r"sin must be \(1, 1, 5, 4\)"),
        ({"rows": torch.tensor([[3, 0]], dtype=torch.int32)}, "rows must be int64"),
        ({"rows": torch.tensor([[3]])}, r"rows must be \(1, 2\)"),
        ({"keys": torch.zeros(1, 2, 2, 8), "values": torch.zeros(1, 2, 2, 8)}, "3 text rows first"),
        ({"keys": torch.zeros(1, 1, 7, 8)}, r"keys must be \(1, 2, 7, 8\)"),
        ({"values": torch.zeros(1, 2, 8, 8)}, r"values must be \(1, 2, 7, 8\)"),
        ({"keys": torch.zeros(1, 2, 8, 7).mT}, "contiguous"),
        ({"values": torch.zeros(1, 2, 7, 8, dtype=HALF)}, "the image's dtype"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments = arguments_with(**changed)
    for scatter in (qk_norm_rope_scatter_reference, qk_norm_rope_scatter_triton):
        with pytest.raises(ValueError, match=message):
            scatter(*arguments)
    if not changed.keys() & {"rows", "keys", "values"}:
        for whole in (qk_norm_rope_reference, qk_norm_rope_triton):
            with pytest.raises(ValueError, match=message):
                whole(*arguments[:7])


@pytest.mark.parametrize("row", [-1, 4])
def test_reference_refuses_rows_outside_of_the_caches(row: int) -> None:
    with pytest.raises(ValueError, match=f"rows must be from 0 to 3, got {row}"):
        qk_norm_rope_scatter_reference(*arguments_with(rows=torch.tensor([[0, row]])))


def test_kernel_refuses_float64() -> None:
    arguments = (one.double() if isinstance(one, Tensor) else one for one in arguments_with()[:7])
    with pytest.raises(ValueError, match="float64 is for the reference"):
        qk_norm_rope_triton(*arguments)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE])
def test_one_stream_alone_is_the_same(dtype: torch.dtype) -> None:
    """Bit for bit what `qk_norm_rope` makes of q and k; v is where the product left it."""
    for image, _, scales, _, cos, sin, heads in qk_norm_rope_op.examples(CPU, dtype):
        first = cos.shape[2] - image.shape[1]
        tables, both = (cos[:, :, first:], sin[:, :, first:]), image.shape[2] // 3 * 2
        q, k, v = qk_norm_rope_reference(image, None, scales, None, *tables, heads)
        found = qk_norm_rope_single_reference(image[..., :both], scales, *tables, heads)
        assert all(map(torch.equal, found, (q, k)))
        assert torch.equal(image[..., both:].unflatten(-1, (heads, -1)).transpose(1, 2), v)
        if dtype != DOUBLE:
            for one, expected in zip(
                qk_norm_rope_single_op.kernel(image[..., :both], scales, *tables, heads), (q, k), strict=True
            ):
                assert_same(one, expected)


def test_rows_of_one_stream_hold_q_and_k() -> None:
    rows, table = torch.zeros(1, 4, 3 * 32), torch.zeros(1, 1, 4, 8)
    for run in (qk_norm_rope_single_reference, qk_norm_rope_single_op.kernel):
        with pytest.raises(ValueError, match=r"must be \(batch, tokens, 2 \* 2 heads \* even\), got \(1, 4, 97\)"):
            run(torch.zeros(1, 4, 97), torch.zeros(2, 16), table, table, 2)
        with pytest.raises(ValueError, match="image_scales must be"):
            run(rows, torch.zeros(2, 16), table, table, 2)
