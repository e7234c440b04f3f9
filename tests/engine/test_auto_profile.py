"""What "auto" takes on each card, by the plans of the released v1.1 at 1024."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from step1x.bench.cards import CARDS, Card
from step1x.engine import auto_profile, planner
from step1x.engine.auto_profile import chosen, fit, fitting_profile, for_device, gpu_profiles, sizes_at_hand
from step1x.engine.engine_config import model_sizes
from step1x.engine.errors import InputError
from step1x.engine.hollow import ModelSizes
from step1x.engine.loading import wanted_profile
from step1x.profiles import load_profile, profile_names

HOST = 64 * 10**9
MIB = 1 << 20


@cache
def sizes(model: str | None = "v1.1") -> ModelSizes:
    return model_sizes(model)


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("T4", None),
        ("V100", None),
        ("A10G", "bf16-24gb"),
        ("RTX 3090", "int8-24gb"),
        ("RTX A6000", "bf16-24gb"),
        ("A100 40GB", "bf16-24gb"),
        ("A100 80GB", "bf16-80gb"),
        ("L4", "bf16-24gb"),
        ("L40S", "bf16-24gb"),
        ("RTX 4090", "fp8-24gb"),
        ("RTX 5090", "fp8-24gb"),
        ("RTX 4080", "fp8-18gb"),
        ("H100", "bf16-80gb"),
        ("H200", "bf16-80gb"),
        ("B200", "bf16-80gb"),
    ],
)
def test_each_card(card: str, name: str | None) -> None:
    if name is not None:
        found = chosen(sizes(), CARDS[card], HOST)
        assert (found.profile, found.fits, found.fast) == (name, True, True)
        assert 0 < found.peak <= CARDS[card].total_memory
        return
    with pytest.raises(InputError) as error:
        chosen(sizes(), CARDS[card], HOST)
    assert "\n" not in str(error.value)
    for words in (CARDS[card].name, "int4-12gb, takes compute capability 8.0, 9.0 GB of GPU memory", "--profile cpu"):
        assert words in str(error.value)


def test_the_table_has_every_card() -> None:
    marks = test_each_card.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert [card for card, _ in marks] == list(CARDS)


@pytest.mark.parametrize(
    ("card", "host", "name"),
    [
        (CARDS["A10G"], 16, "int8-24gb"),  # bf16-24gb pins 22 GB of the host
        (CARDS["L4"], 16, "fp8-24gb"),
        (CARDS["L4"], 6, None),
        (Card("NVIDIA GeForce RTX 4070", 12_282 * MIB, (8, 9), 46), 64, "int4-12gb"),  # not fast, but it fits
        (Card("NVIDIA GeForce RTX 3060", 12_044 * MIB, (8, 6), 28), 64, "int4-12gb"),
        (Card("NVIDIA RTX 4000 Ada Generation", 20_048 * MIB, (8, 9), 48), 64, "fp8-18gb"),
        (Card("NVIDIA GeForce RTX 4060", 8_188 * MIB, (8, 9), 24), 64, None),
    ],
)
def test_memory_of_card_and_host(card: Card, host: int, name: str | None) -> None:
    if name is None:
        with pytest.raises(InputError, match="no profile fits"):
            chosen(sizes(), card, host * 10**9)
        return
    found = chosen(sizes(), card, host * 10**9)
    assert found.profile == name
    assert found.fast == (name != "int4-12gb")


def test_a_small_model_is_not_chosen_by_the_rate_of_products() -> None:
    assert {chosen(sizes(None), CARDS[card], HOST).profile for card in ("RTX 4080", "H100")} == {"bf16-80gb"}


def test_the_order_is_by_how_faithful_a_profile_is() -> None:
    assert [one.name for one in gpu_profiles()] == [
        *("bf16-80gb", "bf16-24gb", "fp8-80gb", "fp8-24gb", "fp8-18gb", "int8-24gb", "int4-12gb"),
    ]
    assert {one.name for one in gpu_profiles()} == {*profile_names()} - {"cpu"}


def test_a_plan_is_for_what_differs_from_the_profile() -> None:
    """In float32 the transformer of bf16-24gb takes twice its bytes."""
    plain, twice = (chosen(sizes(), CARDS["H100"], HOST, {"dtype": dtype}) for dtype in ("bfloat16", "float32"))
    assert (plain.profile, twice.profile) == ("bf16-80gb", "fp8-80gb")
    with pytest.raises(InputError, match=r"int4-12gb, takes compute capability 8\.0, 11\.8 GB"):
        chosen(sizes(), CARDS["A100 40GB"], HOST, {"dtype": "float32"})


def test_reasons() -> None:
    def reason(name: str, card: str, host: int = HOST) -> str:
        return fit(sizes(), load_profile(name), CARDS[card], host, small=False).reason

    assert reason("fp8-24gb", "RTX 3090") == "needs compute capability 8.9, has 8.6"
    assert reason("bf16-80gb", "RTX 3090").startswith("weights take 4")
    assert reason("bf16-24gb", "RTX 3090") == "plans 22.2 GB; a GeForce card multiplies bfloat16 at half rate"
    assert reason("bf16-24gb", "L4", 10**10) == "pins 22.0 GB of host memory, 10.0 GB are free"
    assert reason("int4-12gb", "L4") == "plans 9.0 GB; weights are dequantized in every step"
    tight = Card("NVIDIA L4", 22_100_000_000, (8, 9), 58)
    assert fit(sizes(), load_profile("bf16-24gb"), tight, HOST, small=False).reason == "plans 22.2 GB of 22.1 GB"


def test_what_fits_below_a_profile() -> None:
    found = fitting_profile("v1.1", CARDS["RTX 4090"], below=load_profile("bf16-80gb"), host=HOST)
    assert found == "--profile fp8-24gb fits, it takes 23.5 GB"
    found = fitting_profile("v1.1", CARDS["RTX 4090"], below=load_profile("fp8-24gb"), host=HOST)
    assert found == "--profile fp8-18gb fits, it takes 14.5 GB"
    assert fitting_profile("v1.1", CARDS["RTX 4090"], below=load_profile("int4-12gb"), host=HOST) is None


def machine(monkeypatch: pytest.MonkeyPatch, *cards: Card) -> None:
    found = [
        SimpleNamespace(
            name=card.name,
            total_memory=card.total_memory,
            major=card.capability[0],
            minor=card.capability[1],
            multi_processor_count=card.multiprocessors,
        )
        for card in cards
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(auto_profile, "free_host_memory", lambda: HOST)


def test_the_card_of_the_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, CARDS["H100"], CARDS["RTX 4080"])
    assert [for_device(device, "v1.1") for device in ("auto", "cuda", "cuda:0")] == ["bf16-80gb"] * 3
    assert for_device("cuda:1", "v1.1") == "fp8-18gb"
    assert for_device("cpu", "v1.1") == for_device("mps", "v1.1") == "cpu"
    with pytest.raises(InputError, match=r"device 'cuda:2' cannot be used here: there are 2 CUDA devices"):
        for_device("cuda:2", "v1.1")
    for name in (None, "auto"):
        wanted = wanted_profile(name, {"device": "cuda:1", "compiled": True}, "v1.1")
        assert (wanted.name, wanted.device, wanted.compiled) == ("fp8-18gb", "cuda:1", True)
    assert wanted_profile(None, {}, "v1.1") == load_profile("bf16-80gb")
    assert wanted_profile(None, {"device": "cpu"}, "v1.1") == load_profile("cpu")


def test_without_cuda_nothing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr(planner, "plan", refused)
    monkeypatch.setattr(auto_profile, "sizes_at_hand", refused)
    assert {for_device(device, None) for device in ("auto", "cuda", "cpu")} == {"cpu"}


def test_a_model_that_is_still_on_the_hub_is_taken_for_a_released_one(tmp_path: Path) -> None:
    assert sizes_at_hand("nobody/has-this-one@main").name == "v1.1"
    assert sizes_at_hand(None).name == "step1x-tiny"
    with pytest.raises(InputError, match="no such folder"):
        sizes_at_hand("./not-there")
