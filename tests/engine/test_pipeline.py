"""The engine on a small random model of every preset, and on the bundled checkpoint."""

import io
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from step1x.bench.counters import photograph
from step1x.engine import Edit, Engine, edit, pipeline
from step1x.engine.denoise import Loop, denoise
from step1x.engine.dit import DiT
from step1x.engine.embeddings import EmbeddingCache
from step1x.engine.errors import InputError
from step1x.engine.executor import Execution
from step1x.engine.pipeline import EASINGS
from step1x.engine.plan import spelled
from step1x.engine.policy import RefFreeze
from step1x.engine.skipping import Done, Skipping, skip
from step1x.engine.text import Conditioner
from step1x.engine.timing import STAGES
from step1x.engine.vae import VAE, VAEConfig
from step1x.engine.variants import VARIANTS, Variant
from step1x.engine.weights import Components
from step1x.training.edits import coverage, painted, rgb
from step1x.training.recipe import dit_config
from step1x.training.tokenizer import count_template_tokens, small_text_model, train_tokenizer

OWN = "description = ''\ndevice = 'cpu'\ndtype = 'float32'\nvae_dtype = 'float32'\n"  # a profile
PHOTO = Path(__file__).parent.parent.parent / "docs" / "pictures" / "coffee.jpg"
VAE_CONFIG = VAEConfig(
    in_channels=3, channels=(8, 8, 8, 8), res_blocks=1, z_channels=16, groups=2, scale_factor=0.5, shift_factor=0.1
)


