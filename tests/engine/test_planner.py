import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from step1x.engine import hollow, released
from step1x.engine import planned_bytes as counted
from step1x.engine.algebra import ON
from step1x.engine.counting import Memory
from step1x.engine.denoise import Runner, branches, folded, velocities
from step1x.engine.engine_config import model_sizes
from step1x.engine.errors import InputError
from step1x.engine.fused import Fused
from step1x.engine.hollow import ModelSizes
from step1x.engine.image import Canvas, image_ids
from step1x.engine.planner import CONTEXT_BYTES, PHASES, Phase, Plan, check, plan
from step1x.engine.qwen import going_on
from step1x.profiles import Profile, Residency, load_profile, profile_names
from step1x.quant.linear import swap
from step1x.quant.schemes import stored_bytes

V11 = "v1.1"
MODULATIONS = 19 * 2 * 18432 * 3073 + 38 * 9216 * 3073 + 6144 * 3073  # §3.12
CONNECTOR = 536_621_824
DIT = 12_427_800_384


@cache
def sizes(model: str | None = V11) -> ModelSizes:
    return model_sizes(model)


def profile(**changes: Any) -> Profile:
    """A profile for a GPU without limits, with changes."""
    plain = {"name": "own", "description": "", "device": "cuda", "dtype": "bfloat16", "vae_dtype": "bfloat16"}
    return Profile.model_validate({**plain, **changes})


def phase(found: Plan, name: str) -> Phase:
    return next(one for one in found.phases if one.name == name)


def item(found: Plan, name: str, of: str) -> int:
    """Bytes of an item in a phase, 0 if it is not there."""
    return sum(one.bytes for one in phase(found, name).items if one.name == of)


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_fit_what_they_are_for(name: str) -> None:
    found = plan(sizes(), load_profile(name))
    assert (found.work.canvas.width, found.work.batch) == (1024, found.profile.batch)
    assert found.fits, (found.over, found.host_over)
    check(found)


def faked(module: nn.Module) -> None:
    """Fake tensors on the CPU for what a meta module has."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, old in store.items():
                if old is not None:
                    store[name] = torch.empty(old.shape, dtype=old.dtype)


def tracked(work: counted.Work, scheme: Any, batched: bool) -> int:
    """What denoising takes besides weights, followed through the model at its full depth with fake tensors."""
    row = sizes().variant
    dit = hollow.hollow_dit(released.dit_config(V11)).to(torch.bfloat16)
    swap(dit, "dit", scheme)
    with torch.no_grad(), FakeTensorMode():
        faked(dit)
        with Memory() as memory:
            groups = [[hollow.instruction(work.rows, row, dit)] for _ in range(2)]
            runner = Runner(Fused(dit).velocity)  # our operations: what each takes is what it declares
            forwards = branches(dit, groups, image_ids(work.canvas.grid, row.reference_ids), batched, ON, runner)
            time = torch.ones(1)
            forwards = folded(dit, forwards, [time] * work.steps)
            tokens = torch.zeros(1, 2 * work.canvas.tokens, dit.config.in_channels, dtype=torch.bfloat16)
            memory.peak = memory.now
            velocities(dit, forwards, tokens, (0, 1), time, work.canvas.tokens)
            return memory.peak


@pytest.mark.parametrize(
    ("size", "scheme", "batched"),
    [(512, "plain", True), (512, "fp8", False), (1024, "plain", False), (1024, "fp8", True)],
)
def test_denoise_peak_is_that_of_the_whole_model(size: int, scheme: str, batched: bool) -> None:
    """Weights and context aside, to 2 %."""
    own = profile(weights={"dit": scheme}, branches="batched" if batched else "sequential", kernels="on")
    found = plan(sizes(), own, canvas=Canvas(size, size), steps=10, rows=349)
    kept = item(found, "denoise", "text as read")
    ours = sum(one.bytes for one in phase(found, "denoise").items if one.kind in ("tables", "activations")) - kept
    assert ours == pytest.approx(tracked(found.work, scheme, batched), rel=0.02)


@pytest.mark.parametrize("kernels", [True, False])
def test_any_depth_has_the_peak_of_few_blocks(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    work = counted.Work(canvas=Canvas(1024, 1024), batch=1, steps=1, guided=True, rows=349)
    asked = sizes(), torch.bfloat16, "plain", work, counted.Runs(batched=True, kernels=kernels, multiple=1)
    _, shallow, _ = counted._step.__wrapped__(*asked)
    monkeypatch.setattr(counted, "DEPTH", 4)
    monkeypatch.setattr(counted, "DEPTH_SINGLE", 5)
    assert counted._step.__wrapped__(*asked)[1] == shallow


def test_tables_of_a_shallow_model_are_those_of_the_whole() -> None:
    """To the byte; and folding peaks where the connector's rows of a chunk of steps are."""
    work = counted.Work(canvas=Canvas(16, 16), batch=1, steps=3, guided=True, rows=349)
    runs = counted.Runs(batched=False, kernels=False, multiple=1)
    tables, peak = counted._fold(sizes(), torch.bfloat16, work, runs)
    rows = 3 * 2
    contexts, vectors = rows * 351 * 3072 * 2, rows * 3072 * (19 * 12 + 38 * 3 + 2) * 2
    assert tables == pytest.approx(contexts + vectors, rel=1e-3)
    assert peak > tables


