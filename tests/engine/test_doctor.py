"""What a machine can run, by the memory and the generation of its cards."""

import pytest

from step1x.engine.doctor import Device, Machine, verdicts


def machine(*devices: Device) -> Machine:
    return Machine(
        system="Linux",
        python="3.12",
        versions={},
        cores=8,
        memory_gb=64.0,
        disk_gb=100.0,
        cuda="13.0",
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
    found = verdicts(machine(Device(name="a card", memory_gb=memory, capability=capability)))
    assert {verdict.profile for verdict in found if verdict.fits} == runs
    for verdict in found:
        assert verdict.reason
    if capability == "8.6":
        reason = next(verdict.reason for verdict in found if verdict.profile == "fp8-24gb")
        assert reason == "needs compute capability 8.9; the newest here has 8.6"


def test_no_card() -> None:
    assert {verdict.profile for verdict in verdicts(machine()) if verdict.fits} == {"cpu"}
