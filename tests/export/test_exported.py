"""Exported engines behind the engine's own interfaces: here the entries are run in plain torch, without a library."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from step1x.engine import Engine
from step1x.engine.backends import Backend, with_exported
from step1x.engine.denoise import Runner
from step1x.engine.dit import DiT, Step, Text
from step1x.engine.engine_config import CONFIG, EngineConfig
from step1x.engine.errors import InputError
from step1x.engine.folder import locate
from step1x.engine.fused import Fused
from step1x.engine.image import image_ids
from step1x.engine.kept import Active, Kept
from step1x.engine.request import Edit
from step1x.engine.store import canonical
from step1x.engine.vae import VAE, VAEConfig
from step1x.engine.weights import Components, load
from step1x.export import exported
from step1x.export.core import LARGEST_BATCH, Inputs, RowsCore, RowsInputs, RowsOutputs, StepCore
from step1x.export.exported import runner_of, take_halves
from step1x.training.recipe import dit_config

TEXT, GRID = 5, (2, 3)
TARGET = GRID[0] * GRID[1]


class Eager:
    """The entries as they are, and how often each ran."""

    def __init__(self, dit: DiT, vae: VAE) -> None:
        self.dit, self.vae = dit, vae
        self.halves = vae.encoder.forward, vae.decoder.forward
        self.ran: list[tuple[str, int]] = []

    def step(self, inputs: Inputs) -> Tensor:
        self.ran.append(("step", len(inputs.text)))
        return StepCore(self.dit)(*inputs)

    def rows(self, inputs: RowsInputs) -> RowsOutputs:
        self.ran.append(("rows", len(inputs.text)))
        return RowsOutputs(*RowsCore(self.dit)(*inputs))

    def encode(self, pixels: Tensor) -> Tensor:
        self.ran.append(("encode", len(pixels)))
        return self.halves[0](pixels)

    def decode(self, latents: Tensor) -> Tensor:
        self.ran.append(("decode", len(latents)))
        return self.halves[1](latents)


@pytest.fixture
def dit() -> DiT:
    torch.manual_seed(0)
    made = DiT(dit_config(64, 2, 2, 32))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval().requires_grad_(False)


@pytest.fixture
def vae() -> VAE:
    sizes = {"in_channels": 3, "channels": (4, 8), "res_blocks": 1, "z_channels": 4, "groups": 2}
    return VAE(VAEConfig(**sizes, scale_factor=0.5, shift_factor=0.1)).eval().requires_grad_(False)


def arguments(dit: DiT, batch: int) -> tuple[Tensor, Step, tuple[Tensor, Tensor]]:
    text = Text(torch.randn(batch, TEXT, dit.config.connector.in_channels), torch.ones(batch, TEXT))
    step = dit.condition(dit.prepare(text), torch.full((batch,), 0.4))
    rope = dit.rope(torch.zeros(1, TEXT, 3), image_ids(GRID, (0, 0, 3)))
    return torch.randn(batch, 2 * TARGET, dit.config.in_channels), step, rope


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_step_in_pieces_of_what_an_engine_takes(dit: DiT, vae: VAE, batch: int) -> None:
    run, given = Eager(dit, vae), arguments(dit, batch)
    found = runner_of(run, None).velocity(*given, TARGET)
    torch.testing.assert_close(found, Fused(dit).velocity(*given, TARGET), rtol=1e-5, atol=1e-5)
    assert [count for _, count in run.ran] == [min(LARGEST_BATCH, batch - at) for at in range(0, batch, LARGEST_BATCH)]


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("batch", [2, 3])
def test_rows_keep_what_the_engines_own_keep(dit: DiT, vae: VAE, batch: int, eight_bit: bool) -> None:
    fused, runner = Fused(dit), runner_of(Eager(dit, vae), None)
    assert runner.rows is not None
    tokens, step, rope = arguments(dit, batch)
    image = torch.tensor([[4, 1, 9]])
    stores = [Kept(dit, batch, TEXT + 2 * TARGET, eight_bit=eight_bit) for _ in range(2)]
    for run, kept in zip((fused.velocity, runner.rows), stores, strict=True):
        run(tokens, step, rope, TARGET, Active.all(kept, TEXT))
    made = []
    for run, kept in zip((fused.velocity, runner.rows), stores, strict=True):
        active = Active.of(kept, image, TEXT)
        made.append(run(active.gathered(1.1 * tokens), step, active.rope(rope), None, active))
    bound = 0.05 if eight_bit else 1e-5  # the exported step sees the rows that it computes before they are rounded
    assert distance(made[1], made[0]) < bound
    for ours, theirs in zip(stores[1].blocks, stores[0].blocks, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            values = [store if isinstance(store, Tensor) else store.read(torch.float32) for store in (one, other)]
            assert distance(*values) < bound


def test_text_to_image_is_pytorchs(dit: DiT, vae: VAE) -> None:
    run = Eager(dit, vae)
    tokens, step, rope = arguments(dit, 1)
    plain = runner_of(run, Runner(dit.velocity))
    assert torch.equal(plain.velocity(tokens, step, rope, None), dit.velocity(tokens, step, rope))
    assert not run.ran
    with pytest.raises(InputError, match="use --backend torch"):
        runner_of(run, None).velocity(tokens, step, rope, None)


def test_halves_of_the_autoencoder(dit: DiT, vae: VAE) -> None:
    run = Eager(dit, vae)
    pixels, latents = torch.randn(3, 3, 32, 16), torch.randn(3, 4, 8, 8)
    wanted = vae.encode(pixels), vae.decode(latents)
    take_halves(run, vae)
    for found, expected in zip((vae.encode(pixels), vae.decode(latents)), wanted, strict=True):
        torch.testing.assert_close(found, expected)
    assert run.ran == [("encode", 2), ("encode", 1), ("decode", 2), ("decode", 1)]
    vae.strip_pixels = 0
    torch.testing.assert_close(vae.decode(latents), wanted[1])
    assert len(run.ran) == 4  # strips are PyTorch's


@pytest.fixture
def components(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Components:
    """The bundled model, run by entries in plain torch."""
    monkeypatch.setattr(exported, "opened", lambda backend, folder, dit, vae: Eager(dit, vae))
    made = load(None, device="cpu", dtype=torch.float32)
    return with_exported(made, Backend("aoti"), bundled_config(tmp_path))


def bundled_config(folder: Path) -> Path:
    """A folder with what an engine says of the bundled model."""
    (folder / CONFIG).write_bytes(canonical(EngineConfig.of(locate(None)).as_json()))
    return folder


def edited(engine: Engine, **options: object) -> Edit:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    return engine.edit(picture, "make it darker", seed=1, size=64, steps=8, guidance=2.0, **options)


@pytest.mark.parametrize("speed", ["exact", "fast"])
def test_an_edit_by_an_exported_engine(components: Components, speed: str) -> None:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 24, 48))
    options = {"speed": speed} | ({"mask": mask} if speed == "fast" else {})
    ours, theirs = edited(Engine(components), **options), edited(Engine.load(cache=False), **options)
    assert np.abs(np.asarray(ours.image, int) - np.asarray(theirs.image, int)).max() <= 1
    assert ours.metadata == theirs.metadata
    run = components.exported
    assert isinstance(run, Eager)
    assert {name for name, _ in run.ran} == {"encode", "decode", "step"} | ({"rows"} if speed == "fast" else set())


def test_what_an_exported_engine_has_no_other_form_of(components: Components) -> None:
    with pytest.raises(InputError, match="exact algebra built in; use --backend torch"):
        edited(Engine(components), exact_algebra=False)
