"""Records the bfloat16 golden set: a small transformer in float64, each rounding of each preset written out.

    python tests/golden/record_bf16.py           writes bf16.safetensors and bf16.json beside this file
    python tests/golden/record_bf16.py --check   computes anew and compares with what was recorded

Nothing of the engine is used. Between two roundings all is float64, so what is recorded depends on no kernel's order of
sums. The roundings are those of model.md §3.14 and §5.4: `bf16` stands wherever a tensor of the released programs is
bfloat16, `fp32` wherever float32 loses digits that count.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
WIDTH, HEADS, MLP, CHANNELS = 64, 2, 128, 64
CONTEXT, TEXT_WIDTH, POOLED, SINUSOID = 32, 32, 32, 64
DEPTH, DEPTH_SINGLE = 1, 2
AXES, THETA = (8, 12, 12), 10.0
GRID, TEXTS, VALID = (4, 6), 9, (7, 5)  # valid rows: of the instruction, of the negative one
STEPS, GUIDANCE, SEED = 4, 6.0, 20
RELEASED = (28, 4096)  # steps and target tokens at 1024 x 1024, whose times are recorded too


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What a preset rounds."""

    autocast: bool  # normalized rows stay float32 up to the product; the second residual is rounded once
    rescale_above: float
    reference_ids: tuple[int, int, int]
    wide_state: bool = False  # float32 latents and t from the second step on
    scaled_mean: bool = False  # v1.0
    mapping: bool = False  # v1.2


FLOWS = {
    "official-v1.0": Flow(autocast=True, rescale_above=1.0, reference_ids=(0, 0, 0), scaled_mean=True),
    "official-v1.1": Flow(autocast=True, rescale_above=0.93, reference_ids=(1, 1, 1), wide_state=True),
    "diffusers-v1.1": Flow(autocast=False, rescale_above=0, reference_ids=(1, 1, 1)),
    "diffusers-v1.2": Flow(autocast=False, rescale_above=0, reference_ids=(1, 0, 0), mapping=True),
}


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


def fp32(x: Tensor) -> Tensor:
    return x.float().double()


def shapes() -> dict[str, tuple[int, ...]]:
    """Of all parameters but the vectors of norms, by the official names."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, given: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, given), (out,)

    linear("img_in", WIDTH, CHANNELS)
    linear("txt_in", WIDTH, CONTEXT)
    for name, given in (("time_in", SINUSOID), ("vector_in", POOLED)):
        linear(f"{name}.in_layer", WIDTH, given)
        linear(f"{name}.out_layer", WIDTH, WIDTH)
    for block in range(DEPTH):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            linear(f"{name}_mod.lin", 6 * WIDTH, WIDTH)
            linear(f"{name}_attn.qkv", 3 * WIDTH, WIDTH)
            linear(f"{name}_attn.proj", WIDTH, WIDTH)
            linear(f"{name}_mlp.0", MLP, WIDTH)
            linear(f"{name}_mlp.2", WIDTH, MLP)
    for block in range(DEPTH_SINGLE):
        linear(f"single_blocks.{block}.modulation.lin", 3 * WIDTH, WIDTH)
        linear(f"single_blocks.{block}.linear1", 3 * WIDTH + MLP, WIDTH)
        linear(f"single_blocks.{block}.linear2", WIDTH, WIDTH + MLP)
    linear("final_layer.linear", CHANNELS, WIDTH)
    linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    linear("connector.global_proj_out", POOLED, TEXT_WIDTH)
    linear("connector.S.input_embedder", CONTEXT, TEXT_WIDTH)
    linear("connector.S.t_embedder.mlp.0", CONTEXT, SINUSOID)
    linear("connector.S.t_embedder.mlp.2", CONTEXT, CONTEXT)
    linear("connector.S.c_embedder.linear_1", CONTEXT, TEXT_WIDTH)
    linear("connector.S.c_embedder.linear_2", CONTEXT, CONTEXT)
    name = "connector.S.individual_token_refiner.blocks.0"
    linear(f"{name}.self_attn_qkv", 3 * CONTEXT, CONTEXT)
    linear(f"{name}.self_attn_proj", CONTEXT, CONTEXT)
    linear(f"{name}.mlp.fc1", 2 * CONTEXT, CONTEXT)
    linear(f"{name}.mlp.fc2", CONTEXT, 2 * CONTEXT)
    linear(f"{name}.adaLN_modulation.1", 2 * CONTEXT, CONTEXT)
    linear("text_token_mapping", CONTEXT, TEXT_WIDTH)
    return found


def drawn() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and inputs, bfloat16 numbers all. Products keep about the size of what goes in."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {
        name: bf16(normal(*shape) * (1.2 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.3))
        for name, shape in shapes().items()
    }
    norms = [f"double_blocks.{block}.{side}_attn.norm" for block in range(DEPTH) for side in ("img", "txt")]
    norms += [f"single_blocks.{block}.norm" for block in range(DEPTH_SINGLE)]
    for norm in norms:
        for side in ("query", "key"):
            weights[f"{norm}.{side}_norm.scale"] = bf16(1 + 0.4 * normal(WIDTH // HEADS))
    for norm in ("norm1", "norm2"):
        name = f"connector.S.individual_token_refiner.blocks.0.{norm}"
        weights[f"{name}.weight"], weights[f"{name}.bias"] = bf16(1 + 0.4 * normal(CONTEXT)), bf16(normal(CONTEXT))
    weights["connector.scale_factor"] = bf16(torch.full((1,), -0.91, dtype=torch.float64))
    mask = torch.stack([(torch.arange(TEXTS) < valid).double() for valid in VALID])
    tokens = math.prod(GRID)
    return weights, {
        "tokens": bf16(normal(2, TEXTS, TEXT_WIDTH)) * mask[..., None],
        "embeds": bf16(normal(2, TEXTS, TEXT_WIDTH)),
        "quoted": torch.stack([(torch.arange(TEXTS) % 3 == row).double() for row in range(2)]),
        "mask": mask,
        "noise": bf16(normal(1, tokens, CHANNELS)),
        "reference": bf16(normal(1, tokens, CHANNELS)),
    }


def schedule(steps: int = STEPS, tokens: int = GRID[0] * GRID[1]) -> Tensor:
    """§5.3, in float32."""
    slope = (1.15 - 0.5) / (4096 - 256)
    e = math.exp(slope * tokens + 0.5 - 256 * slope)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float32)
    return (e / (e + (1 / t - 1))).double()


def rope(reference_ids: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Tables (1, 1, tokens, head_dim / 2): angles in float64, kept in float32 (§3.6)."""
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, GRID), indexing="ij"))
    target = torch.stack((torch.zeros_like(rows), rows, columns), dim=1)
    ids = torch.cat((torch.zeros(TEXTS, 3), target, target + torch.tensor(reference_ids))).double()
    angles = [
        ids[:, axis, None] * THETA ** -(torch.arange(0, width, 2).double() / width) for axis, width in enumerate(AXES)
    ]
    angle = torch.cat(angles, dim=1)[None, None]
    return fp32(angle.cos()), fp32(angle.sin())


