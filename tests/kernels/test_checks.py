"""A kernel is checked before its first use on a device; what is found is kept; one that is wrong is not used."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from step1x.engine.caches import cache_folder
from step1x.engine.executor import Execution
from step1x.kernels import attention_backends, checks, launch
from step1x.kernels.attention_backends import merged_op, sdpa
from step1x.kernels.launch import Op, assumed
from step1x.kernels.merge_biased import merge_biased_op

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
numbers = count()
spec = spec_from_file_location("planted", Path(__file__).with_name("planted.py"))
assert spec is not None
assert spec.loader is not None
planted: Any = module_from_spec(spec)
spec.loader.exec_module(planted)


class Kernel:
    """A kernel that is counted: right, but where it is told otherwise."""

    def __init__(self, spoilt: Callable[..., Any] | None = None) -> None:
        self.calls = 0
        self._spoilt = spoilt or planted.scale_rows_reference

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        return self._spoilt(*given)


def off_by_a_row(x: torch.Tensor, factors: torch.Tensor) -> Any:
    out, largest = planted.scale_rows_reference(x, factors)
    out[-1] *= 1.1
    return out, largest


def raising(*_: Any) -> Any:
    raise RuntimeError("out of resource: shared memory\nand more lines")


@pytest.fixture
def made() -> Callable[..., tuple[Op, Kernel]]:
    def make(spoilt: Callable[..., Any] | None = None) -> tuple[Op, Kernel]:
        kernel = Kernel(spoilt)
        return replace(planted.scale_rows_op, name=f"planted_{next(numbers)}", kernel=kernel), kernel

    return make


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Device 0 is a GPU whose tensors are in host memory; changing what is returned makes it another one."""
    facts = {"device": "A card", "capability": "90", "kernels": "1"}
    monkeypatch.setattr(checks, "_known", {})
    monkeypatch.setattr(checks, "place", lambda device: dict(facts))
    monkeypatch.setattr(launch, "capability", lambda device: 90 if device.type == "cuda" else 0)
    monkeypatch.setattr(attention_backends, "capability", lambda device: 90 if device.type == "cuda" else 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    check = checks.check
    monkeypatch.setattr(checks, "check", lambda op, device: check(op, CPU))
    return facts


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process does not know."""
    monkeypatch.setattr(checks, "_known", {})


def test_a_right_kernel_is_checked_once(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op, kernel = made()
    assert checks.right(op, GPU, tmp_path)
    assert kernel.calls >= 2, "an example of each dtype"
    calls = kernel.calls
    assert checks.right(op, GPU, tmp_path)
    forget(monkeypatch)
    assert checks.right(op, GPU, tmp_path)
    assert kernel.calls == calls
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["verdicts"] == {op.name: ""}


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (off_by_a_row, "relative error 0.099 in torch.bfloat16, at most 0.0078 is right"),
        (lambda x, factors: (x * factors * torch.nan, factors), "relative error inf"),
        (lambda x, factors: ((x * factors).double(), factors), "torch.float64, expected"),
        (lambda x, factors: (x * factors,), "expected (3, 1) in"),
        (raising, "RuntimeError: out of resource: shared memory"),
    ],
    ids=["wrong", "nan", "dtype", "results", "raises"],
)
def test_a_wrong_kernel_is_off_and_said_once(
    spoilt: Any, words: str, made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    op, kernel = made(spoilt)
    assert not checks.right(op, GPU, tmp_path)
    assert not checks.right(op, GPU, tmp_path)
    ((level, message),) = [(one.levelno, one.getMessage()) for one in caplog.records]
    assert level == logging.WARNING
    assert message.startswith(f"kernel {op.name} is not used on A card, its reference runs: ")
    assert words in message
    assert "\n" not in message
    calls = kernel.calls
    forget(monkeypatch)  # the next process knows it from the file
    assert not checks.right(op, GPU, tmp_path)
    assert kernel.calls == calls
    assert len(caplog.records) == 2


def test_another_driver_version_or_kernel_is_checked_anew(
    made: Any, tmp_path: Path, gpu: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    op, _ = made(off_by_a_row)
    assert not checks.right(op, GPU, tmp_path)
    mended = replace(op, kernel=Kernel())
    assert not checks.right(mended, GPU, tmp_path), "known under this name"
    gpu["kernels"] = "2"
    assert checks.right(mended, GPU, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_all_that_a_verdict_holds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(checks, "_driver", lambda: "580.1")
    found = checks.place(GPU)
    assert set(found) == {"device", "capability", "driver", "torch", "triton", "engine", "kernels"}
    assert (found["device"], found["capability"], found["driver"]) == ("A card", "90", "580.1")
    assert (found["torch"], found["triton"]) == (torch.__version__, launch.triton.__version__)
    assert len(found["kernels"]) == 16


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b'{"verdicts": 3}', b"\xff", b'{"verdicts": {"x": 1}}'])
def test_a_broken_file_is_checked_anew(
    content: bytes, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, kernel = made()
    assert checks.right(op, GPU, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    forget(monkeypatch)
    calls = kernel.calls
    assert checks.right(op, GPU, tmp_path)
    assert kernel.calls > calls
    assert op.name in json.loads(file.read_text())["verdicts"]


@pytest.mark.parametrize("folder", [None, "a file"])
def test_without_a_folder_it_is_checked_in_each_process(
    folder: str | None, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = None if folder is None else tmp_path / folder / "kernels"
    if folder is not None:
        (tmp_path / folder).write_text("")
    op, kernel = made()
    for times in (1, 2):
        forget(monkeypatch)
        calls = kernel.calls
        assert checks.right(op, GPU, place), times
        assert kernel.calls > calls


def test_never_while_a_graph_is_captured_or_traced(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    op, kernel = made()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not checks.right(op, GPU, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert checks.verdict(op, GPU, tmp_path).reason == "it was not checked before"
    assert (kernel.calls, list(tmp_path.iterdir()), caplog.records) == (0, [], [])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert checks.right(op, GPU, tmp_path), "and nothing was kept of that"


def test_running_out_of_memory_is_no_verdict(made: Any, tmp_path: Path) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    op, _ = made(full)
    with pytest.raises(torch.OutOfMemoryError):
        checks.right(op, GPU, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_users_random_numbers_stay_as_they_were(made: Any) -> None:
    op, _ = made()
    torch.manual_seed(5)
    wanted = torch.randn(3)
    torch.manual_seed(5)
    checks.right(op, GPU, None)
    assert torch.equal(torch.randn(3), wanted)


def test_no_example_is_begun_when_time_is_over(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    op, kernel = made()
    monkeypatch.setattr(checks, "SECONDS", -1.0)
    assert checks.right(op, GPU, None)
    assert kernel.calls == len(op.dtypes)


def test_nothing_is_checked_where_it_cannot_run(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    op, kernel = made()
    assert checks.verdict(replace(op, fp8=True), GPU, None).right
    monkeypatch.setattr(launch, "capability", lambda device: 80)
    assert checks.verdict(replace(op, fp8=True), GPU, None).reason == "sm_80 has no e4m3"
    monkeypatch.setattr(launch, "capability", lambda device: 75)
    assert checks.verdict(op, GPU, None).reason == "sm_75 is older than sm_80"
    with assumed(90):
        monkeypatch.setattr(launch, "capability", lambda device: 90)
        calls = kernel.calls
        assert checks.right(op, GPU, None)
        assert kernel.calls == calls


def test_a_device_is_examined_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check", lambda op, device: "wrong" if op.name == "cfg_step" else "")
    found = {one.op: one.reason for one in checks.examine(GPU, None)}
    assert {"adaln", "attention", "merge_biased", "attention_merged", "cfg_step"} <= set(found)
    assert {name for name, reason in found.items() if reason} == {"cfg_step"}


def test_merged_attention_passes_its_own_check() -> None:
    assert checks.check(merged_op, CPU) == ""


def test_an_operation_of_the_engine_falls_back(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrong, right = made(off_by_a_row)[0], made()[0]
    for kernels in ("auto", "on"):
        assert Execution(kernels=kernels).operation(wrong, GPU) is wrong.reference
        assert Execution(kernels=kernels).operation(right, GPU) is right.call
    assert Execution(kernels="off").operation(right, GPU) is right.reference
    assert list((cache_folder() / "kernels").iterdir())
    monkeypatch.setattr(launch, "EXCEPTIONS", {90: frozenset({right.name})})
    assert Execution().operation(right, GPU) is right.reference
    assert Execution(kernels="on").operation(right, GPU) is right.call


@pytest.mark.parametrize("name", ["auto", "merged"])
def test_merged_attention_that_is_wrong_is_sdpa(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(checks, "check", lambda op, device: "it is off" if op is merged_op else "")
    execution = Execution(attention=name)
    assert execution.attend(GPU, (4, 9)) is sdpa
    monkeypatch.setattr(checks, "check", lambda op, device: "it is off" if op is merge_biased_op else "")
    forget(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    attend: Any = execution.attend(GPU, (4, 9))
    inner = attend.args[0] if name == "auto" else attend
    assert inner.keywords["merge"] is merge_biased_op.reference
    assert execution.attend(GPU, None) is sdpa, "where any key may carry a bias"
