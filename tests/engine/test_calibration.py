"""Calibration: fits to trajectories that are known, then to the bundled checkpoint, and files that must be refused."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from step1x.bench.counters import photograph
from step1x.engine import Engine, pipeline
from step1x.engine.calibration import (
    Calibration,
    Setting,
    Trajectory,
    calibrated,
    calibration_of,
    constants_for,
    norm_curve,
    probe_fit,
    published,
    trajectory,
)
from step1x.engine.calibration_pairs import pairs
from step1x.engine.denoise import Guidance
from step1x.engine.errors import InputError
from step1x.engine.norms import Gammas
from step1x.engine.plan import GAMMAS_V11, GAMMAS_V12, Mode, decisions, spelled
from step1x.engine.policy import Decay, Probe, Region
from step1x.engine.presets import MASKED, PRESETS, masked, presets
from step1x.engine.schedule import timesteps
from step1x.engine.skipping import watched
from step1x.engine.variants import VARIANTS

STEPS, SIZE, GUIDANCE, PAIRS = 28, 64, 2.0, 3
SCHEDULE = timesteps(STEPS, 1024).tolist()
SETTING = Setting(version="v1.1", rescale_above=0.93e-3, guidance=6.0, digest="ab" * 32)


def made(seed: int = 0, ratios: Sequence[float] | None = None) -> Trajectory:
    """A trajectory of known ratios, whose velocity changes by a known polynomial of the probe's change."""
    random = np.random.default_rng(seed)
    x = random.uniform(0.02, 0.2, STEPS - 1)
    y = 0.01 + 0.3 * x + 2 * x**2
    ratios = random.uniform(0.95, 1.01, STEPS - 1).tolist() if ratios is None else ratios
    return Trajectory(levels=tuple(SCHEDULE[:-1]), tokens=1024, ratios=tuple(ratios), probe=tuple(x), velocity=tuple(y))


