"""Profiles and settings -> what an engine is loaded with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from step1x.bench.counters import photograph
from step1x.engine import Edit, Engine
from step1x.engine.build import find_or_build
from step1x.engine.errors import InputError
from step1x.engine.executor import Execution
from step1x.engine.loading import LOADING, wanted_profile
from step1x.kernels.adaln import adaln_op
from step1x.profiles import load_profile
from step1x.quant.linear import dynamic


def test_what_differs_from_the_profile() -> None:
    own = load_profile("fp8-18gb")
    assert wanted_profile("fp8-18gb", {"device": "auto", "dtype": None, "kernels": None}) == own
    found = wanted_profile("fp8-18gb", {"device": "cuda:1", "dtype": torch.float32, "compiled": True})
    changes = {"device": "cuda:1", "dtype": "float32", "vae_dtype": "float32", "compiled": True}
    assert found == own.changed(changes)


def test_the_default_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert wanted_profile(None, {}) == wanted_profile("auto", {}) == load_profile("cpu")


def test_keywords_of_load_are_all_listed() -> None:
    """`edit` tells them from an edit's options by this list."""
    import inspect

    kinds = inspect.signature(Engine.load).parameters.values()
    assert {one.name for one in kinds if one.kind is one.KEYWORD_ONLY} <= set(LOADING)


def test_a_profile_says_how_to_run(tmp_path: Path) -> None:
    base = "description = 'x'\ndevice = 'cpu'\ndtype = 'float32'\nvae_dtype = 'float32'\n"
    for line, message in (("attention = 'flash3'", "'flash3' is not available"), ("kernels = 'some'", "kernels")):
        (tmp_path / "mine.toml").write_text(base + line)
        with pytest.raises(InputError, match=message):
            Engine.load(profile=tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text(base + "strip_pixels = 4096")
    assert Engine.load(profile=tmp_path / "mine.toml").vae.strip_pixels == 4096


def test_kernels_are_chosen_when_loading() -> None:
    with pytest.raises(InputError, match="kernels: input should be"):
        Engine.load(device="cpu", kernels="some")
    with pytest.raises(InputError, match="unknown option colour; known: profile, variant, fix_quotes, cache"):
        Engine.load(device="cpu", colour="red")
    for kernels in ("auto", "on", "off"):
        run = Execution(kernels=kernels).operation(adaln_op, torch.device("cpu"))
        assert run is (adaln_op.call if kernels == "on" else adaln_op.reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "nine-gb"}, "unknown profile 'nine-gb'"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used here"),
        ({"variant": "official-v1.0"}, r"v1\.0"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_bad_load_arguments_are_one_clear_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Engine.load(**options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def edited(engine: Engine) -> Edit:
    return engine.edit(photograph(64, 64), "make it darker", seed=1, size=64)


def test_a_profile_that_quantises_builds_an_engine_once() -> None:
    said: list[str] = []
    options: dict[str, Any] = {"profile": "fp8-18gb", "device": "cpu", "cache": False, "say": said.append}
    plain = edited(Engine.load(device="cpu", cache=False, dtype=torch.bfloat16))
    built = Engine.load(**options)
    assert [line for line in said if "building the engine of step1x-tiny for fp8-18gb" in line]
    said.clear()
    found = [edited(engine).image.tobytes() for engine in (built, Engine.load(**options))]
    assert said == []
    assert found[0] == found[1] != plain.image.tobytes()
    assert built.dit.dtype == torch.bfloat16
    assert "rerun" not in plain.metadata


def test_an_engine_folder_is_a_model(tmp_path: Path) -> None:
    """With the profile that it was built for, unless another is named."""
    profile = load_profile("cpu").changed({"weights": {"dit": "int8"}})
    folder = find_or_build(None, profile, say=print, into=tmp_path / "engine")
    engine = Engine.load(folder, cache=False)
    assert {layer.scheme for layer in dynamic(engine.dit)} == {"int8"}
    assert edited(engine).metadata["model"] == "step1x-tiny"
