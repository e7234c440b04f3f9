"""Free memory of the host, as the machine and its container say."""

from pathlib import Path

import pytest

from step1x.engine import card
from step1x.engine.card import Card, free_host_memory, total_host_memory


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(card, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(card, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  9000000 kB\nMemAvailable:    8000000 kB\n")
    return tmp_path


def test_of_a_machine(files: Path) -> None:
    assert free_host_memory() == 8_000_000 * 1024
    (files / "memory.max").write_text("max\n")
    assert free_host_memory() == 8_000_000 * 1024
    (files / "meminfo").unlink()
    assert free_host_memory() == total_host_memory() > 0


def test_of_a_container(files: Path) -> None:
    """What only caches files can be taken."""
    (files / "memory.max").write_text("4000000000\n")
    (files / "memory.current").write_text("3000000000\n")
    (files / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    assert free_host_memory() == 1_500_000_000
    (files / "memory.current").write_text("5000000000\n")
    assert free_host_memory() == 0
    (files / "memory.max").write_text("90000000000\n")
    assert free_host_memory() == 8_000_000 * 1024
    assert total_host_memory() <= 90_000_000_000


def test_a_card_in_words() -> None:
    found = Card("NVIDIA GeForce RTX 4090", 25_385_000_000, (8, 9), 128)
    assert str(found) == "NVIDIA GeForce RTX 4090 (25.4 GB, compute capability 8.9)"
    assert found.half_rate
    assert not Card("NVIDIA L40S", 1, (8, 9), 142).half_rate
    assert Card("a", 1, (12, 0), 1).compute == 12.0