def test_weights_by_component() -> None:
    found = plan(sizes(), profile())
    loaded = {one.name: one.bytes for one in phase(found, "load").items}
    assert loaded["transformer"] == 2 * (DIT - MODULATIONS - CONNECTOR)
    assert (loaded["connector"], loaded["modulations"]) == (2 * CONNECTOR, 2 * MODULATIONS)
    assert loaded["embeddings"] == 2 * 152064 * 3584
    assert loaded["vision tower"] == pytest.approx(2 * 0.677e9, rel=2e-3)  # performance.md §B
    assert loaded["language model"] + loaded["embeddings"] == pytest.approx(2 * 7.07e9, rel=2e-3)
    assert loaded["autoencoder"] == 2 * 83_819_683
    assert loaded["CUDA context, workspaces"] == CONTEXT_BYTES
    assert found.host == ()


def test_quantised_layers_take_what_their_scheme_stores() -> None:
    plain, found = (plan(sizes(), profile(weights={"dit": one})) for one in ("plain", "int4-weight"))
    quantised = 19 * 2 * [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)]
    quantised += 38 * [(21504, 3072), (3072, 15360)]
    less = sum(2 * rows * columns - stored_bytes("int4-weight", rows, columns, 2) for rows, columns in quantised)
    before, after = (item(one, "load", "transformer") for one in (plain, found))
    assert before - after == less
    assert item(plain, "load", "modulations") == item(found, "load", "modulations")
    folded_too = plan(sizes(), profile(weights={"folded": "int8-weight"}))
    assert item(folded_too, "load", "modulations") == pytest.approx(MODULATIONS, rel=2e-3)


def test_residency() -> None:
    lies = {"folded": "host", "text": "stream", "vision": "evict", "vae": "evict", "dit": "stream", "stream_blocks": 5}
    every, found = plan(sizes(None), profile()), plan(sizes(None), profile(residency=lies))
    where = {name: {one.name for one in phase(found, name).items if one.kind == "weights"} for name in PHASES}
    core = {"transformer", "connector"}
    assert where["load"] == core
    assert where["encode_text"] == core | {"language model, brought", "vision tower, brought"}
    assert where["encode_image"] == where["decode"] == core | {"autoencoder, brought"}
    assert where["prepare"] == core | {"modulations, brought"}
    assert where["denoise"] == core | {"transformer, brought"}
    host = {one.name: one.bytes for one in found.host}
    for name in ("modulations", "language model", "embeddings", "vision tower", "autoencoder"):
        assert host[name] == item(every, "load", name)
    assert host["transformer"] + item(found, "load", "transformer") == item(every, "load", "transformer")
    assert item(found, "encode_text", "vision tower, brought") == host["vision tower"]


