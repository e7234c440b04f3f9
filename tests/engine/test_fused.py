"""The fused blocks against the plain ones, in float64; any depth, both dtype flows, bias and pruning."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from step1x.bench.counting import Launches
from step1x.engine.dit import DiT
from step1x.engine.fused import Fused
from step1x.quant.linear import QuantizedLinear, quantise_layers
from step1x.quant.schemes import SCHEMES, Scheme

COUNT = 12  # image rows of `step_arguments`
Build = Callable[..., DiT]
Arguments = Callable[..., tuple]


def error(got: Tensor, wanted: Tensor) -> float:
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("depths", [(2, 2), (1, 1), (0, 2), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("fp32_norms", [True, False])
def test_equals_the_plain_blocks(
    small_dit: Build, step_arguments: Arguments, depths: tuple[int, int], fp32_norms: bool
) -> None:
    dit = small_dit(*depths, fp32_norms=fp32_norms)
    given = step_arguments(dit)
    for kept in (None, COUNT, COUNT // 2, 1):
        assert error(Fused(dit).velocity(*given, kept), dit.velocity(*given, kept)) < 1e-12


def test_without_bias_and_with_one_row(small_dit: Build, step_arguments: Arguments) -> None:
    dit = small_dit()
    given = step_arguments(dit, batch=1, bias=False)
    assert error(Fused(dit).velocity(*given), dit.velocity(*given)) < 1e-12


def test_references_can_be_chosen(small_dit: Build, step_arguments: Arguments) -> None:
    dit = small_dit()
    given = step_arguments(dit)
    assert torch.equal(Fused(dit, lambda op: op.reference).velocity(*given), Fused(dit).velocity(*given))


def test_half_precision_rounds_where_the_plain_blocks_do(small_dit: Build, step_arguments: Arguments) -> None:
    """Against float64 the fused path is as near as the plain one."""
    exact, rounded = small_dit(), small_dit(dtype=torch.bfloat16)
    given, coarse = step_arguments(exact), step_arguments(rounded)
    wanted = exact.velocity(*given)
    plain, fused = (run(*coarse).double() for run in (rounded.velocity, Fused(rounded).velocity))
    assert error(fused, wanted) < 1.5 * error(plain, wanted)


def test_a_fraction_of_the_launches(small_dit: Build, step_arguments: Arguments) -> None:
    dit = small_dit(4, 8)
    given = step_arguments(dit)
    counts = []
    for run in (dit.velocity, Fused(dit).velocity):
        with Launches() as launches:
            run(*given, COUNT // 2)
        counts.append(launches.total)
    assert counts[0] > 4 * counts[1], counts


def quantised(dit: DiT, scheme: Scheme) -> DiT:
    assert quantise_layers(dit, "dit", scheme)
    return dit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp32_norms", [True, False])
def test_fp8_layers_are_fed_what_they_would_make(
    small_dit: Build, step_arguments: Arguments, dtype: torch.dtype, fp32_norms: bool
) -> None:
    """Bit for bit what the plain operations and a quantisation in each layer give."""
    dit = quantised(small_dit(dtype=dtype, fp32_norms=fp32_norms), "fp8")
    given = step_arguments(dit)
    fused, apart = Fused(dit), Fused(dit)
    apart.fp8 = apart.plain
    for kept in (None, COUNT // 2):
        assert torch.equal(fused.velocity(*given, kept), apart.velocity(*given, kept))


def test_only_what_attention_gives_is_quantised_apart(
    small_dit: Build, step_arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    dit = quantised(small_dit(3, 2, dtype=torch.float32), "fp8")
    given, calls, quantise = step_arguments(dit), [], QuantizedLinear._quantised

    def counted(layer: QuantizedLinear, rows: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(layer)
        return quantise(layer, rows)

    monkeypatch.setattr(QuantizedLinear, "_quantised", counted)
    Fused(dit).velocity(*given)
    assert calls == [attn.proj for block in dit.double_blocks for attn in (block.img_attn, block.txt_attn)]


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "plain"])
def test_equals_the_plain_blocks_with_quantised_layers(
    small_dit: Build, step_arguments: Arguments, scheme: Scheme
) -> None:
    dit = quantised(small_dit(dtype=torch.float32), scheme)
    given = step_arguments(dit)
    bound = 0.05 if scheme in ("fp8", "int8") else 1e-4  # a rounding apart may be a step of 8 bits apart
    for kept in (None, COUNT // 2):
        assert error(Fused(dit).velocity(*given, kept), dit.velocity(*given, kept)) < bound


def test_blocks_may_differ_in_scheme(small_dit: Build, step_arguments: Arguments) -> None:
    dit = small_dit(dtype=torch.float32)
    given = step_arguments(dit)
    wanted = dit.velocity(*given)
    for name in ("double_blocks.1.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.1.linear1"):
        dit.set_submodule(name, QuantizedLinear.of("fp8", dit.get_submodule(name)))
    assert 0 < error(Fused(dit).velocity(*given), wanted) < 0.1