def fit(trajectories: Sequence[Trajectory], setting: Setting = SETTING) -> Calibration:
    return calibrated(trajectories, setting, model="m", variant="diffusers-v1.1", size=512, seed=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(device="cpu", cache=False)


@pytest.fixture(scope="module")
def measured(engine: Engine) -> list[Trajectory]:
    shown = enumerate(pairs(PAIRS, SIZE))
    return [
        engine.trajectory(one, words, seed=i, steps=STEPS, guidance=GUIDANCE, size=SIZE) for i, (one, words) in shown
    ]


@pytest.fixture(scope="module")
def bundled(engine: Engine, measured: list[Trajectory]) -> Calibration:
    setting = Setting.of(engine.variant, GUIDANCE, engine.digest)
    return calibrated(measured, setting, model=engine.name, variant=engine.variant.name, size=SIZE, seed=0)


# fits to what is known


def test_a_trajectory_is_of_tokens_and_of_neighbouring_steps() -> None:
    def tokens(*norms: float) -> Tensor:
        return torch.tensor([[[norm, 0.0] for norm in norms]])

    velocities = [tokens(1, 4), tokens(2, 2), tokens(1, 3)]
    signals = [tokens(1, 1), tokens(2, 1), tokens(2, 4)]
    found = trajectory(zip(velocities, signals, strict=True), [1.0, 0.6, 0.3, 0.0])
    assert found.ratios == (fmean([2, 0.5]), fmean([0.5, 1.5])), "means over tokens of each token's ratio"
    assert found.velocity == pytest.approx((3 / 5, 2 / 4))
    assert found.probe == pytest.approx((1 / 2, 3 / 3))
    assert (found.levels, found.tokens) == ((1.0, 0.6, 0.3), 2)


def test_the_curve_gives_the_geometric_mean_of_the_ratios() -> None:
    trajectories = [made(seed) for seed in range(4)]
    curve = norm_curve(trajectories)
    means = [math.prod(ratios) ** 0.25 for ratios in zip(*(one.ratios for one in trajectories), strict=True)]
    assert curve.ratios(SCHEDULE) == pytest.approx(means, rel=1e-12)
    assert curve.norms[0] == 1


def test_published_ratios_are_fitted_to_the_published_plan() -> None:
    expected = Gammas(GAMMAS_V11)
    curve = norm_curve([made(ratios=expected.ratios(SCHEDULE))] * 2)
    plans = [spelled(Decay(norms=norms).plan(SCHEDULE, True)) for norms in (curve, expected)]
    assert plans[0] == plans[1]
    assert "s" in plans[0]


def test_edits_of_two_schedules_have_no_curve() -> None:
    other = replace(made(), levels=tuple(timesteps(STEPS, 4096).tolist()[:-1]))
    with pytest.raises(InputError, match="edits of one schedule, got 2"):
        norm_curve([made(), other])


def test_the_probes_polynomial_is_found_again() -> None:
    trajectories = [made(seed) for seed in range(5)]
    found = probe_fit(trajectories)
    assert found.coefficients == pytest.approx((0, 0, 2, 0.3, 0.01), abs=1e-6)
    assert found.r2 == pytest.approx(1)
    assert found.rank == pytest.approx(1)
    assert found.span == (min(min(one.probe) for one in trajectories), max(max(one.probe) for one in trajectories))


@pytest.mark.parametrize("computed", [0.25, 0.5, 0.75])
def test_the_threshold_leaves_a_share_of_the_steps(computed: float) -> None:
    trajectories = [made(seed) for seed in range(5)]
    found = probe_fit(trajectories, computed)

    def share(threshold: float) -> float:
        rule = replace(found.rule, threshold=threshold)
        return fmean(one.compute for each in trajectories for one in decisions(rule, (0.0, *each.probe)))

    assert share(found.threshold) <= computed < share(found.threshold * 0.99)


def test_rank_sees_through_the_trend() -> None:
    """Both fall along the schedule: the fit is good. Among pairs they are opposite: the probe says nothing."""
    trend, shares = np.linspace(0.2, 0.02, STEPS - 1), np.linspace(-0.001, 0.001, 4)
    trajectories = [replace(made(), probe=tuple(trend + share), velocity=tuple(2 * trend - share)) for share in shares]
    found = probe_fit(trajectories)
    assert found.r2 > 0.99
    assert found.rank == pytest.approx(-1)
    assert probe_fit(trajectories[:2]).rank is None


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(InputError, match="hardly changes"):
        probe_fit([replace(made(), probe=(0.1,) * (STEPS - 1))])
    short = Trajectory(levels=(1.0, 0.5), tokens=4, ratios=(1.0,), probe=(0.1,), velocity=(0.1,))
    with pytest.raises(InputError, match="at least 8 steps, got 2"):
        fit([short])


# the bundled checkpoint


def test_the_guided_velocity_is_what_the_latents_follow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what the plain loop makes of the same edit, its velocities read back from the latents."""
    seen: list[Tensor] = []

    def steps(*words: Any) -> Any:
        for velocity, signal in watched(*words):
            seen.append(velocity)
            yield velocity, signal

    monkeypatch.setattr(pipeline, "watched", steps)
    options: dict[str, Any] = {"steps": 8, "guidance": GUIDANCE, "size": SIZE}
    found = engine.trajectory(photograph(), "make it darker", seed=1, **options)
    monkeypatch.undo()

    trails: list[list[Tensor]] = []
    denoise, starts = pipeline.denoise, []

    def listened(dit: Any, loop: Any, state: Any, on_step: Any, _: Any) -> Tensor:
        trails.append([])
        starts.append((state[0], loop))
        return denoise(dit, loop, state, on_step, trails[-1])

    monkeypatch.setattr(pipeline, "denoise", listened)
    engine.edit(photograph(), "make it darker", seed=1, **options)
    (start, loop), trail = starts[0], trails[0]
    assert loop.guidance == Guidance(GUIDANCE, engine.variant.rescale_above)
    lengths = (loop.schedule[1:] - loop.schedule[:-1]).tolist()
    for velocity, (before, after), length in zip(seen, pairwise([start, *trail]), lengths, strict=True):
        torch.testing.assert_close(velocity, (after - before) / length, rtol=1e-3, atol=1e-3)
    assert len(found.ratios) == 7
    assert found.levels == tuple(loop.schedule[:-1].tolist())


def test_the_fitted_curve_gives_the_measured_ratios(bundled: Calibration, measured: list[Trajectory]) -> None:
    schedule = timesteps(STEPS, 16).tolist()
    assert bundled.tokens == 16
    assert measured[0].levels == tuple(schedule[:-1])
    found = bundled.constants.norms.ratios(schedule)
    for index, ratio in enumerate(found):
        seen = [one.ratios[index] for one in measured]
        assert ratio == pytest.approx(math.exp(fmean(map(math.log, seen))), rel=1e-9)
        assert min(seen) <= ratio * (1 + 1e-9)
        assert ratio <= max(seen) * (1 + 1e-9)


def test_plans_by_it_are_legal_at_other_numbers_of_steps(bundled: Calibration) -> None:
    by = [*presets(bundled.constants.norms).values(), *masked(bundled.constants.norms).values()]
    for steps in (1, 2, 7, 14, 28, 50):
        for policy in by:
            plan = policy.plan(timesteps(steps, 16).tolist(), True)
            assert len(plan) == steps
            assert plan[0].mode is Mode.FULL
            assert all(step.mode is not Mode.SKIP or 0.9 < step.scale < 1 for step in plan if step.scale != 1)


def test_decay_by_it_skips_where_the_norm_is_predictable(bundled: Calibration, measured: list[Trajectory]) -> None:
    """Every skip's scale and every stretch of skips are those of the measured norms, and there are some."""
    policy, schedule = Decay(norms=bundled.constants.norms), timesteps(STEPS, 16).tolist()
    plan, last, skips = policy.plan(schedule, True), 0, 0
    logs = [fmean(math.log(one.ratios[index]) for one in measured) for index in range(STEPS - 1)]
    for step, planned in enumerate(plan):
        if planned.mode is not Mode.SKIP:
            last = step
            continue
        skips += 1
        assert planned.scale == pytest.approx(math.exp(logs[step - 1]))
        assert 1 - math.exp(sum(logs[last:step])) <= policy.threshold + 1e-9
    assert skips >= 3
    steep = min(range(STEPS - 1), key=logs.__getitem__) + 1
    assert plan[steep].mode is Mode.FULL, "the steepest step"


def test_teacache_by_it_runs(engine: Engine, bundled: Calibration) -> None:
    policy = bundled.teacache
    assert policy.probe is Probe.TARGET
    done = engine.edit(photograph(), "make it darker", seed=1, size=SIZE, steps=STEPS, guidance=GUIDANCE, policy=policy)
    plan = str(done.metadata["plan"])
    assert STEPS / 4 < plan.count("s") < STEPS - 2  # the threshold leaves half of the steps of what was fitted to
    assert plan[0] == plan[-1] == "F"


def test_pairs_are_all_different_and_those_of_their_seed(tmp_path: Path) -> None:
    once, again = list(pairs(5, 32)), list(pairs(5, 32))
    assert [one.tobytes() for one, _ in once] == [one.tobytes() for one, _ in again]
    assert len({one.tobytes() for one, _ in once}) == 5
    files = [tmp_path / f"{name}.png" for name in "ab"]
    for file, width in zip(files, (20, 30), strict=True):
        photograph(width, 24).save(file)
    made = [(one.size, words) for one, words in pairs(4, 32, files, ["x", "y"])]
    assert sorted(made) == [((20, 20), "x"), ((20, 20), "y"), ((24, 24), "x"), ((24, 24), "y")]


# presets


def test_presets_take_the_norms() -> None:
    curve = norm_curve([made(ratios=[0.999] * (STEPS - 1))])
    assert presets() == PRESETS
    assert masked() == MASKED
    for ours, theirs in ((presets(curve), PRESETS), (masked(curve), MASKED)):
        assert ours["exact"] == theirs["exact"]
        for speed in ("balanced", "fast", "turbo"):
            plans = [spelled(policies[speed].plan(SCHEDULE, True)) for policies in (ours, theirs)]  # type: ignore[index]
            assert plans[0].count("s") > plans[1].count("s"), speed
    assert isinstance(masked(curve)["exact"], Region)


# files


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    calibration, path = fit([made(seed) for seed in range(3)]), tmp_path / "c.json"
    calibration.write(path)
    assert Calibration.read(path) == calibration
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"]
    with pytest.raises(InputError, match="--force"):
        calibration.write(path)
    calibration.write(path, overwrite=True)
    with pytest.raises(InputError, match="cannot be written: no such file"):
        calibration.write(tmp_path / "none" / "c.json")


def _without_curve(facts: dict[str, Any]) -> None:
    del facts["curve"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts.update(format=2), "format: input should be 1"),
        (lambda facts: facts.update(more=1), "more: extra inputs are not permitted"),
        (_without_curve, "curve: field required"),
        (lambda facts: facts["curve"]["norms"].pop(), "curve: a norm curve needs 28 positive norms"),
        (lambda facts: facts["curve"]["levels"].reverse(), "curve: a norm curve needs at least two levels that fall"),
        (lambda facts: facts["curve"]["norms"].__setitem__(3, math.nan), "norms.3: input should be a finite number"),
        (lambda facts: facts["probe"].update(span=[0.2, 0.1]), "probe: teacache's span must rise"),
        (lambda facts: facts["probe"].update(threshold=-1.0), "probe: teacache needs a threshold of at least 0"),
        (lambda facts: facts["setting"].update(version="v9"), "setting.version: input should be 'v1.0', 'v1.1'"),
        (lambda facts: facts.update(steps="28"), "steps: input should be a valid integer"),
    ],
)
def test_bad_files_are_one_line(change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path) -> None:
    facts, path = json.loads(fit([made()]).model_dump_json()), tmp_path / "c.json"
    change(facts)
    path.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=re.escape(words)) as error:
        Calibration.read(path)
    assert str(error.value).startswith(f"{path}: not a calibration: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "invalid json"), (b"\xff{}", "invalid json"), (b"[]", "an object"), (b"x" * (1 << 21), "larger than")],
)
def test_other_files_are_no_calibrations(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        Calibration.read(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="cannot be read: no such file"):
        Calibration.read(tmp_path / "none.json")


# what they are used for


@pytest.mark.parametrize(("name", "table"), [("official-v1.0", GAMMAS_V11), ("diffusers-v1.2", GAMMAS_V12)])
def test_without_a_file_the_published_table_counts(name: str, table: tuple[float, ...], tmp_path: Path) -> None:
    assert calibration_of(tmp_path) is None
    assert constants_for(VARIANTS[name], None) == published(VARIANTS[name])
    assert published(VARIANTS[name]).norms == Gammas(table)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (
            "official-v1.1",
            "fitted to v1.1 with guidance norm-rescaled at every step, but official-v1.1 is v1.1 with "
            "guidance norm-rescaled above t = 0.93; fit it again",
        ),
        ("official-v1.0", "but official-v1.0 is v1.0 with plain guidance; fit it again"),
        ("diffusers-v1.2", "but diffusers-v1.2 is v1.2 with guidance norm-rescaled at every step; fit it again"),
    ],
)
def test_a_file_of_another_rule_is_refused_but_one_in_the_folder_left_alone(
    variant: str, words: str, tmp_path: Path
) -> None:
    fit([made()]).write(tmp_path / "calibration.json")
    found = calibration_of(tmp_path)
    assert found is not None
    assert constants_for(VARIANTS["diffusers-v1.1"], found) == found.constants
    assert constants_for(VARIANTS[variant], found) == published(VARIANTS[variant])
    with pytest.raises(InputError, match=re.escape(words)):
        constants_for(VARIANTS[variant], found, "f.json")