def silu(x: Tensor) -> Tensor:
    return bf16(x / (1 + torch.exp(-x)))


def gelu(x: Tensor) -> Tensor:
    return bf16(0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def layer_norm(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """All in float32, one rounding at its end (§3.5)."""
    return bf16(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale)


def rotated(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Adjacent channels turned in float32, one rounding at its end."""
    (cos, sin), even, odd = tables, x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2], out[..., 1::2] = cos * even - sin * odd, sin * even + cos * odd
    return bf16(out)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Flash attention: logits and sums in float32, exponentials rounded for their product with v."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    out = bf16(bf16(weights) @ v / weights.sum(-1, keepdim=True))
    return out.transpose(1, 2).flatten(2)


def heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def sinusoid(thousandths: Tensor) -> Tensor:
    """(batch, SINUSOID) in float32, rounded to bfloat16 (§2)."""
    half = SINUSOID // 2
    frequencies = fp32(torch.exp(-math.log(10000.0) * torch.arange(half).double() / half))
    angles = fp32(thousandths[:, None] * frequencies)
    return bf16(torch.cat((angles.cos(), angles.sin()), dim=1))


class Reference:
    """The transformer and its loop, in the flow of a preset."""

    def __init__(self, flow: Flow, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        self.flow, self.weights, self.inputs = flow, weights, inputs
        self.tables = rope(flow.reference_ids)
        self.stages: dict[str, Tensor] = {}  # of the second step, the conditional row first

    def linear(self, name: str, x: Tensor) -> Tensor:
        return bf16(bf16(x) @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"])

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if self.flow.autocast:
            return bf16(bf16(1 + scale) * layer_norm(x) + shift)  # at the product that takes it
        return bf16(bf16(bf16(1 + scale) * bf16(layer_norm(x))) + shift)

    def embedded(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.out_layer", silu(self.linear(f"{name}.in_layer", x)))

    def context(self, mean: Tensor, time: Tensor) -> Tensor:
        """The connector's rows as the first block takes them (§2)."""
        inputs, name = self.inputs, "connector.S.individual_token_refiner.blocks.0"
        te = self.linear(
            "connector.S.t_embedder.mlp.2", silu(self.linear("connector.S.t_embedder.mlp.0", sinusoid(time)))
        )
        ce = self.linear("connector.S.c_embedder.linear_2", silu(self.linear("connector.S.c_embedder.linear_1", mean)))
        gate1, gate2 = self.linear(f"{name}.adaLN_modulation.1", silu(bf16(te + ce)))[:, None].chunk(2, dim=-1)
        valid = inputs["mask"].bool()
        visible = valid[:, :, None] & valid[:, None, :]
        visible[:, :, 0] = True
        h = self.linear("connector.S.input_embedder", inputs["tokens"])
        q, k, v = heads_of(self.linear(f"{name}.self_attn_qkv", self.affine(f"{name}.norm1", h)), HEADS)
        h = bf16(h + bf16(gate1 * self.linear(f"{name}.self_attn_proj", attend(q, k, v, visible[:, None]))))
        hidden = silu(self.linear(f"{name}.mlp.fc1", self.affine(f"{name}.norm2", h)))
        h = bf16(h + bf16(gate2 * self.linear(f"{name}.mlp.fc2", hidden)))
        if self.flow.mapping:
            mapped = self.linear("text_token_mapping", inputs["embeds"]) * inputs["quoted"][..., None]
            h = bf16(h + mapped)
        return self.linear("txt_in", h)

    def affine(self, name: str, x: Tensor) -> Tensor:
        return bf16(layer_norm(x) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])

    def conditioned(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Text rows and the vector that all modulations are made of. time: (2,), in thousandths."""
        mask = self.inputs["mask"][..., None]
        mean = (self.inputs["tokens"] * mask).sum(1) / mask.sum(1)  # float32, rounded where a product takes it
        scaled = mean * (1 + self.weights["connector.scale_factor"]) if self.flow.scaled_mean else mean
        pooled = self.embedded("vector_in", self.linear("connector.global_proj_out", scaled))
        return self.context(mean, time), bf16(self.embedded("time_in", sinusoid(time)) + pooled)

    def double(self, index: int, img: Tensor, txt: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        name, rows, heads = f"double_blocks.{index}", {"txt": txt, "img": img}, []
        mods = {side: self.linear(f"{name}.{side}_mod.lin", silu(vector))[:, None].chunk(6, dim=-1) for side in rows}
        for side, x in rows.items():
            normed = self.modulated(x, *mods[side][:2])
            q, k, v = heads_of(self.linear(f"{name}.{side}_attn.qkv", normed), HEADS)
            heads.append((*self.scaled(f"{name}.{side}_attn.norm", q, k), v))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        attended = attend(rotated(q, self.tables), rotated(k, self.tables), v).split((txt.shape[1], img.shape[1]), 1)
        for (side, x), given in zip(rows.items(), attended, strict=True):
            _, _, gate1, shift, scale, gate2 = mods[side]
            x = bf16(x + bf16(gate1 * self.linear(f"{name}.{side}_attn.proj", given)))
            hidden = gelu(self.linear(f"{name}.{side}_mlp.0", self.modulated(x, shift, scale)))
            change = gate2 * self.linear(f"{name}.{side}_mlp.2", hidden)
            rows[side] = bf16(x + (change if self.flow.autocast else bf16(change)))
        return rows["img"], rows["txt"]

    def scaled(self, name: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        query, key = (self.weights[f"{name}.{side}_norm.scale"] for side in ("query", "key"))
        return rms_norm(q, query), rms_norm(k, key)

    def single(self, index: int, x: Tensor, vector: Tensor) -> Tensor:
        name = f"single_blocks.{index}"
        shift, scale, gate = self.linear(f"{name}.modulation.lin", silu(vector))[:, None].chunk(3, dim=-1)
        qkv, hidden = self.linear(f"{name}.linear1", self.modulated(x, shift, scale)).split((3 * WIDTH, MLP), dim=-1)
        q, k, v = heads_of(qkv, HEADS)
        q, k = self.scaled(f"{name}.norm", q, k)
        attended = attend(rotated(q, self.tables), rotated(k, self.tables), v)
        return bf16(x + bf16(gate * self.linear(f"{name}.linear2", torch.cat((attended, gelu(hidden)), dim=-1))))

    def velocity(self, latents: Tensor, time: Tensor, keep: bool) -> Tensor:
        """(2, target tokens, channels); keep: puts what the blocks take and give into `stages`."""
        tokens = torch.cat((bf16(latents), self.inputs["reference"]), dim=1).expand(2, -1, -1)
        txt, vector = self.conditioned(time.expand(2))
        img = self.linear("img_in", tokens)
        stages = {"vector": vector, "img_in": img, "txt_in": txt}
        for index in range(DEPTH):
            img, txt = self.double(index, img, txt, vector)
            stages |= {f"double{index}_img": img, f"double{index}_txt": txt}
        rows = torch.cat((txt, img), dim=1)
        for index in range(DEPTH_SINGLE):
            rows = self.single(index, rows, vector)
            stages[f"single{index}"] = rows
        shift, scale = self.linear("final_layer.adaLN_modulation.1", silu(vector))[:, None].chunk(2, dim=-1)
        out = self.linear("final_layer.linear", self.modulated(rows[:, TEXTS:], shift, scale))
        if keep:
            self.stages = {**stages, "velocity": out}
        return out[:, : latents.shape[1]]

    def thousandths(self, t: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """t as the model is given it, and what its embeddings take, 1000 t, each rounded as the preset's are (§5.4)."""
        if self.flow.wide_state and not first:
            return fp32(t), fp32(1000 * fp32(t))
        given = bf16(t) if self.flow.autocast else bf16(bf16(fp32(1000 * t)) / 1000)
        return given, bf16(1000 * given)

    def guided(self, velocity: Tensor, t: float) -> Tensor:
        """What the latents follow."""
        cond, uncond = velocity[:1], velocity[1:]
        difference = bf16(cond - uncond)
        if t <= self.flow.rescale_above:
            return bf16(uncond + bf16(GUIDANCE * difference))
        size = difference.square().sum(-1, keepdim=True).sqrt()
        if self.flow.autocast:  # the norm is float32, and with it all that follows
            return uncond + GUIDANCE * (difference / torch.where(size > 1, size**0.4, 1.0))
        size, power = bf16(size), float(torch.tensor(0.4).bfloat16())  # torch takes an exponent in the tensor's dtype
        divided = bf16(difference / torch.where(size > 1, bf16(size**power), 1.0))
        return bf16(uncond + bf16(GUIDANCE * divided))

    def run(self) -> dict[str, Tensor]:
        """Everything that is recorded of a preset."""
        levels, latents = schedule(), self.inputs["noise"]
        found: dict[str, list[Tensor]] = {"t": [], "velocity": [], "latents": []}
        for index in range(STEPS):
            t, following = levels[index], levels[index + 1]
            given, thousandths = self.thousandths(t, index == 0)
            velocity = self.velocity(latents, thousandths[None], keep=index == 1)
            guided, length = self.guided(velocity, float(t)), float(following) - float(t)
            if self.flow.wide_state:
                latents = fp32(latents + length * guided)
            elif self.flow.autocast:
                latents = bf16(latents + bf16(length * guided))
            else:
                latents = bf16(latents + length * guided)
            for name, value in (("t", given), ("velocity", velocity), ("latents", latents)):
                found[name].append(value)
        found["released_t"] = [self.thousandths(t, at == 0)[0] for at, t in enumerate(schedule(*RELEASED)[:-1])]
        return {name: torch.stack(values) for name, values in found.items()} | {
            f"second.{name}": value for name, value in self.stages.items()
        }


def recording() -> dict[str, Tensor]:
    """All tensors of the set, in the narrowest dtype that holds them."""
    weights, inputs = drawn()
    found = {f"weights.{name}": value.to(torch.bfloat16) for name, value in weights.items()}
    found |= {f"in.{name}": value.to(torch.bfloat16) for name, value in inputs.items()}
    found["in.schedule"], found["in.released_schedule"] = schedule().float(), schedule(*RELEASED).float()
    for name, flow in FLOWS.items():
        for key, value in Reference(flow, weights, inputs).run().items():
            narrow = value.to(torch.bfloat16)
            found[f"{name}.{key}"] = narrow if torch.equal(narrow.double(), value) else value.float()
    return {name: value.contiguous() for name, value in found.items()}


def facts() -> dict[str, object]:
    """Sizes that the tensors do not say."""
    return {
        "depth": DEPTH,
        "depth_single": DEPTH_SINGLE,
        "heads": HEADS,
        "rope_axes": AXES,
        "rope_theta": THETA,
        "grid": GRID,
        "guidance": GUIDANCE,
        "timestep_channels": SINUSOID,
        "valid": VALID,
    }


def differing(found: dict[str, Tensor], recorded: dict[str, Tensor]) -> list[str]:
    """Tensors of other shapes or dtypes, or of which more than one number in a hundred is another."""
    if found.keys() != recorded.keys():
        return sorted(found.keys() ^ recorded.keys())
    return [
        name
        for name, value in found.items()
        if value.shape != recorded[name].shape
        or value.dtype != recorded[name].dtype
        or (value != recorded[name]).double().mean() > 0.01
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with what was recorded, write nothing")
    wanted = parser.parse_args()
    tensors, path = recording(), HERE / "bf16.safetensors"
    if wanted.check:
        wrong = differing(tensors, load_file(path))
        print("\n".join(f"{name}: not as recorded" for name in wrong) or f"{len(tensors)} tensors as recorded")
        raise SystemExit(1 if wrong else 0)
    save_file(tensors, path)
    (HERE / "bf16.json").write_text(json.dumps(facts(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
