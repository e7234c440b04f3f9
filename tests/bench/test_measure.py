import json

import pytest
from click.testing import CliRunner

from step1x.bench.cards import CARDS
from step1x.bench.ceilings import ceiling, gemm_rate
from step1x.bench.counters import photograph
from step1x.bench.fake_cuda import FakeCuda
from step1x.bench.measure import Settings, measure, report
from step1x.bench.record import Record
from step1x.engine import Engine
from step1x.engine.cli import program
from step1x.engine.timing import STAGES


@pytest.fixture(scope="module")
def record() -> Record:
    return measure(Settings(size=64, steps=2, runs=1))


def test_every_stage_is_there(record: Record) -> None:
    stages = {name.removeprefix("stage.") for name in record.metrics if name.startswith("stage.")}
    assert stages == set(STAGES)
    values = {name: metric.value for name, metric in record.metrics.items()}
    assert values["edit"] == pytest.approx(sum(values[f"stage.{name}"] for name in stages), rel=1e-6)
    assert values["times_floor"] == pytest.approx(values["edit"] / values["floor"])
    assert values["times_floor"] > 1
    assert values["peak_resident"] > 1e8
    assert (record.place.device, record.size, record.profile) == ("cpu", "64x64", "cpu")


def test_the_report_has_a_bar_for_each_stage(record: Record) -> None:
    lines = report(record).splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(STAGES)]] == list(STAGES)
    assert max(line.count("█") for line in lines) == 32
    assert "TFLOP/s (measured)" in lines[-1]


def test_an_unknown_device_is_measured() -> None:
    import torch

    cpu = torch.device("cpu")
    assert ceiling(cpu, torch.float32).source == "measured"
    assert gemm_rate(cpu, torch.float32, side=64, seconds=0.01) > 1e6


def test_command_line() -> None:
    words = ["bench", "--size", "64", "--steps", "1", "--runs", "1", "--json", "-"]
    done = CliRunner().invoke(program, words)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["suite"] == "edit"
    assert CliRunner().invoke(program, ["bench", "--profile", "none"]).exit_code == 2
    assert CliRunner().invoke(program, ["bench", "--steps", "0"]).exit_code == 2


def test_warm_edits_on_a_gpu_are_compiled_ones() -> None:
    """FLOPs are counted where operators can be seen; an edit that nobody compiles captures nothing."""
    with FakeCuda(CARDS["H100"]) as machine:
        engine = Engine.load(profile="bf16-80gb", cache=False)
        engine.edit(photograph(64, 64), "make it snow", size=64, steps=2)
        assert not machine.named("capture_begin")
        record = measure(Settings(profile="bf16-80gb", size=64, steps=2, runs=1))
        assert machine.named("capture_begin")
    assert record.metrics["flops"].value > 1e8
    assert record.profile == "bf16-80gb"