def test_a_streamed_component_has_two_buffers_of_its_largest_block() -> None:
    blocks = released.dit_config(V11).depth + released.dit_config(V11).depth_single
    lies = {"dit": "stream", "stream_blocks": blocks, "text": "stream", "folded": "host"}
    found = plan(sizes(), profile(residency=lies))
    double = 2 * (3072 * (9216 + 3072 + 2 * 12288) + 9216 + 3072 + 12288 + 3072 + 2 * 128)  # both streams
    assert item(found, "denoise", "transformer, brought") == 2 * 2 * double
    layer = 3584 * (3584 + 2 * 512 + 3584 + 3 * 18944) + 3584 + 2 * 512 + 2 * 3584
    last = 3584  # the norm behind all layers
    assert item(found, "encode_text", "language model, brought") == 2 * (2 * layer + last)
    largest = max(18432, 9216, 6144) * 3073
    assert item(found, "prepare", "modulations, brought") == 2 * largest
    with pytest.raises(InputError, match=r"stream_blocks is 58, but the transformer has 57 blocks"):
        plan(sizes(), profile(residency=lies | {"stream_blocks": blocks + 1}))


def test_without_a_gpu_there_is_one_memory() -> None:
    lies = Residency(folded="host", text="evict")
    found = plan(sizes(None), profile(device="cpu", residency=lies, host_memory_gb=1e-6))
    assert found.host == ()
    assert [one.name for one in phase(found, "load").items if one.kind == "context"] == ["Python and libraries"]
    assert (found.budget, found.fits) == (1000, False)
    with pytest.raises(InputError, match="no shipped profile and no size fits"):
        check(found)


def test_work_counts() -> None:
    usual = plan(sizes(None), profile(), canvas=Canvas(128, 128), steps=4)
    longer = plan(sizes(None), profile(), canvas=Canvas(128, 128), steps=8)
    alone = plan(sizes(None), profile(), canvas=Canvas(128, 128), steps=4, guided=False)
    two = plan(sizes(None), profile(), canvas=Canvas(128, 128), steps=4, batch=2)
    assert item(longer, "denoise", "folded") == 2 * item(usual, "denoise", "folded")
    assert item(alone, "denoise", "folded") == item(usual, "denoise", "folded") / 2
    assert item(two, "denoise", "folded") == 2 * item(usual, "denoise", "folded")
    assert item(two, "decode", "activations") == 2 * item(usual, "decode", "activations")
    assert item(alone, "denoise", "activations") < item(usual, "denoise", "activations")


VAE = replace(released.VAE, channels=(32, 64, 96, 96), res_blocks=1)


@pytest.mark.parametrize("strip_pixels", [None, 0])
def test_the_autoencoder_is_counted_as_fake_tensors_are(strip_pixels: int | None) -> None:
    canvas = Canvas(256, 128)
    vae = hollow.hollow_vae(VAE).to(torch.bfloat16)
    vae.strip_pixels = strip_pixels
    with torch.no_grad(), FakeTensorMode():
        faked(vae)
        latents = 1, 16, *canvas.latent_size
        with Memory() as encoding:
            vae.encode(torch.empty(1, 3, canvas.height, canvas.width), torch.empty(latents))
        with Memory() as decoding:
            vae.decode(torch.empty(latents))
    ours = counted._halves(VAE, torch.bfloat16, strip_pixels, canvas, False)
    assert ours == pytest.approx((encoding.peak, decoding.peak), rel=0.02)


def test_strips_are_drawn_out_of_two_heights() -> None:
    canvas = Canvas(64, 256)
    drawn = counted._vae(VAE, torch.bfloat16, 0, canvas, False)
    assert drawn == pytest.approx(counted._halves(VAE, torch.bfloat16, 0, canvas, False), rel=1e-3)
    assert sum(drawn) < 0.8 * sum(counted._vae(VAE, torch.bfloat16, 1 << 30, canvas, False))


def test_the_language_model_is_counted_as_fake_tensors_are() -> None:
    from transformers import DynamicCache

    values = {**released.QWEN, "text_config": {**released.QWEN["text_config"], "num_hidden_layers": 3}}
    qwen = hollow.hollow_qwen(values).to(torch.bfloat16)
    swap(qwen, "text", "fp8-weight")
    with torch.no_grad(), FakeTensorMode():
        faked(qwen.language_model)
        with Memory() as memory:
            embeds, cache = torch.empty(1, 100, 3584, dtype=torch.bfloat16), DynamicCache()
            positions = torch.zeros(3, 1, 100, dtype=torch.long)
            words = going_on(qwen.language_model, cache)
            qwen.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=True, **words)
    peak, kept = counted._read(json.dumps(values), torch.bfloat16, "fp8-weight", 100)
    assert peak == pytest.approx(memory.peak, rel=0.02)
    assert kept == pytest.approx(100 * 2 * (3584 + 3 * 2 * 512), rel=0.02)  # hidden states; keys, values of each layer


