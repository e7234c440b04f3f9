"""Schedule, guidance, packing, sizes and pixels against values recorded from the reference code."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from step1x.engine import image, schedule
from step1x.engine.errors import InputError
from step1x.engine.image import Canvas
from step1x.engine.variants import variant

GOLDEN = Path(__file__).parent.parent / "golden"
BOUND = 1e-5

pytestmark = pytest.mark.golden


def worst(file: str, group: str, pairs: list[tuple[Tensor, Tensor]], bound: float = BOUND) -> None:
    """Asserts a bound on max|a - b| / max|b| of every pair and prints the worst."""
    assert pairs
    assert all(got.shape == wanted.shape for got, wanted in pairs)
    error = max(((got - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in pairs)
    print(f"golden {file} {group} worst={error:.1e}")
    assert error <= bound


def metadata(file: str) -> dict[str, str]:
    with safe_open(GOLDEN / file, "pt") as opened:
        return opened.metadata()


def schedules() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "schedule.json").read_text())["cases"]


def test_golden_schedule() -> None:
    official, sigmas, mus = [], [], []
    for case in schedules():
        got = schedule.timesteps(case["num_steps"], case["image_seq_len"])
        official.append((got, torch.tensor(case["official_timesteps"])))
        sigmas.append((got, torch.tensor(case["diffusers_sigmas"])))
        sigmas.append((got[:-1] * 1000, torch.tensor(case["diffusers_timesteps"])))
        mus.append((torch.tensor(math.log(schedule.shift(case["image_seq_len"]))), torch.tensor(case["mu"])))
    for group, pairs in (("official", official), ("diffusers", sigmas), ("mu", mus)):
        worst("schedule.json", group, pairs, 1e-6)


@pytest.mark.parametrize("loop", ["official", "diffusers"])
def test_golden_guidance(loop: str) -> None:
    recorded = load_file(GOLDEN / "cfg.safetensors")
    scale = float(metadata("cfg.safetensors")["guidance"])
    pairs = []
    for key, wanted in recorded.items():
        if key.startswith(loop):
            above, t = key.removeprefix(f"{loop}.trunc").removesuffix(".guided").split(".t")
            rescaled = float(t) > float(above)
            pairs.append((schedule.guided(recorded["in.cond"], recorded["in.uncond"], scale, rescaled), wanted))
    worst("cfg.safetensors", f"{loop}.*.guided", pairs)


def test_golden_guidance_divisor() -> None:
    recorded = load_file(GOLDEN / "cfg.safetensors")
    difference = recorded["in.cond"] - recorded["in.uncond"]
    prefix = "process_diff_norm_k"
    keys = [key for key in recorded if key.startswith(prefix)]
    pairs = [(schedule.rescale(difference, float(key.removeprefix(prefix))), recorded[key]) for key in keys]
    worst("cfg.safetensors", f"{prefix}*", pairs)


def test_golden_packing() -> None:
    recorded = load_file(GOLDEN / "packing.safetensors")
    latent, reference = recorded["in.latent"], recorded["in.ref_latent"]
    grid = (latent.shape[2] // 2, latent.shape[3] // 2)
    tokens = image.pack(latent)
    assert torch.equal(tokens, recorded["diffusers.packed"])
    assert torch.equal(image.pack(reference), recorded["v1p1.image_latents"])
    assert torch.equal(torch.cat((tokens, image.pack(reference)), dim=1), recorded["official.img"])
    assert torch.equal(image.unpack(tokens, grid), latent)
    print("golden packing.safetensors tokens worst=0.0e+00")


def test_golden_packing_ids() -> None:
    recorded = load_file(GOLDEN / "packing.safetensors")
    latent = recorded["in.latent"]
    grid = (latent.shape[2] // 2, latent.shape[3] // 2)
    official = image.image_ids(grid, variant("official-v1.0").reference_ids)
    assert torch.equal(official.expand(latent.shape[0], -1, -1), recorded["official.img_ids"])
    for prefix, name in (("v1p1", "diffusers-v1.1"), ("v1p2", "diffusers-v1.2")):
        wanted = torch.cat((recorded[f"{prefix}.latent_ids"], recorded[f"{prefix}.image_ids"]))
        assert torch.equal(image.image_ids(grid, variant(name).reference_ids)[0], wanted)
    print("golden packing.safetensors ids worst=0.0e+00")


def test_golden_sizes() -> None:
    rows = json.loads((GOLDEN / "resize.json").read_text())["rows"]
    refused = checked = 0
    for row in rows:
        for key, wanted in row.items():
            if not key.startswith(("official_", "v1p1_", "v1p2_")):
                continue
            level = int(key.rpartition("_")[2])
            checked += 1
            if isinstance(wanted, dict):
                refused += 1
                with pytest.raises(InputError, match="too narrow"):
                    image.fit(row["w"], row["h"], level)
            else:
                assert list(image.fit(row["w"], row["h"], level)) == wanted, (key, row["w"], row["h"])
    assert checked >= 7 * len(rows) > 0
    print(f"golden resize.json sizes={checked} refused={refused} worst=0.0e+00")


def picture(pixels: Tensor) -> Image.Image:
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.numpy().tobytes())


def test_golden_resized_bytes() -> None:
    recorded = load_file(GOLDEN / "image_resize.safetensors")
    source = picture(recorded["in.image_uint8_hwc"])
    names = {"v1p0_pil_default_bicubic_uint8_hwc": "official-v1.0", "v1p1_lanczos_uint8_hwc": "official-v1.1"}
    for name, row in names.items():
        for direction in ("down", "up"):
            wanted = recorded[f"{direction}.{name}"]
            canvas = Canvas(wanted.shape[1], wanted.shape[0])
            got = image.resized(source, canvas, variant(row).resize)
            assert got.tobytes() == wanted.numpy().tobytes(), (name, direction)
    print("golden image_resize.safetensors *_uint8_hwc worst=0.0e+00")


def test_golden_resized_pixels() -> None:
    recorded = load_file(GOLDEN / "image_resize.safetensors")
    source = picture(recorded["in.image_uint8_hwc"])
    names = {
        "down.v1p1_preprocessed": "diffusers-v1.1",
        "down.v1p2_bilinear_antialias": "diffusers-v1.2",
        "up.v1p2_bilinear_antialias": "diffusers-v1.2",
    }
    pairs = []
    for name, row in names.items():
        wanted = recorded[name]
        canvas = Canvas(wanted.shape[3], wanted.shape[2])
        pairs.append((image.pixels(source, canvas, variant(row).resize), wanted))
    worst("image_resize.safetensors", "pixels", pairs)


@pytest.mark.parametrize(
    ("key", "row"),
    [("v1p0_to_pil_uint8_hwc", "official-v1.0"), ("v1p1_postprocess_uint8_hwc", "diffusers-v1.1")],
)
def test_golden_output_bytes(key: str, row: str) -> None:
    recorded = load_file(GOLDEN / "image_resize.safetensors")
    got = image.to_image(recorded["in.decoded"][0], variant(row).truncate_output)
    wanted = recorded[key]
    assert (got.mode, got.size) == ("RGB", (wanted.shape[1], wanted.shape[0]))
    assert got.tobytes() == wanted.numpy().tobytes()
    print(f"golden image_resize.safetensors {key} worst=0.0e+00")
