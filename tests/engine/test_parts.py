"""Loading an engine folder: against quantising the same model in memory, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from step1x.engine import parts
from step1x.engine.build import find_or_build
from step1x.engine.dit import is_modulation
from step1x.engine.engine_config import EngineConfig
from step1x.engine.errors import InputError
from step1x.engine.parts import PARTS, architecture, load_engine_folder, networks
from step1x.engine.store import MANIFEST, Manifest
from step1x.engine.weights import Components, load
from step1x.profiles import Profile, Residency, Weights, load_profile
from step1x.quant.linear import QuantizedLinear, quantise_layers


def profile(weights: Weights | None = None, dtype: str = "bfloat16") -> Profile:
    return load_profile("cpu").model_copy(update={"dtype": dtype, "weights": weights or Weights()})


def built(into: Path, wanted: Profile) -> Path:
    return find_or_build(None, wanted, say=lambda _: None, into=into)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("engines") / "plain", load_profile("cpu"))


def modules(components: Components) -> list[nn.Module]:
    return [components.dit, components.vae, components.conditioner.model]


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    for ours, theirs in (
        (got.state_dict(), wanted.state_dict()),
        (dict(got.named_buffers()), dict(wanted.named_buffers())),
    ):
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype, key
            assert torch.equal(ours[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key
    assert not any(parameter.requires_grad for parameter in got.parameters())


@pytest.mark.parametrize("scheme", ["plain", "fp8", "int8", "int4-weight", "nvfp4"])
def test_a_loaded_engine_is_the_model_quantised_in_memory(tmp_path: Path, scheme: str) -> None:
    weights = Weights(dit=scheme, folded=scheme, text=scheme, vision=scheme)  # type: ignore[arg-type]
    folder = built(tmp_path / "engine", profile(weights))
    got = load_engine_folder(folder, device="cpu")
    wanted = load(None, device="cpu", dtype=torch.bfloat16, vae_dtype=torch.float32)
    layers = {
        component: quantise_layers(
            wanted.dit if component in ("dit", "folded") else wanted.conditioner.model, component, scheme
        )  # type: ignore[arg-type]
        for component in ("dit", "folded", "text", "vision")
    }
    assert all(bool(found) == (scheme != "plain") for found in layers.values()), layers
    for ours, theirs in zip(modules(got), modules(wanted), strict=True):
        assert_same(ours, theirs)
        swapped = {name: layer.scheme for name, layer in theirs.named_modules() if isinstance(layer, QuantizedLinear)}
        assert swapped == {name: m.scheme for name, m in ours.named_modules() if isinstance(m, QuantizedLinear)}
    assert (got.name, got.digest, got.variant) == (wanted.name, wanted.digest, wanted.variant)
    assert got.conditioner.settings == wanted.conditioner.settings


def test_components_can_have_schemes_of_their_own(tmp_path: Path) -> None:
    folder = built(tmp_path / "engine", profile(Weights(dit="int8", vision="int4-weight")))
    got = load_engine_folder(folder, device="cpu")
    schemes = [{m.scheme for m in module.modules() if isinstance(m, QuantizedLinear)} for module in modules(got)]
    assert schemes == [{"int8"}, set(), {"int4-weight"}]
    assert not any(isinstance(layer, QuantizedLinear) for layer in got.conditioner.model.language_model.modules())


def test_every_tensor_lies_in_one_file(plain: Path) -> None:
    made = networks(EngineConfig.read(plain / "config.json"), load_profile("cpu"))
    for network in parts.NETWORKS:
        for key in made.of(network).state_dict():
            assert sum(part.holds(key) for part in PARTS if part.network == network) == 1, key


def test_modulations_can_stay_in_host_memory(plain: Path) -> None:
    """The meta device stands for a GPU."""
    config = EngineConfig.read(plain / "config.json")
    assert parts.load_profile_of(plain) == load_profile("cpu")
    dit = load_engine_folder(plain, device="cpu", residency=Residency(folded="host")).dit
    assert_same(dit, load_engine_folder(plain, device="cpu").dit)
    assert config.dit == dit.config
    assert any(is_modulation(key) for key in dit.state_dict())


def test_another_preset_of_the_same_version(plain: Path) -> None:
    own = load_engine_folder(plain, device="cpu")
    other = load_engine_folder(plain, device="cpu", variant="official-v1.1", fix_quotes=True)
    wanted = load(None, device="cpu", dtype=torch.float32, variant="official-v1.1", fix_quotes=True)
    assert own.variant != other.variant == wanted.variant
    assert other.dit.double_blocks[0].fp32_norms == wanted.dit.double_blocks[0].fp32_norms
    assert other.conditioner.settings == wanted.conditioner.settings
    with pytest.raises(InputError, match=r"preset official-v1\.0 is for v1\.0, the engine's weights are v1\.1"):
        load_engine_folder(plain, device="cpu", variant="v1.0")
    with pytest.raises(InputError, match="unknown variant 'nope'"):
        load_engine_folder(plain, device="cpu", variant="nope")


def test_embeddings_of_another_text_model_are_not_taken_for_its_own(plain: Path, tmp_path: Path) -> None:
    def text_digest(weights: Weights | None, dtype: str = "float32") -> str:
        folder = built(tmp_path / f"{weights} {dtype}", profile(weights, dtype))
        digest = load_engine_folder(folder, device="cpu").text_digest
        assert digest is not None
        return digest()

    same, fp8 = text_digest(Weights(dit="fp8")), text_digest(Weights(text="fp8"))
    own = load_engine_folder(plain, device="cpu").text_digest
    assert own is not None
    assert own() == same != fp8
    assert len({own(), fp8, text_digest(Weights(vision="fp8")), text_digest(None, "bfloat16")}) == 4


@pytest.mark.parametrize(
    ("fact", "value", "words"),
    [
        ("torch", "1.0", "made with torch 1.0, here is 2"),
        ("step1x-engine", "9", "made with step1x-engine 9, here is"),
        ("format", "0", "made with format 0, here is 1"),
        ("programs", "x", "made with programs x, here is"),
        ("architecture", "sm_90", "made with GPU sm_90, here is cpu"),
    ],
)
def test_an_engine_of_other_versions_is_refused(plain: Path, tmp_path: Path, fact: str, value: str, words: str) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(plain, folder)
    manifest = Manifest.read(folder)
    facts = dict(manifest.facts)
    if fact == "architecture":
        facts[fact] = value
    else:
        facts["versions"] = {**facts["versions"], fact: value}
    (folder / MANIFEST).write_bytes(Manifest(facts, manifest.files).text())
    with pytest.raises(InputError, match=f"{words}.*; build the engine again"):
        load_engine_folder(folder, device="cpu")


def test_the_architecture_is_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [architecture(device) for device in ("cpu", "mps")] == ["cpu", "mps"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [architecture(device) for device in ("auto", "cuda", "cuda:1")] == ["cpu", "none", "none"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    assert [architecture(device) for device in ("auto", "cuda", "cuda:1")] == ["sm_90", "sm_90", "sm_91"]


def test_an_engine_that_waits_for_its_gpu_can_be_loaded(tmp_path: Path) -> None:
    wanted = load_profile("bf16-80gb").model_copy(update={"compiled": True})
    folder = built(tmp_path / "engine", wanted)
    if not torch.cuda.is_available():
        facts = Manifest.read(folder).facts
        assert (facts["architecture"], facts["compilation"]) == ("none", "waits for a GPU")
    assert load_engine_folder(folder, device="cpu").dit.dtype == torch.bfloat16
