"""Five regressions put in on purpose, each of which the gate must catch by its name."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from step1x.bench import counters, paired
from step1x.bench.gate import Baseline, Difference, differences, of_groups, verdict
from step1x.bench.record import ROOT
from step1x.engine import denoise
from step1x.engine.fused import Fused
from step1x.engine.text import Conditioner, Conditioning

pytestmark = pytest.mark.long


def failures(group: str) -> dict[str, Difference]:
    """What the gate says of one group of counters against the committed baseline."""
    accepted, record = Baseline.read(), counters.measure([group])
    found = differences(of_groups(accepted.metrics, [group]), record.metrics)
    holds, lines = verdict(found, accepted.place, record.place)
    assert holds is not any(one.fails for one in found)
    assert holds or "bench accept --why" in " ".join(lines)
    return {one.name: one for one in found if one.fails}


def test_an_extra_forward_and_a_copy_to_the_host_in_the_step_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    velocity, velocities = Fused.velocity, denoise.velocities

    def twice(self: Fused, *arguments: Any) -> torch.Tensor:
        velocity(self, *arguments)
        return velocity(self, *arguments)

    def through_the_host(*arguments: Any) -> torch.Tensor:
        prediction = velocities(*arguments)
        return prediction.cpu().to(prediction.device)

    monkeypatch.setattr(Fused, "velocity", twice)
    monkeypatch.setattr(denoise, "velocities", through_the_host)
    found = failures("edit")
    # the forward
    assert (found["edit.dit_forwards"].old, found["edit.dit_forwards"].new) == (8, 16)
    assert {"edit.denoise.flops", "edit.denoise.launches_per_step"} <= set(found)
    # the copy
    assert (found["edit.denoise.waits"].old, found["edit.denoise.waits"].new) == (0, counters.STEPS)
    assert found["edit.denoise.from_device_bytes"].change == "new"
    assert "edit.vlm_forwards" not in found


def test_a_second_call_of_the_text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Conditioner.encode

    def twice(self: Conditioner, image: Any, prompts: Sequence[str], *, share: bool) -> list[Conditioning]:
        encode(self, image, prompts, share=share)
        return encode(self, image, prompts, share=share)

    monkeypatch.setattr(Conditioner, "encode", twice)
    found = failures("edit")
    # Template and picture are known then: what is read again are the two instructions.
    assert (found["edit.vlm_forwards"].old, found["edit.vlm_forwards"].new) == (4, 6)
    assert "edit.vision_forwards" not in found
    assert "edit.encode_text.flops" in found
    assert not [name for name in found if "denoise" in name]


def test_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Fused.double_block

    def broken(self: Fused, *arguments: Any) -> Any:
        torch._dynamo.graph_break()
        return block(self, *arguments)

    monkeypatch.setattr(Fused, "double_block", broken)
    found = failures("graphs")
    assert found["graphs.breaks"].old == 0
    assert (found["graphs.breaks"].new or 0) >= 1


def test_a_pause_in_the_step_loop(tmp_path: Path) -> None:
    """A copy of the tree whose host counts to some millions in every step, timed against the tree.

    It counts and does not sleep: a core that slept runs slower for a while, which the gate blames on what comes next,
    and beside other work a sleep does not grow with everything else.
    """
    slow = tmp_path / "slow"
    for package in ("engine", "profiles", "kernels", "quant"):
        shutil.copytree(ROOT / package, slow / package, ignore=shutil.ignore_patterns("bundled", "__pycache__"))
    (slow / "engine" / "bundled").symlink_to(ROOT / "engine" / "bundled")
    file = slow / "engine" / "denoise.py"
    text = file.read_text()
    loop = "        now, following = "
    assert text.count(loop) == 1
    file.write_text(text.replace(loop, f"        sum(range(10_000_000))\n{loop}"))
    ratios = {one.name: one for one in paired.measure(slow, ROOT, pairs=12, cases=["edit"])}
    assert {name for name, one in ratios.items() if one.slower} == {"edit.denoise_step", "edit.end_to_end"}
    assert ratios["edit.denoise_step"].pairs == 12
