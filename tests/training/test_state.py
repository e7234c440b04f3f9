import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from step1x.training import state


def test_average_follows_and_warms_up() -> None:
    layer = nn.Linear(2, 2)
    average = state.Average(layer, 0.9)
    for _ in range(400):
        with torch.no_grad():
            layer.weight.fill_(3.0)
        average.update(layer)
    assert torch.allclose(average.values["weight"], torch.full((2, 2), 3.0))


def test_round_trip_and_absence(tmp_path: Path) -> None:
    path = tmp_path / "run" / "state.pt"
    assert state.load(path, torch.device("cpu")) is None
    state.save(path, {"step": 3, "weights": torch.arange(4)})
    loaded = state.load(path, torch.device("cpu"))
    assert loaded is not None
    assert loaded["step"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


def test_a_kill_leaves_a_whole_state(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom step1x.training import state\n"
        "n = 0\nwhile True:\n    n += 1\n    state.save(Path(sys.argv[1]), {'n': n, 'w': torch.full((200000,), n)})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    loaded = state.load(path, torch.device("cpu"))
    assert loaded is not None
    assert (loaded["w"] == loaded["n"]).all()