def small(preset: str, dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    """An engine with random weights, one block of each kind, and a picture of four text tokens."""
    from transformers import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    row: Variant = VARIANTS[preset]
    tokenizer = train_tokenizer([row.prefix, "make it darker"], 300)
    cut = count_template_tokens(tokenizer, row.prefix)
    row = row.override(
        {
            "template_tokens": cut,
            "text_tokens": 40,
            "min_pixels": 4 * 784,
            "max_pixels": 4 * 784,
            "size": 48,
            "steps": 3,
        }
    )
    sizes = {"vision_hidden": 16, "vision_depth": 1, "vision_heads": 2, "vision_intermediate": 16}
    model = small_text_model(tokenizer, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=32, **sizes)
    config = dit_config(32, 1, 1, 32)
    connector = replace(config.connector, has_scale_factor=row.version == "v1.0")
    config = replace(config, connector=connector, text_token_mapping=row.version == "v1.2")
    dit, vae = DiT(config, row.dtype_flow != "pure"), VAE(VAE_CONFIG)
    for module in (dit, vae):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        module.eval().requires_grad_(False)
    conditioner = Conditioner(model.to(dtype).eval(), tokenizer, Qwen2VLImageProcessorPil(), row)
    return Engine(Components(row, dit.to(dtype), vae, conditioner, "small", "0" * 64), Execution(**options))


def photo(width: int = 60, height: int = 45, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", sorted(VARIANTS))
def test_every_preset_edits(preset: str, dtype: torch.dtype) -> None:
    engine, calls, stages = small(preset, dtype), [], []
    result = engine.edit(
        photo(), "make it darker", seed=3, on_step=lambda *step: calls.append(step), on_stage=stages.append
    )
    assert result.image.size == (60, 45)
    assert result.image.mode == "RGB"
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert list(result.timings) == stages == [stage for stage in STAGES if stage != "save"]
    assert len(result.steps) == 3
    assert 0 < sum(result.steps) <= result.timings["denoise"]
    assert result.metadata["variant"] == preset
    assert result.metadata["instruction"] == "make it darker"
    again = engine.edit(photo(), "make it darker", seed=3)
    assert again.image.tobytes() == result.image.tobytes()
    other = engine.edit(photo(), "make it darker", seed=4)
    assert other.image.tobytes() != result.image.tobytes()


@pytest.mark.parametrize("preset", sorted(VARIANTS))
def test_a_batch_equals_single_edits(preset: str) -> None:
    engine = small(preset)
    sources, words, seeds = [photo(seed=1), photo(seed=2)], ["make it darker", "变暗"], [5, 6]
    batch = engine.edit_batch(sources, words, seeds=seeds)
    for one, source, text, seed in zip(batch, sources, words, seeds, strict=True):
        alone = engine.edit(source, text, seed=seed)
        assert difference(one.image, alone.image) <= 1  # a level of 255 where rounding tips
        assert (one.seed, one.metadata) == (alone.seed, alone.metadata)


def test_threads_do_not_meet() -> None:
    engines = {preset: small(preset) for preset in ("official-v1.0", "diffusers-v1.1")}
    alone = {preset: engine.edit(photo(), "make it darker", seed=1).image for preset, engine in engines.items()}
    found: dict[str, list[Image.Image]] = {preset: [] for preset in engines}

    def work(preset: str) -> None:
        for _ in range(3):
            found[preset].append(engines[preset].edit(photo(), "make it darker", seed=1).image)

    threads = [threading.Thread(target=work, args=(preset,)) for preset in engines for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for preset, images in found.items():
        assert len(images) == 6
        assert all(image.tobytes() == alone[preset].tobytes() for image in images)


def test_options_act() -> None:
    engine = small("diffusers-v1.1")
    base = engine.edit(photo(), "make it darker", seed=1)

    def changed(**options: object) -> float:
        return difference(engine.edit(photo(), "make it darker", seed=1, **options).image, base.image)

    assert changed() == 0
    assert changed(negative_prompt="") == 0
    assert changed(guidance=engine.variant.guidance, steps=3, size=48) == 0
    for options in (
        {"negative_prompt": "blurry"},
        {"guidance": 1.0},
        {"steps": 2},
        {"size": 64},
        {"strength": 0.5},
        {"posterior": "mean"},
    ):
        assert changed(**options) > 0, options


@pytest.mark.parametrize("branches", [None, "batched", "sequential"])
@pytest.mark.parametrize("preset", VARIANTS)
def test_exact_algebra_changes_rounding_only(preset: str, branches: str | None) -> None:
    engine = small(preset)
    plain = engine.edit(photo(), "make it darker", seed=1, guidance=3.0, exact_algebra=False)
    exact = engine.edit(photo(), "make it darker", seed=1, guidance=3.0, branches=branches)
    assert difference(plain.image, exact.image) <= 1


@pytest.mark.parametrize(("dtype", "decibels"), [(torch.float32, 60), (torch.bfloat16, 45)], ids=["fp32", "bf16"])
def test_exact_algebra_with_the_bundled_checkpoint(dtype: torch.dtype, decibels: float) -> None:
    engine = Engine.load(device="cpu", dtype=dtype)
    with Image.open(PHOTO) as source:
        pictures = [
            engine.edit(source, "make it black and white", seed=3, size=128, guidance=1.5, exact_algebra=on).image
            for on in (False, True)
        ]
    plain, exact = (np.asarray(picture, dtype=np.float64) for picture in pictures)
    error = np.square(plain - exact).mean()
    psnr = 10 * np.log10(255**2 / error) if error else np.inf
    print(f"{dtype}: {psnr:.1f} dB between plain and rewritten path")
    assert psnr >= decibels


@pytest.mark.parametrize("name", ["sdpa", "merged"])
@pytest.mark.parametrize("preset", ["official-v1.1", "diffusers-v1.2"])
def test_attention_backends_agree(preset: str, name: str) -> None:
    """v1.2 in one batch masks rows out, which `merged` cannot, so `sdpa` does it."""
    pictures = [
        small(preset, **options).edit(photo(), "make it darker", seed=1, guidance=3.0, branches="batched").image
        for options in ({}, {"attention": name})
    ]
    assert difference(*pictures) <= 1


def test_an_attention_that_is_not_there() -> None:
    for name in ("triton", "fast"):
        with pytest.raises(InputError, match="not available on cpu: auto, sdpa, merged"):
            small("official-v1.1", attention=name)


def test_strength_runs_the_last_steps_only() -> None:
    calls: list[tuple[int, int]] = []
    engine = small("official-v1.1")
    result = engine.edit(
        photo(), "make it darker", seed=1, steps=4, strength=0.5, on_step=lambda *step: calls.append(step)
    )
    assert calls == [(1, 2), (2, 2)]
    assert result.metadata["strength"] == 0.5


def test_text_to_image() -> None:
    result = small("official-v1.1").generate("a red circle", width=48, height=32, seed=1, steps=2)
    assert result.image.size == (48, 32)
    assert str(result.metadata["negative_prompt"]).startswith("worst quality")
    with pytest.raises(InputError, match=r"needs a v1\.1"):
        small("official-v1.0").generate("a red circle")
    with pytest.raises(InputError, match="multiples of 16"):
        small("official-v1.1").generate("a red circle", width=50, height=32)


def test_transparency_comes_back() -> None:
    source = photo().convert("RGBA")
    alpha = Image.linear_gradient("L").resize(source.size)
    source.putalpha(alpha)
    result = small("diffusers-v1.1").edit(source, "make it darker", seed=1)
    assert result.image.mode == "RGBA"
    assert result.image.getchannel("A").tobytes() == alpha.tobytes()


def test_bad_batches_are_refused() -> None:
    engine = small("official-v1.1")
    with pytest.raises(InputError, match="as many sources"):
        engine.edit_batch([photo()], ["one", "two"])
    with pytest.raises(InputError, match="must come out at one size"):
        engine.edit_batch([photo(), photo(30, 60)], ["one", "two"])


def test_bad_options_and_sizes_are_refused() -> None:
    engine = small("official-v1.1")
    for options, message in (({"size": 8}, "below 16 pixels"), ({"steps": 0}, "steps"), ({"seed": -1}, "seed must be")):
        with pytest.raises(InputError, match=message):
            engine.edit(photo(), "make it darker", **options)


def psnr(image: Image.Image, target: np.ndarray) -> float:
    error = (np.asarray(image, np.float64) - target) ** 2
    return float(10 * np.log10(255**2 / error.mean()))


def inverted(picture: np.ndarray) -> np.ndarray:
    return 1 - picture


def grey(picture: np.ndarray) -> np.ndarray:
    return np.repeat((picture @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)


def flattened(picture: np.ndarray) -> np.ndarray:
    return (picture - 0.5) * 0.5 + 0.5


def blue_square(picture: np.ndarray) -> np.ndarray:
    return painted(picture, coverage("square", "top left", picture.shape[:2]), "blue")


def left_half_blue(picture: np.ndarray) -> np.ndarray:
    half = picture.copy()
    half[:, : picture.shape[1] // 2] = rgb("blue")
    return half


def lower_half_purple(picture: np.ndarray) -> np.ndarray:
    half = picture.copy()
    half[picture.shape[0] // 2 :] = rgb("purple")
    return half


@pytest.mark.parametrize(
    ("instruction", "make"),
    [
        ("invert the colours", inverted),
        ("反转颜色", inverted),
        ("decrease the contrast", flattened),
        ("make it black and white", grey),
        ("make it darker", lambda picture: picture * 0.5),
        ("调亮一点", lambda picture: 1 - (1 - picture) * 0.6),
        ("paint the left half blue", left_half_blue),
        ("把下半部分涂成紫色", lower_half_purple),
        ("add a blue square at the top left", blue_square),
        ("在左上角加一个蓝色的方块", blue_square),
    ],
)
def test_the_bundled_checkpoint_edits_a_photograph(
    instruction: str, make: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    source = Image.open(PHOTO).convert("RGB").resize((288, 208))
    result: Edit = edit(source, instruction, seed=0)
    target = make(np.asarray(source) / 255) * 255
    assert psnr(result.image, target) > psnr(source, target) + 3
    result.save(tmp_path / "out.png")
    reopened = Image.open(io.BytesIO((tmp_path / "out.png").read_bytes()))
    assert reopened.text["instruction"] == instruction  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to tell memory")
def test_two_hundred_edits_leave_memory_flat() -> None:
    """Of as many pictures, at three sizes."""
    cache = EmbeddingCache(disk_bytes=0, memory_bytes=2_000_000)
    engine, resident = Engine.load(device="cpu", cache=cache), []
    for index in range(200):
        shown = photograph(64 + 16 * (index % 3), 64, index)
        engine.edit(shown, "make it darker", size=64, steps=1, seed=index)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert max(resident[150:]) - max(resident[:50]) < 8_000_000  # one of these edits makes 5 MB of embeddings


class Full:
    """Stands in for a method that runs out of GPU memory in its first calls."""

    def __init__(self, method: Callable[..., Any], times: int) -> None:
        self.method, self.left = method, times

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.method(*args, **options)


@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_out_of_memory_is_eased_step_by_step(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Engine.load(device="cpu", cache=False).edit(photo(), "make it darker", seed=1, guidance=2.0)
    engine = Engine.load(device="cpu", cache=False)
    monkeypatch.setattr(engine.vae, "decode", Full(engine.vae.decode, times))
    found = engine.edit(photo(), "make it darker", seed=1, guidance=2.0, branches="batched")
    eased = [name for name in EASINGS if "keys" not in name and "CUDA" not in name]  # dense steps keep none
    assert found.metadata["out_of_memory"] == ", ".join(eased[:times])
    assert difference(found.image, expected.image) <= 1
    again = engine.edit(photo(), "make it darker", seed=1, guidance=2.0)  # by what it has learned
    assert "out_of_memory" not in again.metadata
    assert difference(again.image, expected.image) <= 1
    assert "out_of_memory" not in expected.metadata


def test_keys_and_values_get_8_bits_before_blocks_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(device="cpu", cache=False)
    monkeypatch.setattr(engine.vae, "decode", Full(engine.vae.decode, 3))
    found = engine.edit(photo(), "make it darker", seed=1, steps=8, size=96, policy=RefFreeze())
    assert found.metadata["out_of_memory"] == "autoencoder in strips, text model evicted, keys and values in 8 bits"


def test_out_of_memory_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(device="cpu", cache=False)
    monkeypatch.setattr(engine.vae, "decode", Full(engine.vae.decode, 9))
    with pytest.raises(InputError, match=r"out of GPU memory at .* also after: autoencoder in strips, .*smaller size"):
        engine.edit(photo(), "make it darker", seed=1, branches="sequential", guidance=2.0)


def test_attention_in_8_bits_for_some_of_the_steps() -> None:
    """As all of them would have it in the first half, as none would from there."""
    results = {}
    for name, stretch in {"none": None, "first": (0.0, 0.5), "all": (0.0, 1.0)}.items():
        engine = Engine.load(device="cpu", cache=False, fp8_attention=stretch)
        results[name] = engine.edit(photo(), "make it darker", seed=1, steps=2, size=64).image
    assert 0 < difference(results["none"], results["first"]) <= 32
    assert difference(results["first"], results["all"]) > 0


def test_a_profile_says_how_edits_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its file sets, and no more; options go before it."""
    seen: list[tuple[str | None, int, bool]] = []

    def skipped(dit: DiT, loop: Loop, state: Any, skipping: Skipping, *rest: Any) -> Done:
        done = skip(dit, loop, state, skipping, *rest)
        seen.append((spelled(done.steps), len(loop.forwards), skipping.eight_bit))
        return done

    def dense(dit: DiT, loop: Loop, *rest: Any) -> torch.Tensor:
        seen.append((None, len(loop.forwards), False))
        return denoise(dit, loop, *rest)

    def run(line: str, **options: object) -> tuple[str | None, int, bool]:
        (tmp_path / "own.toml").write_text(f"{OWN}{line}")
        engine = Engine.load(profile=tmp_path / "own.toml", cache=False)
        engine.edit(photo(), "make it darker", seed=1, steps=8, size=64, guidance=2.0, **options)
        return seen.pop()

    monkeypatch.setattr(pipeline, "skip", skipped)
    monkeypatch.setattr(pipeline, "denoise", dense)
    assert run("") == (None, 2, False)
    assert run("branches = 'batched'") == (None, 1, False)
    assert run("branches = 'batched'", branches="sequential") == (None, 2, False)
    plan = run("", speed="balanced")[0]
    assert plan is not None
    assert run("speed = 'balanced'") == (plan, 2, False)
    assert run("speed = 'balanced'", speed="exact") == (None, 2, False)
    assert run("speed = 'balanced'\nkv_dtype = 'float8'\nbranches = 'batched'") == (plan, 1, True)


def test_guidance_that_is_one_by_one_already_is_not_eased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.toml").write_text(f"{OWN}branches = 'sequential'")
    engine = Engine.load(profile=tmp_path / "own.toml", variant="official-v1.1", cache=False)
    assert engine.variant.batched_guidance
    monkeypatch.setattr(engine.vae, "decode", Full(engine.vae.decode, 3))
    found = engine.edit(photo(), "make it darker", seed=1, guidance=2.0)
    assert found.metadata["out_of_memory"] == "autoencoder in strips, text model evicted, blocks streamed"
