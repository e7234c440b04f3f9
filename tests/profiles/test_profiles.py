"""Profiles load, are closed and frozen, and every mistake in one is a single line."""

import os

import pytest
from pydantic import ValidationError

from step1x.profiles import Profile, default_profile, load_profile, profile_names

GOOD = 'description = "x"\ndevice = "cpu"\ndtype = "float32"\nvae_dtype = "float32"\n'


def test_what_ships():
    assert profile_names() == ["bf16-80gb", "cpu"]
    cpu, gpu = load_profile("cpu"), load_profile("bf16-80gb")
    assert (cpu.device, cpu.dtype, cpu.vae_dtype) == ("cpu", "float32", "float32")
    assert (gpu.device, gpu.dtype, gpu.vae_dtype) == ("cuda", "bfloat16", "bfloat16")
    for name in profile_names():
        assert load_profile(name).name == name
        assert load_profile(name).description


def test_the_default_follows_the_device():
    assert default_profile(cuda=False) == "cpu"
    assert default_profile(cuda=True) == "bf16-80gb"


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
        (GOOD.replace('"float32"', '"float16"'), "dtype: input should be 'float32' or 'bfloat16'"),
        (GOOD.replace('"cpu"', '"tpu"'), "device: "),
        (GOOD.replace('"cpu"', "0"), "device: "),
        (GOOD.replace('device = "cpu"\n', ""), "device: field required"),
        (GOOD + "device_memory_gb = -1\n", "device_memory_gb: "),
        (GOOD + 'device_memory_gb = "80"\n', "device_memory_gb: "),
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
        "fp9": "unknown profile 'fp9'; known: bf16-80gb, cpu",
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
