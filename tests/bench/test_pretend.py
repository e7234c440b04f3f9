"""The device that is not there."""

import pytest
import torch
from torch import nn

from step1x.bench.pretend import DEVICE, Mismatch, Pretend


def test_results_follow_their_operands() -> None:
    model, pretend = nn.Linear(4, 4), Pretend()
    pretend.adopt(model)
    with pretend:
        assert model.weight.device == DEVICE
        x = torch.randn(2, 4)
        assert x.device.type == "cpu"
        x = x.to(model.weight.device)
        y = model(x)
        assert y.device == DEVICE
        assert torch.zeros(3, device=y.device).device == DEVICE
        back = y.cpu()
        assert back.device.type == "cpu"
    assert dict(pretend.to_device) == {"": 32}
    assert dict(pretend.from_device) == {"": 32}
    assert pretend.waits["", "copy to the host"] == 1
    assert y.device.type == "cpu", "outside, nothing is pretended"


def test_what_waits_is_counted_by_stage() -> None:
    pretend = Pretend()
    with pretend:
        x = torch.arange(6.0, device=DEVICE)
        pretend.stage("denoise")
        bool(x.sum() > 3)
        x[x > 2]
        x.tolist()
        torch.tensor([1.0], device=DEVICE)
    assert dict(pretend.waits) == {
        ("denoise", "_local_scalar_dense"): 1,
        ("denoise", "index"): 1,
        ("denoise", "tolist"): 1,
    }
    assert dict(pretend.to_device) == {"denoise": 4}


def test_operands_of_two_devices_are_refused() -> None:
    with Pretend():
        x = torch.zeros(3, device=DEVICE)
        assert (x + torch.tensor(1.0)).device == DEVICE, "a number from the host is fine"
        assert x[torch.tensor([0, 2])].device == DEVICE, "so are indices"
        with pytest.raises(Mismatch, match="add"):
            x + torch.zeros(3)


def test_moving_casts_and_copies() -> None:
    x = torch.zeros(8)
    with Pretend() as pretend:
        there = x.to(DEVICE, torch.float16)
        assert (there.device, there.dtype) == (DEVICE, torch.float16)
        there += 1
        assert there.to(there).device == DEVICE
    assert x.sum() == 0
    assert pretend.to_device[""] == 16