def test_a_plan_over_its_budget_proposes_a_profile() -> None:
    own = load_profile("bf16-24gb").model_copy(update={"name": "own"})
    with pytest.raises(InputError) as error:
        check(plan(sizes(), own, batch=2))
    message = str(error.value)
    assert message.startswith("v1.1 with own, 1024x1024, batch 2, is ")
    assert "over its 24 GB in denoise (transformer 17.3, activations " in message
    assert message.endswith("); fp8-18gb (compute capability 8.9) fits")
    assert "\n" not in message


def test_or_the_largest_size() -> None:
    small = profile(budget_gb=3, host_memory_gb=1)
    limit = plan(sizes(None), small, canvas=Canvas(192, 192)).peak.bytes / 1e9
    own = small.model_copy(update={"budget_gb": limit, "device": "cuda:0"})
    with pytest.raises(InputError, match=r"in (denoise|decode|encode_image) .*; size 192 fits"):
        check(plan(sizes(None), own, canvas=Canvas(272, 272)))


def test_host_memory_has_a_limit_of_its_own() -> None:
    own = profile(budget_gb=1000, host_memory_gb=0.001, device="cuda:0", residency={"text": "evict"})
    found = plan(sizes(None), own, canvas=Canvas(64, 64))
    assert found.over < 0 < found.host_over
    with pytest.raises(InputError, match=r"over its 0.001 GB in host memory \(language model"):
        check(found)


def test_v12_is_planned_for_its_longest_instruction() -> None:
    found = plan(sizes("v1.2"), load_profile("fp8-24gb"), canvas=Canvas(64, 64))
    assert (found.work.rows, found.work.steps) == (2048, 50)
    assert item(found, "denoise", "folded") > 50 * 2 * 2048 * 3072 * 2


def test_json_is_plain() -> None:
    found = plan(sizes(None), load_profile("fp8-18gb"), canvas=Canvas(64, 64))
    facts = json.loads(json.dumps(found.as_json()))
    assert facts["peak_bytes"] == max(one["bytes"] for one in facts["phases"])
    assert [one["name"] for one in facts["phases"]] == list(PHASES)
    assert (facts["fits"], facts["budget_bytes"]) == (True, 18_000_000_000)


def test_graphs_share_one_pool_that_stays() -> None:
    """Captured steps: inputs of each graph in every phase after loading, a step's activations once."""
    plain, captured = plan(sizes(), profile()), plan(sizes(), profile(compiled=True))
    assert not any(one.kind == "graphs" for at in plain.phases for one in at.items)
    inputs = item(captured, "denoise", "CUDA graphs")
    work, config = captured.work, sizes().dit
    branches = 2 * work.batch
    # Of both branches: modulations (6 vectors for each of two streams, or 3), text, tokens with the velocity,
    # and cosine and sine of every position in float32.
    vectors = 12 * config.depth + 3 * config.depth_single + 2
    text = branches * 640 * config.hidden_size
    tokens = branches * (2 + 1 / 2) * work.canvas.tokens * config.in_channels
    rotary = branches * (640 + 2 * work.canvas.tokens) * sum(config.rope_axes) // 2 * 2 * 4
    bfloat16 = vectors * config.hidden_size * branches + text + tokens
    assert inputs == pytest.approx(counted.GRAPHS * (2 * bfloat16 + rotary), rel=0.02)
    step = item(captured, "denoise", "activations")
    for name in ("encode_text", "encode_image", "prepare", "decode"):
        assert item(captured, name, "CUDA graphs") == inputs + step
    assert item(captured, "load", "CUDA graphs") == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cpu"},
        {"backend": "aoti"},
        {"residency": {"dit": "stream", "stream_blocks": 2}},
    ],
)
def test_nothing_is_captured(changes: dict[str, Any]) -> None:
    found = plan(sizes(None), profile(compiled=True, **changes), canvas=Canvas(64, 64))
    assert not any(one.kind == "graphs" for at in found.phases for one in at.items)
