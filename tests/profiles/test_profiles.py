"""Profiles load, are closed and frozen, and every mistake in one is a single line."""

import os

import pytest
from pydantic import ValidationError

from step1x.profiles import Profile, load_profile, profile_names

GOOD = 'description = "x"\ndevice = "cpu"\ndtype = "float32"\nvae_dtype = "float32"\n'


def test_what_ships():
    shipped = ["bf16-24gb", "bf16-80gb", "cpu", "fp8-18gb", "fp8-24gb", "fp8-80gb", "int4-12gb", "int8-24gb"]
    assert profile_names() == shipped
    cpu, gpu = load_profile("cpu"), load_profile("bf16-80gb")
    assert (cpu.device, cpu.dtype, cpu.vae_dtype) == ("cpu", "float32", "float32")
    assert (gpu.device, gpu.dtype, gpu.vae_dtype) == ("cuda", "bfloat16", "bfloat16")
    for name in profile_names():
        assert load_profile(name).name == name
        assert load_profile(name).description


def test_a_profile_is_frozen():
    with pytest.raises(ValidationError):
        load_profile("cpu").dtype = "bfloat16"  # type: ignore[misc]


def test_a_file_anywhere(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    expected = Profile(name="mine", description="x", device="cpu", dtype="float32", vae_dtype="float32")
    assert load_profile(path) == expected
    assert load_profile(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        (GOOD + "stesp = 3\n", "unknown key 'stesp'; known: name, description, device"),
        (GOOD.replace("description", "discription"), "unknown key 'discription'"),
        (GOOD.replace('"float32"', '"float16"'), "dtype: input should be 'float32', 'bfloat16' or 'float64'"),
        (GOOD.replace('"cpu"', '"tpu"'), "device: "),
        (GOOD.replace('"cpu"', "0"), "device: "),
        (GOOD.replace('device = "cpu"\n', ""), "device: field required"),
        (GOOD + "budget_gb = -1\n", "budget_gb: "),
        (GOOD + 'budget_gb = "80"\n', "budget_gb: "),
        (GOOD + "budget_gb = inf\n", "budget_gb: "),
        (GOOD + "fp8_attention = [0.5, 0.2]\n", "fp8_attention: value error, must be two shares of the steps"),
        (GOOD + "fp8_attention = [0.5]\n", "fp8_attention.1: "),
        (GOOD + '[weights]\ndit = "fp7"\n', "weights.dit: "),
        (GOOD + '[weights]\nvae = "fp8"\n', "unknown key 'weights.vae'; known: dit, folded, text, vision"),
        (GOOD + '[residency]\ndit = "stream"\n', "residency: value error, stream_blocks above 0 goes with"),
        (GOOD + "[residency]\nstream_blocks = 3\n", "residency: value error, stream_blocks above 0 goes with"),
        (GOOD + 'name = ""\n', "name: "),
        ("not toml", "not TOML"),
        ("\udcff", "not UTF-8"),
        ("", "field required"),
        ("#" * 70_000, "larger than"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, needle):
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"profile '.*bad\.toml': ") as caught:
        load_profile(path)
    assert needle in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_lead_nowhere(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    for name, needle in {
        "fp9": "unknown profile 'fp9'; known: bf16-24gb, bf16-80gb, cpu",
        "": "unknown profile",
        "../profiles/cpu": "unknown profile",
        str(tmp_path / "gone.toml"): "no such file",
        str(tmp_path / "pipe.toml"): "no such file",
        str(tmp_path): "unknown profile",
        "a\0.toml": "no such file",
        "n" * 300 + ".toml": ".toml': ",
    }.items():
        with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
            load_profile(name)
        assert needle in str(caught.value)
