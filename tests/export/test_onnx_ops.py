"""Translations of single operations against their references, run by onnx's own evaluator."""

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from step1x.export.onnx import OPSET, quiet
from step1x.export.onnx_ops import TRANSLATIONS
from step1x.kernels.gated_residual import gated_residual_adaln_op, gated_residual_op


class Calling(nn.Module):
    """An operation with what is no tensor."""

    def __init__(self, call, *settings):
        super().__init__()
        self.call, self.settings = call, settings

    def forward(self, *tensors: Tensor):
        return self.call(*tensors[:3], *self.settings[:1], *tensors[3:], *self.settings[1:])


def evaluated(module: nn.Module, given: tuple[Tensor, ...]) -> list[np.ndarray]:
    with quiet():
        made = torch.onnx.export(
            torch.export.export(module, given),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            optimize=False,
            verbose=False,
        )
    assert made is not None
    names = [one.name for one in made.model.graph.inputs]
    values = {name: one.numpy() for name, one in zip(names, given, strict=True)}
    return ReferenceEvaluator(made.model_proto).run(None, values)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 40, 64, generator=generator).half()
    return x, torch.randn(1, 1, 64, generator=generator).half(), y


@pytest.mark.parametrize("fused", [True, False])
def test_a_residual_is_rounded_once_or_twice(fused: bool) -> None:
    """float16 stands for bfloat16, which the evaluator has not: the same casts are in the graph."""
    x, gate, y = rows()
    (found,) = evaluated(Calling(gated_residual_op.call, fused), (x, gate, y))
    assert found.dtype == np.float16
    assert np.array_equal(found, gated_residual_op.reference(x, gate, y, fused).numpy())
    assert not np.array_equal(found, gated_residual_op.reference(x, gate, y, not fused).numpy())


@pytest.mark.parametrize("fused", [True, False])
def test_the_rows_of_a_residual_with_a_norm_are_rounded_as_without(fused: bool) -> None:
    x, gate, y = rows()
    call = Calling(gated_residual_adaln_op.call, fused, True)
    found, normed = evaluated(call, (x, gate, y, gate.flip(-1), gate * 0.5))
    expected, modulated = gated_residual_adaln_op.reference(x, gate, y, fused, gate.flip(-1), gate * 0.5, True)
    assert np.array_equal(found, expected.numpy())
    torch.testing.assert_close(torch.from_numpy(normed), modulated, rtol=2e-3, atol=2e-3)
