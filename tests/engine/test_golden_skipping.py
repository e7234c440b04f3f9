"""Rules of step and region skipping against decisions recorded from RegionE and the official TeaCache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from step1x.engine import image, plan, sizes
from step1x.engine.checkpoint import Checkpoint
from step1x.engine.dit import DiT, Text
from step1x.engine.schedule import guided, timesteps
from step1x.engine.weights import build, dit_targets

GOLDEN = Path(__file__).parent.parent / "golden"
BOUND = 1e-4

pytestmark = pytest.mark.golden


def read(file: str) -> dict[str, Any]:
    return json.loads((GOLDEN / file).read_text())


def worst(file: str, group: str, pairs: list[tuple[Tensor, Tensor]], bound: float = BOUND) -> None:
    """Asserts a bound on max|a - b| / max|b| of every pair and prints the worst."""
    assert pairs
    assert all(got.shape == wanted.shape for got, wanted in pairs)
    error = max(((got - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in pairs)
    print(f"golden {file} {group} worst={error:.1e}")
    assert error <= bound


def test_golden_decay_gammas() -> None:
    assert list(plan.as_stored(plan.GAMMAS_V11)) == read("regione.json")["cache_decisions"]["gamma"]


def test_golden_decay_decisions() -> None:
    recorded = read("regione.json")["cache_decisions"]
    pairs = []
    for case in recorded["cases"]:
        rule = plan.DecayRule(
            gammas=tuple(recorded["gamma"]),
            threshold=case["cache_threshold"],
            warmup=case["warmup_step"],
            post=case["post_step"],
            refreshes=tuple(int(step) - 1 for step in case["refresh_step"].split(",")),
        )
        schedule = timesteps(rule.steps, case["image_seq_len"]).tolist()
        made = plan.decay_plan(schedule, rule)
        assert [step.mode is plan.Mode.SKIP for step in made] == case["reuse_cached_velocity"]
        ratios = plan.decay_ratios(schedule, rule.gammas)
        known = [step for step, ratio in enumerate(case["ratio"]) if ratio is not None]
        wanted = torch.tensor([case["ratio"][step] for step in known])
        pairs.append((torch.tensor([ratios[step - 1] for step in known]), wanted))
        assert known == [step for step in range(rule.steps) if not rule.computed(step)]
    worst("regione.json", "ratio", pairs, 1e-6)


def grids() -> list[tuple[int, int]]:
    return [(case["h"], case["w"]) for case in read("regione.json")["cases"]]


def test_golden_similarity() -> None:
    recorded = load_file(GOLDEN / "regione.safetensors")
    pairs = []
    for index in range(len(grids())):
        estimate, reference = (recorded[f"case{index}.in.{name}"] for name in ("estimate", "reference"))
        pairs.append((plan.similarity(estimate, reference), recorded[f"case{index}.cosine"]))
    worst("regione.safetensors", "cosine", pairs, 1e-5)


def test_golden_partition() -> None:
    recorded = load_file(GOLDEN / "regione.safetensors")
    keys = [key.removesuffix(".edited_ids") for key in recorded if key.endswith(".edited_ids")]
    assert len(keys) >= 2 * len(grids())
    for key in keys:
        case, threshold, kind = key.replace(".thr", "|").replace(".raw", "|raw").replace(".morph", "|morph").split("|")
        similar = plan.similarity(recorded[f"{case}.in.estimate"], recorded[f"{case}.in.reference"])
        grid = grids()[int(case.removeprefix("case"))]
        edited = plan.edited_tokens(similar, grid, float(threshold), smooth=kind == "morph")
        for name, mask in (("edited", edited), ("unedited", ~edited)):
            assert torch.equal(mask[0].nonzero()[None, :, 0], recorded[f"{key}.{name}_ids"]), (key, name)
    print(f"golden regione.safetensors *_ids cases={len(keys)} worst=0.0e+00")


def test_golden_teacache_rule() -> None:
    recorded = read("teacache.json")
    pairs = []
    for case in recorded["cases"]:
        rule = plan.TeaCacheRule(threshold=case["threshold"], coefficients=tuple(recorded["coefficients"]))
        made = list(plan.decisions(rule, case["rel_l1"]))
        assert [one.compute for one in made] == case["should_calc"]
        wanted = torch.tensor(case["accumulated_after"], dtype=torch.float64)
        got = torch.tensor([one.accumulated for one in made], dtype=torch.float64)
        pairs.append((got, wanted))
    assert tuple(recorded["coefficients"]) == plan.TEACACHE_COEFFICIENTS
    scale = max(wanted.abs().max().item() for _, wanted in pairs)
    error = max((got - wanted).abs().max().item() for got, wanted in pairs) / scale
    print(f"golden teacache.json accumulated_after worst={error:.1e}")
    assert error <= 1e-9


def load() -> DiT:
    checkpoint = Checkpoint([GOLDEN / "dit_official.safetensors"])
    with torch.device("meta"):
        dit = DiT(sizes.dit_config(checkpoint, [GOLDEN / "dit_official.json"]))
    build(dit, dit_targets(dit, checkpoint), checkpoint, "cpu", torch.float32)
    return dit


class TeaCacheRun:
    """The official loop with TeaCache, on the inputs of the official trajectory."""

    def __init__(self, steps: int, guidance: float) -> None:
        inputs = load_file(GOLDEN / "trajectory_official.safetensors")
        self.dit, self.steps, self.guidance = load(), steps, guidance
        self.latents, self.reference = image.pack(inputs["in.noise_latent"]), image.pack(inputs["in.ref_latent"])
        self.schedule = timesteps(steps, self.latents.shape[1])
        self.request = self.dit.prepare(Text(inputs["in.llm_embedding"], inputs["in.mask"]))
        self.rope = self.dit.rope(inputs["prepared.txt_ids"], inputs["prepared.img_ids"])
        self.made: list[plan.Decision] = []
        self.changes: list[float] = []
        self.path: list[Tensor] = []

    def run(self, rule: plan.TeaCacheRule) -> None:
        latents, target = self.latents, self.latents.shape[1]
        previous, residual = torch.ones(1), torch.zeros(1)
        accumulated = 0.0
        for index in range(self.steps):
            step = self.dit.condition(self.request, self.schedule[index].expand(2))
            before = self.dit.img_in(torch.cat((latents, self.reference), dim=1).repeat(2, 1, 1))
            signal = F.layer_norm(before, before.shape[-1:], eps=1e-6)  # without the step's modulation (§3.3)
            self.changes.append(plan.relative_change(signal, previous) if index else 0.0)
            forced = index in (0, self.steps - 1)
            decision = plan.decide(rule, accumulated, self.changes[-1], forced=forced)
            if decision.compute:
                residual = self.dit.transform(before, step, self.rope) - before
            velocity = self.dit.final_layer(before + residual, step.mods.final)[:, :target]
            cond, uncond = velocity.chunk(2)
            change = self.schedule[index + 1] - self.schedule[index]
            latents = latents + change * guided(cond, uncond, self.guidance, rescaled=False)
            previous, accumulated = signal, decision.accumulated
            self.made.append(decision)
            self.path.append(latents)


def thresholds() -> list[str]:
    with safe_open(GOLDEN / "teacache.safetensors", "pt") as opened:
        return sorted(key for key in opened.metadata() if key.startswith("thr"))


@pytest.mark.parametrize("name", thresholds())
@torch.inference_mode()
def test_golden_teacache_trajectory(name: str) -> None:
    file = "teacache.safetensors"
    recorded = load_file(GOLDEN / file)
    with safe_open(GOLDEN / file, "pt") as opened:
        facts = opened.metadata()
    run = TeaCacheRun(int(facts["num_steps"]), float(facts["guidance"]))
    rule = plan.TeaCacheRule(threshold=float(name.removeprefix("thr")))
    run.run(rule)
    assert "".join("C" if one.compute else "." for one in run.made) == facts[name]
    assert [one.compute for one in run.made] == recorded[f"{name}.should_calc"].bool().tolist()
    worst(file, f"{name}.rel_l1", [(torch.tensor(run.changes), recorded[f"{name}.rel_l1"])])
    accumulated = torch.tensor([one.accumulated for one in run.made])
    error = (accumulated - recorded[f"{name}.accumulated"]).abs().max().item() / rule.threshold
    print(f"golden {file} {name}.accumulated worst={error:.1e}")
    assert error <= BOUND
    pairs = [(run.path[-1], recorded[f"{name}.final_tokens"])]
    if f"{name}.latents_after_step" in recorded:  # every third target token
        pairs.append((torch.cat(run.path)[:, ::3], recorded[f"{name}.latents_after_step"]))
    worst(file, f"{name}.latents_after_step, final_tokens", pairs)
