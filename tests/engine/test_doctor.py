"""What a machine can run, by the memory and the generation of its cards."""

from pathlib import Path

import pytest
import torch

from step1x.bench.cards import CARDS, Card
from step1x.bench.fake_cuda import FakeCuda
from step1x.engine import caches, doctor
from step1x.engine.doctor import Device, Machine, examine, report, verdicts, what_is_used
from step1x.engine.uses import uses
from step1x.kernels.launch import assumed


def machine(*devices: Device) -> Machine:
    return Machine(
        system="Linux",
        python="3.12",
        versions={},
        cores=8,
        memory_gb=64.0,
        free_memory_gb=64.0,
        disk_gb=100.0,
        cuda="13.0",
        driver="580.95.05",
        devices=devices,
        torch_error="",
    )


@pytest.mark.parametrize(
    ("memory", "capability", "runs"),
    [
        (25.4, "8.6", {"cpu", "bf16-24gb", "int8-24gb", "int4-12gb"}),  # RTX 3090
        (25.4, "8.9", {"cpu", "bf16-24gb", "fp8-24gb", "fp8-18gb", "int8-24gb", "int4-12gb"}),  # RTX 4090
        (8.4, "8.9", {"cpu"}),
    ],
)
def test_cards(memory: float, capability: str, runs: set[str]) -> None:
    major, minor = capability.split(".")
    found = verdicts(machine(Device.of(Card("a card", round(memory * 1e9), (int(major), int(minor)), 80))))
    assert {verdict.profile for verdict in found if verdict.fits} == runs
    for verdict in found:
        assert verdict.reason
    if capability == "8.6":
        reason = next(verdict.reason for verdict in found if verdict.profile == "fp8-24gb")
        assert reason == "needs compute capability 8.9, has 8.6"


def test_no_card() -> None:
    assert {verdict.profile for verdict in verdicts(machine()) if verdict.fits} == {"cpu"}


def test_two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bug report carries: each device, what it would use and why, and a kernel that failed its check."""
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor, "free_host_memory", lambda: 64 * 10**9)
    monkeypatch.setattr(caches, "cache_folder", lambda: tmp_path)
    (tmp_path / "version").write_text("580.95.05\n")
    with FakeCuda(CARDS["RTX 4090"], CARDS["T4"], wrong=("adaln", "attention_merged")):
        found = examine()
        first, second = what_is_used(found)
        text = report(found)
    assert [device.card for device in found.devices] == [CARDS["RTX 4090"], CARDS["T4"]]
    assert (found.driver, set(found.versions) >= {"torch", "torchao", "triton"}) == ("580.95.05", True)
    assert (first.device, first.profile.what, first.profile.reason) == ("cuda:0", "fp8-24gb", "plans 23.5 GB")
    assert {op for op, reason in first.kernels.items() if reason} == {"adaln", "attention_merged"}
    assert (first.attention.what, first.compiled.what) == ("sdpa", "off")
    assert first.attention.reason.startswith("merged failed its check: ")
    assert second.profile.what == ""
    assert "takes compute capability 8.0" in second.profile.reason
    assert all(reason == "sm_75 is older than sm_80" for reason in second.kernels.values())
    best = {one.profile: (one.fits, one.reason) for one in verdicts(found)}
    assert best["fp8-18gb"] == (True, "cuda:0 plans 14.5 GB")
    assert best["bf16-80gb"][1].startswith("cuda:0 weights take 4")
    for line in (
        "cuda:1: what v1.1 would use",
        "  profile   fp8-24gb: plans 23.5 GB",
        "CUDA      13.0, driver 580.95.05",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("card", "lacking", "what", "reason"),
    [
        ("RTX 4090", None, "torchao", "its fp8 products run from compute capability 8.9 on"),
        ("RTX 3090", None, "torchao", "its int8 products run from compute capability 8.0 on"),
        ("RTX 3090", "torchao 0.18 is not installed", "torch", "torchao 0.18 is not installed"),
        ("H100", None, "torch", "bf16-80gb multiplies no quantized rows"),
        ("T4", None, "torch", "no profile"),
    ],
)
def test_who_multiplies(card: str, lacking: str | None, what: str, reason: str) -> None:
    found = CARDS[card]
    with assumed(10 * found.capability[0] + found.capability[1]):
        products = uses(torch.device("cuda", 0), found, 64 * 10**9, lacking).products
    assert (products.what, products.reason) == (what, reason)


def test_a_machine_without_a_card() -> None:
    (found,) = what_is_used(machine())
    assert (found.device, found.profile.what, found.attention.what, found.kernels) == ("cpu", "cpu", "sdpa", {})
