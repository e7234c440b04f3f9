"""Rules of step and region skipping against decisions recorded from RegionE and the official TeaCache."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from step1x.engine import image, plan, sizes
from step1x.engine.checkpoint import Checkpoint
from step1x.engine.denoise import Guidance, Halves, Loop, Runner, branches
from step1x.engine.dit import DiT, Text
from step1x.engine.fused import Fused
from step1x.engine.policy import TeaCache
from step1x.engine.schedule import timesteps
from step1x.engine.skipping import Skipping, by_similarity, skip
from step1x.engine.text import Conditioning
from step1x.engine.variants import variant
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched(TeaCache):
    """Writes down what it sees of each step but the first, which has nothing to compare with: change, gathered."""

    seen: list[tuple[float, float]] = field(default_factory=list)

    def decide(self, planned: plan.StepPlan, gathered: float, change: float) -> tuple[plan.StepPlan, float]:
        # Not super(): a class with slots is made twice, and this function knows the first one.
        made, after = TeaCache.decide(self, planned, gathered, change)
        self.seen.append((change, after))
        return made, after


def loop_of(facts: dict[str, str], *, fused: bool, batched: bool) -> tuple[DiT, Loop, tuple[Tensor, Tensor]]:
    """The engine's loop on the inputs of the official trajectory."""
    inputs = load_file(GOLDEN / "trajectory_official.safetensors")
    dit = load()
    state = (image.pack(inputs["in.noise_latent"]), image.pack(inputs["in.ref_latent"]))
    rows = [
        Conditioning(
            Text(inputs["in.llm_embedding"][at : at + 1], inputs["in.mask"][at : at + 1]),
            inputs["prepared.txt_ids"][at : at + 1],
        )
        for at in range(2)
    ]
    own = Fused(dit)
    runner = Runner(own.velocity, rows=own.velocity, halves=Halves(own.blocks, own.blocks, own.final_block))
    ids = inputs["prepared.img_ids"][:1]
    forwards = branches(dit, [[one] for one in rows], ids, batched, runner=runner if fused else None)
    schedule = timesteps(int(facts["num_steps"]), state[0].shape[1])
    guidance = Guidance(
        float(facts["guidance"]), rescale_above=1.0
    )  # never: the recording's differences are as they are
    return dit, Loop(forwards, schedule, guidance, variant("official-v1.0")), state


def thresholds() -> list[str]:
    with safe_open(GOLDEN / "teacache.safetensors", "pt") as opened:
        return sorted(key for key in opened.metadata() if key.startswith("thr"))


@pytest.mark.parametrize("name", thresholds())
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "sequential"])
@torch.inference_mode()
def test_golden_teacache_trajectory(name: str, fused: bool, batched: bool) -> None:
    file = "teacache.safetensors"
    recorded = load_file(GOLDEN / file)
    with safe_open(GOLDEN / file, "pt") as opened:
        facts = opened.metadata()
    dit, loop, state = loop_of(facts, fused=fused, batched=batched)
    policy = Watched(rule=plan.TeaCacheRule(threshold=float(name.removeprefix("thr"))))
    path: list[Tensor] = []
    done = skip(dit, loop, state, Skipping(policy=policy, select=by_similarity((3, 4))), trail=path)
    computed = [step.mode is plan.Mode.FULL for step in done.steps]
    assert "".join("C" if one else "." for one in computed) == facts[name]
    assert computed == recorded[f"{name}.should_calc"].bool().tolist()
    changes, gathered = (torch.tensor([0.0, *column]) for column in zip(*policy.seen, strict=True))
    worst(file, f"{name}.rel_l1", [(changes, recorded[f"{name}.rel_l1"])])
    error = (gathered - recorded[f"{name}.accumulated"]).abs().max().item() / policy.rule.threshold
    print(f"golden {file} {name}.accumulated worst={error:.1e}")
    assert error <= BOUND
    pairs = [(path[-1], recorded[f"{name}.final_tokens"])]
    if f"{name}.latents_after_step" in recorded:  # every third target token
        pairs.append((torch.cat(path)[:, ::3], recorded[f"{name}.latents_after_step"]))
    worst(file, f"{name}.latents_after_step, final_tokens", pairs)


def test_golden_teacache_policy() -> None:
    """The recorded decisions by the policy's own plan and veto."""
    for case in read("teacache.json")["cases"]:
        policy = TeaCache(rule=plan.TeaCacheRule(threshold=case["threshold"]))
        steps, gathered = policy.plan(timesteps(len(case["rel_l1"]), 1024).tolist(), True), 0.0
        for index, (planned, change) in enumerate(zip(steps, case["rel_l1"], strict=True)):
            made, gathered = policy.decide(planned, gathered, change)
            assert (made.mode is not plan.Mode.SKIP) == case["should_calc"][index]
            assert gathered == pytest.approx(case["accumulated_after"][index], rel=1e-9)
