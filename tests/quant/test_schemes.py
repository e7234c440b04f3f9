"""Stored sizes against the tensors that are made."""

from typing import get_args

import pytest
import torch

from step1x import profiles
from step1x.quant.schemes import SCHEMES, fits, group_size, layout, stored_bytes
from step1x.quant.weights import quantise

QUANTISED = [scheme for scheme in SCHEMES if scheme != "plain"]


def test_the_profiles_know_the_same_schemes():
    assert get_args(profiles.Scheme) == SCHEMES


@pytest.mark.parametrize("scheme", QUANTISED)
@pytest.mark.parametrize("shape", [(48, 128), (16, 192), (80, 32)], ids=str)
def test_what_is_stored(scheme, shape):
    parts = quantise(scheme, torch.randn(shape))
    assert layout(scheme, *shape) == {
        name: (tuple(part.shape), str(part.dtype).removeprefix("torch.")) for name, part in parts.items()
    }
    assert stored_bytes(scheme, *shape, itemsize=2) == sum(part.nbytes for part in parts.values())


def test_what_does_not_fit_stays_plain():
    assert stored_bytes("plain", 10, 20, itemsize=2) == 400
    for scheme, shape in (("fp8", (24, 64)), ("fp8", (64, 24)), ("int8", (64, 20)), ("int4-weight", (64, 48))):
        assert not fits(scheme, *shape)
        assert stored_bytes(scheme, *shape, itemsize=2) == 2 * shape[0] * shape[1]
        with pytest.raises(ValueError, match="cannot be"):
            quantise(scheme, torch.zeros(shape))


def test_groups_divide_the_row():
    assert [group_size(size) for size in (3072, 192, 96)] == [128, 64, 32]
    with pytest.raises(ValueError, match="multiple of 32"):
        group_size(48)


def test_plain_has_no_layout():
    with pytest.raises(ValueError, match="as they are"):
        layout("plain", 16, 16)
