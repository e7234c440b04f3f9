"""Whole sampling loops against latents recorded step by step from the reference pipelines."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from step1x.engine import image, sizes
from step1x.engine.checkpoint import Checkpoint
from step1x.engine.denoise import Branch, Guidance, Loop, branches, denoise, velocities
from step1x.engine.dit import DiT, Text
from step1x.engine.schedule import timesteps
from step1x.engine.text import Conditioning
from step1x.engine.vae import VAE
from step1x.engine.variants import Variant, variant
from step1x.engine.weights import build, dit_targets, vae_targets

GOLDEN = Path(__file__).parent.parent / "golden"
BOUND = 1e-4
OFFICIAL = "trajectory_official.safetensors"
V1P1 = "trajectory_diffusers_v1p1.safetensors"
V1P2 = "trajectory_diffusers_v1p2.safetensors"
NEVER, GATED = 1.0, 0.93  # rescale_above: t is at most 1 | timesteps_truncate on t in [0, 1]

pytestmark = pytest.mark.golden


def load(config: str, *weights: str) -> DiT:
    checkpoint = Checkpoint([GOLDEN / f"{name}.safetensors" for name in weights])
    with torch.device("meta"):
        dit = DiT(sizes.dit_config(checkpoint, [GOLDEN / f"{config}.json"]))
    build(dit, dit_targets(dit, checkpoint), checkpoint, "cpu", torch.float32)
    return dit


def worst(file: str, group: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Asserts the bound on max|a - b| / max|b| of every pair and prints the worst."""
    assert pairs
    assert all(got.shape == wanted.shape for got, wanted in pairs)
    error = max(((got - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in pairs)
    print(f"golden {file} {group} worst={error:.1e}")
    assert error <= BOUND


class Trajectory:
    """One recorded run: its inputs, and the loop on them."""

    def __init__(self, dit: DiT, file: str, row: Variant) -> None:
        self.dit, self.file, self.row = dit, file, row
        self.recorded = load_file(GOLDEN / file)
        with safe_open(GOLDEN / file, "pt") as opened:
            facts = opened.metadata()
        self.steps, self.guidance = int(facts["num_steps"]), float(facts["guidance"])
        self.grid = (int(facts["height"]) // 16, int(facts["width"]) // 16)
        self.tokens = self.grid[0] * self.grid[1]
        self.schedule = timesteps(self.steps, self.tokens)
        self.ids = image.image_ids(self.grid, row.reference_ids)

    def forwards(self, cond: Conditioning, uncond: Conditioning) -> list[Branch]:
        return branches(self.dit, [[cond], [uncond]], self.ids, self.row.batched_guidance)

    def first(self, forwards: list[Branch], state: tuple[Tensor, Tensor]) -> Tensor:
        """Velocities of the first step: conditional row, unconditional row."""
        return velocities(self.dit, forwards, torch.cat(state, dim=1), (0, 1), self.schedule[:1], self.tokens)

    def run(
        self, forwards: list[Branch], state: tuple[Tensor, Tensor], above: float, steps: int | None = None
    ) -> Tensor:
        """Target tokens after all or the first `steps` steps."""
        schedule = self.schedule[: (self.steps if steps is None else steps) + 1]
        return denoise(self.dit, Loop(forwards, schedule, Guidance(self.guidance, above), self.row), state)

    def steps_and_end(self, forwards: list[Branch], state: tuple[Tensor, Tensor], above: float, prefix: str) -> None:
        """Compares the latents after every step and at the end."""
        recorded = self.recorded[f"{prefix}latents_after_step"]
        assert len(recorded) == self.steps
        pairs = [(self.run(forwards, state, above, step + 1), recorded[step]) for step in range(self.steps)]
        pairs.append((self.run(forwards, state, above), self.recorded[f"{prefix}final_tokens"]))
        worst(self.file, f"{prefix}latents_after_step, final_tokens", pairs)


def official_run(version: str) -> tuple[Trajectory, list[Branch], tuple[Tensor, Tensor]]:
    row = variant(f"official-v{version}")
    run = Trajectory(load("dit_official", "dit_official"), OFFICIAL, row)
    if version == "1.1":
        run.dit.connector.scale_factor.zero_()
    rows = [
        Conditioning(
            Text(run.recorded["in.llm_embedding"][i : i + 1], run.recorded["in.mask"][i : i + 1]),
            run.recorded["prepared.txt_ids"][i : i + 1],
        )
        for i in range(2)
    ]
    state = (image.pack(run.recorded["in.noise_latent"]), image.pack(run.recorded["in.ref_latent"]))
    return run, run.forwards(*rows), state


@torch.inference_mode()
def test_golden_official_prepared() -> None:
    run, _, state = official_run("1.0")
    assert torch.equal(torch.cat(state, dim=1).expand(2, -1, -1), run.recorded["prepared.img"])
    assert torch.equal(run.ids.expand(2, -1, -1), run.recorded["prepared.img_ids"])
    assert torch.equal(official_run("1.1")[0].ids.expand(2, -1, -1), run.recorded["v1.1.img_ids"])
    worst(OFFICIAL, "in.timesteps", [(run.schedule, run.recorded["in.timesteps"])])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@torch.inference_mode()
def test_golden_official_trajectory(version: str) -> None:
    run, forwards, state = official_run(version)
    run.steps_and_end(forwards, state, run.row.rescale_above, f"v{version}.")


@torch.inference_mode()
def test_golden_official_first_and_last() -> None:
    run, forwards, state = official_run("1.0")
    worst(
        OFFICIAL,
        "v1.0.pred_step0_cond_uncond",
        [(run.first(forwards, state), run.recorded["v1.0.pred_step0_cond_uncond"])],
    )
    latent = image.unpack(run.run(forwards, state, NEVER), run.grid)
    worst(OFFICIAL, "v1.0.final_latent", [(latent, run.recorded["v1.0.final_latent"])])


def v11_run() -> tuple[Trajectory, list[Branch], tuple[Tensor, Tensor]]:
    run = Trajectory(load("dit_diffusers_v1p1", "dit_diffusers_v1p1"), V1P1, variant("diffusers-v1.1"))
    rows = []
    for name in ("prompt", "negative_prompt"):
        embeds, mask = run.recorded[f"in.{name}_embeds"], run.recorded[f"in.{name}_embeds_mask"]
        rows.append(Conditioning(Text(embeds, mask), torch.zeros(1, embeds.shape[1], 3)))
    return run, run.forwards(*rows), (run.recorded["in.latents"], run.recorded["image_latents_tokens"])


@torch.inference_mode()
def test_golden_diffusers_v1p1_trajectory() -> None:
    run, forwards, state = v11_run()
    assert torch.equal(run.ids[0], run.recorded["img_ids"])
    run.steps_and_end(forwards, state, run.row.rescale_above, "")


@pytest.mark.parametrize(("prefix", "above"), [("truncate930", GATED), ("plain_cfg", NEVER)])
@torch.inference_mode()
def test_golden_diffusers_v1p1_guidance_gates(prefix: str, above: float) -> None:
    run, forwards, state = v11_run()
    key = f"{prefix}.final_tokens"
    worst(V1P1, key, [(run.run(forwards, state, above), run.recorded[key])])


@torch.inference_mode()
def test_golden_diffusers_v1p1_first_step() -> None:
    run, forwards, state = v11_run()
    wanted = torch.cat((run.recorded["pred_step0_cond"], run.recorded["pred_step0_uncond"]))
    worst(V1P1, "pred_step0_*", [(run.first(forwards, state), wanted)])
    steps = [(run.schedule, run.recorded["sigmas"]), (run.schedule[:-1], run.recorded["timesteps"])]
    worst(V1P1, "sigmas, timesteps", steps)


@torch.inference_mode()
def test_golden_diffusers_v1p1_autoencoder() -> None:
    run, forwards, state = v11_run()
    checkpoint = Checkpoint([GOLDEN / "vae_diffusers.safetensors"])
    with torch.device("meta"):
        vae = VAE(sizes.vae_config(checkpoint, [GOLDEN / "vae_diffusers.json"]))
    build(vae, vae_targets(vae, checkpoint), checkpoint, "cpu", torch.float32)
    latent = image.unpack(run.run(forwards, state, run.row.rescale_above), run.grid)
    pairs = {
        "vae_moments": vae.encoder(run.recorded["in.image"]),
        "final_latent_unpacked": latent,
        "decoded": vae.decode(latent),
    }
    for key, got in pairs.items():
        worst(V1P1, key, [(got, run.recorded[key])])


def v12_run() -> tuple[Trajectory, list[Branch], tuple[Tensor, Tensor]]:
    """The two branches have texts of different lengths, so they cannot be one batch."""
    dit = load("dit_diffusers_v1p2", "dit_diffusers_v1p1", "dit_diffusers_v1p2_extra")
    run = Trajectory(dit, V1P2, variant("diffusers-v1.2"))
    rows = []
    for name in ("prompt", "negative"):
        names = ("embeds", "mask", "text_embeds", "text_mask")
        text = Text(*(run.recorded[f"{name}.{key}"] for key in names))
        rows.append(Conditioning(text, run.recorded[f"{name}.txt_ids"][None]))
    assert rows[0].ids.shape != rows[1].ids.shape
    return run, run.forwards(*rows), (run.recorded["in.latents"], run.recorded["image_latents_tokens"])


@torch.inference_mode()
def test_golden_diffusers_v1p2_trajectory() -> None:
    run, forwards, state = v12_run()
    assert torch.equal(run.ids[0], run.recorded["img_ids"])
    worst(V1P2, "sigmas", [(run.schedule, run.recorded["sigmas"])])
    wanted = torch.cat((run.recorded["prompt.pred_step0"], run.recorded["negative.pred_step0"]))
    worst(V1P2, "*.pred_step0", [(run.first(forwards, state), wanted)])
    run.steps_and_end(forwards, state, run.row.rescale_above, "")
