"""What lies in the user's cache folder changes no figure, and only built engines of it are ever used."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from step1x.bench import battery, counters, measure
from step1x.bench.own_cache import own_cache
from step1x.engine.caches import cache_folder
from step1x.engine.cli import program
from step1x.engine.errors import InputError
from step1x.engine.store import engines_folder


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, with something in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    for kind in ("engines", "embeddings"):
        (tmp_path / "step1x-engine" / kind).mkdir(parents=True, mode=0o700)
        (tmp_path / "step1x-engine" / kind / "theirs").write_text("kept")
    return tmp_path / "step1x-engine"


def test_nothing_of_the_users_is_seen(users: Path) -> None:
    with own_cache() as folder:
        assert cache_folder().parent == folder
        assert not cache_folder().exists()
        assert os.environ["HF_HOME"] == str(users.parent / "huggingface")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    assert cache_folder() == users
    assert not folder.exists()
    assert not {"HF_HOME", "TORCHINDUCTOR_CACHE_DIR"} & {*os.environ}


def test_engines_are_used_and_kept_where_they_are(users: Path) -> None:
    with own_cache(engines=True):
        assert (engines_folder() / "theirs").read_text() == "kept"
        assert [path.name for path in cache_folder().iterdir()] == ["engines"]
        (engines_folder() / "built").write_text("now")
    assert sorted(path.name for path in (users / "engines").iterdir()) == ["built", "theirs"]


def test_a_folder_of_engines_that_cannot_be_used(users: Path) -> None:
    (users / "engines").chmod(0o777)
    with (
        pytest.raises(InputError, match=r"engines: no engine can be kept there: others may write to it"),
        own_cache(engines=True),
    ):
        pass


def test_an_engine_in_the_users_cache_changes_no_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    without = counters.measure(["startup"]).metrics
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    built = CliRunner().invoke(program, ["build", "--profile", "cpu"])
    assert built.exit_code == 0, built.output
    assert list(engines_folder().iterdir())
    assert counters.measure(["startup"]).metrics == without


@pytest.mark.parametrize(("profile", "used"), [("cpu", False), ("int8-24gb", True)])
def test_bench_uses_engines_only_where_it_must(
    users: Path, monkeypatch: pytest.MonkeyPatch, profile: str, used: bool
) -> None:
    found = []

    def load(*_: object, **__: object) -> None:
        found.append((engines_folder().exists(), (cache_folder() / "embeddings").exists()))
        raise InputError("seen enough")

    monkeypatch.setattr(measure.Engine, "load", load)
    with pytest.raises(InputError, match="seen enough"):
        measure.measure(measure.Settings(profile=profile, device="cpu"))
    assert found == [(used, False)]


def test_the_battery_has_a_cache_of_its_own(users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def run_all(*_: object) -> list[str]:
        found.append(cache_folder())
        return ["kernels"]

    monkeypatch.setattr(battery, "run_all", run_all)
    done = CliRunner().invoke(battery.main, ["--smoke", "--out", str(tmp_path / "out")])
    assert "no part left a record" in done.output
    assert found
    assert found[0] != users