@pytest.mark.parametrize(
    ("variant", "guidance", "words"),
    [
        ("diffusers-v1.1", 6.0, ""),
        ("diffusers-v1.1", 4.0, "this is v1.1 with guidance 4 norm-rescaled at every step"),
        ("diffusers-v1.1", 0.5, "this is v1.1 with no guidance"),
        ("official-v1.1", 6.0, "this is v1.1 with guidance 6 norm-rescaled above t = 0.93"),
        ("official-v1.0", 6.0, "fitted to v1.1 with guidance 6 norm-rescaled at every step, this is v1.0 with plain"),
        ("diffusers-v1.2", 6.0, ""),
    ],
)
def test_what_sets_an_edit_apart_from_the_published_table(variant: str, guidance: float, words: str) -> None:
    row = VARIANTS[variant]
    found = published(row).setting.apart(Setting.of(row, guidance, "cd" * 32))
    assert words in found
    assert bool(words) == bool(found)


def test_weights_are_compared_where_a_fit_names_them() -> None:
    row = VARIANTS["diffusers-v1.1"]
    assert not SETTING.apart(Setting.of(row, 6.0, "ab" * 32))
    assert "v1.1 weights abababababab with" in SETTING.apart(Setting.of(row, 6.0, "cd" * 32))


def test_the_engine_plans_by_a_file_and_says_once_what_does_not_fit(bundled: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    bundled.write(path)
    said: list[str] = []
    engine = Engine.load(device="cpu", cache=False, calibration=path, say=said.append)

    def plan(guidance: float, **options: Any) -> str:
        done = engine.edit(photograph(), "make it darker", seed=1, size=SIZE, steps=14, guidance=guidance, **options)
        return str(done.metadata.get("plan"))

    assert plan(GUIDANCE, speed="exact") == "None"
    wanted = presets(bundled.constants.norms)["balanced"].plan(timesteps(14, 16).tolist(), True)
    assert plan(GUIDANCE, speed="balanced") == spelled(wanted)
    assert said == []
    for _ in range(2):
        plan(1.0, policy=Decay())
        plan(1.0, speed="balanced")
    assert len(said) == 1
    assert said[0].startswith("speed goes by constants fitted to v1.1 weights ")
    assert "guidance 2 norm-rescaled at every step, this is v1.1 weights " in said[0]
    assert said[0].endswith("with no guidance; `step1x-engine calibrate` fits them")


def test_the_published_table_is_not_used_for_other_guidance_in_silence() -> None:
    said: list[str] = []
    engine = Engine.load(device="cpu", cache=False, variant="official-v1.1", say=said.append)
    for _ in range(2):
        engine.edit(photograph(), "make it darker", seed=1, size=SIZE, steps=8, guidance=6.0, speed="fast")
    mask = Image.new("L", (96, 96), 255)
    engine.edit(photograph(), "make it darker", seed=1, size=SIZE, steps=2, mask=mask)
    assert len(said) == 1
    assert "this is v1.1 with guidance 6 norm-rescaled above t = 0.93" in said[0]
