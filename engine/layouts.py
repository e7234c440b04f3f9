"""The two key layouts of a checkpoint, official and diffusers, as data (model.md §3.11, §4).

The modules of this package carry the official names. A `Target` says how one tensor of one layout is made
of rows of tensors of the other. Nothing here touches a tensor; every size comes from the shapes that are
given.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from step1x.engine.errors import InputError

Layout = Literal["official", "diffusers"]
Shapes = Mapping[str, tuple[int, ...]]  # of the official layout, by key


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a tensor, or all of it."""

    source: str
    shape: tuple[int, ...]  # of the whole source tensor
    start: int = 0
    rows: int | None = None  # None: all


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor to be made: its parts stacked along the first axis, then viewed as `shape`."""

    key: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """Official name -> diffusers names. {i}, {j} are indices, {up} counts from the other end, {side} is a
    half.

    stack: rows of the one are the tensors of the other, in this order; swap: the two row halves change
    places; linear: a 1x1 convolution of the one is a linear layer of the other.
    """

    official: str
    diffusers: tuple[str, ...]
    how: Literal["same", "stack", "swap", "linear"] = "same"


def _stream(
    name: str, context: str, attention: tuple[str, str, str], norms: tuple[str, str], out: str
) -> tuple[Rule, ...]:
    """Rules of one stream of a double block; the diffusers names differ between the two streams."""
    official, diffusers = f"double_blocks.{{i}}.{name}", "transformer_blocks.{i}"
    return (
        Rule(f"{official}_mod.lin", (f"{diffusers}.norm1{context}.linear",)),
        Rule(f"{official}_attn.qkv", tuple(f"{diffusers}.attn.{part}" for part in attention), "stack"),
        Rule(f"{official}_attn.norm.query_norm.scale", (f"{diffusers}.attn.{norms[0]}.weight",)),
        Rule(f"{official}_attn.norm.key_norm.scale", (f"{diffusers}.attn.{norms[1]}.weight",)),
        Rule(f"{official}_attn.proj", (f"{diffusers}.attn.{out}",)),
        Rule(f"{official}_mlp.0", (f"{diffusers}.ff{context}.net.0.proj",)),
        Rule(f"{official}_mlp.2", (f"{diffusers}.ff{context}.net.2",)),
    )


SINGLE = "single_transformer_blocks.{i}"
# §3.11; the connector and text_token_mapping have the same names in both.
DIT_RULES = (
    Rule("time_in", ("time_embed",)),
    Rule("vector_in", ("vec_embed",)),
    Rule("txt_in", ("context_embedder",)),
    Rule("img_in", ("x_embedder",)),
    *_stream("img", "", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0"),
    *_stream(
        "txt",
        "_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        ("norm_added_q", "norm_added_k"),
        "to_add_out",
    ),
    Rule("single_blocks.{i}.modulation.lin", (f"{SINGLE}.norm.linear",)),
    Rule(
        "single_blocks.{i}.linear1",
        (f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp"),
        "stack",
    ),
    Rule("single_blocks.{i}.linear2", (f"{SINGLE}.proj_out",)),
    Rule("single_blocks.{i}.norm.query_norm.scale", (f"{SINGLE}.attn.norm_q.weight",)),
    Rule("single_blocks.{i}.norm.key_norm.scale", (f"{SINGLE}.attn.norm_k.weight",)),
    Rule("final_layer.linear", ("proj_out",)),
    # official: shift rows, then scale rows; diffusers: scale, then shift
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), "swap"),
)
DOWN, UP = "encoder.down_blocks.{i}", "decoder.up_blocks.{up}"
MID, ATTENTION = "{side}.mid_block", "{side}.mid_block.attentions.0"
# §4; conv_in and conv_out have the same names in both.
VAE_RULES = (
    Rule("encoder.down.{i}.block.{j}.nin_shortcut", (f"{DOWN}.resnets.{{j}}.conv_shortcut",)),
    Rule("encoder.down.{i}.block.{j}", (f"{DOWN}.resnets.{{j}}",)),
    Rule("encoder.down.{i}.downsample.conv", (f"{DOWN}.downsamplers.0.conv",)),
    Rule("decoder.up.{up}.block.{j}.nin_shortcut", (f"{UP}.resnets.{{j}}.conv_shortcut",)),
    Rule("decoder.up.{up}.block.{j}", (f"{UP}.resnets.{{j}}",)),
    Rule("decoder.up.{up}.upsample.conv", (f"{UP}.upsamplers.0.conv",)),
    Rule("{side}.mid.block_1", (f"{MID}.resnets.0",)),
    Rule("{side}.mid.block_2", (f"{MID}.resnets.1",)),
    Rule("{side}.mid.attn_1.norm", (f"{ATTENTION}.group_norm",)),
    Rule("{side}.mid.attn_1.q", (f"{ATTENTION}.to_q",), "linear"),
    Rule("{side}.mid.attn_1.k", (f"{ATTENTION}.to_k",), "linear"),
    Rule("{side}.mid.attn_1.v", (f"{ATTENTION}.to_v",), "linear"),
    Rule("{side}.mid.attn_1.proj_out", (f"{ATTENTION}.to_out.0",), "linear"),
    Rule("{side}.norm_out", ("{side}.conv_norm_out",)),
)


def _pattern(official: str) -> str:
    holes = {r"\{i\}": r"(?P<i>\d+)", r"\{j\}": r"(?P<j>\d+)", r"\{up\}": r"(?P<up>\d+)"}
    pattern = re.escape(official).replace(r"\{side\}", "(?P<side>encoder|decoder)")
    for hole, group in holes.items():
        pattern = pattern.replace(hole, group)
    return pattern + r"(?P<leaf>(\.\w+)*)"


@dataclass(frozen=True, slots=True)
class Names:
    """The diffusers names of one official key."""

    how: Literal["same", "stack", "swap", "linear"]
    keys: tuple[str, ...]


class KeyMap:
    """Official key -> diffusers names, for one component."""

    def __init__(self, rules: Iterable[Rule], levels: int = 0) -> None:
        """`levels`: resolutions of an autoencoder; the decoder's are counted from opposite ends."""
        self._rules = [(re.compile(_pattern(rule.official)), rule) for rule in rules]
        self._levels = levels

    def names(self, key: str) -> Names:
        for pattern, rule in self._rules:
            match = pattern.fullmatch(key)
            if match:
                groups = match.groupdict()
                leaf = groups.pop("leaf")
                if "up" in groups:
                    groups["up"] = str(self._levels - 1 - int(groups["up"]))
                return Names(rule.how, tuple(name.format(**groups) + leaf for name in rule.diffusers))
        return Names("same", (key,))


def dit_map() -> KeyMap:
    """The key map of the transformer, connector included."""
    return KeyMap(DIT_RULES)


def vae_map(levels: int) -> KeyMap:
    """The key map of an autoencoder with that many resolutions."""
    return KeyMap(VAE_RULES, levels)


def _stacked(total: int, count: int, width: int) -> list[tuple[int, int]]:
    """(start, rows) of `count` tensors stacked to `total` rows: each has `width`, but the last has the
    rest."""
    starts = [width * index for index in range(count)]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], total], strict=True)]


def _linear(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in, 1, 1) -> (out, in); a bias stays."""
    return shape[:2] if len(shape) == 4 else shape


def targets(shapes: Shapes, layout: Layout, keys: KeyMap, width: int) -> list[Target]:
    """How every official tensor of `shapes` is made of the tensors of a checkpoint in `layout`."""
    return from_official(shapes) if layout == "official" else from_diffusers(shapes, keys, width)


def from_official(shapes: Shapes) -> list[Target]:
    """Official tensors of official tensors: each is itself."""
    return [Target(key, shape, (Part(key, shape),)) for key, shape in shapes.items()]


def from_diffusers(shapes: Shapes, keys: KeyMap, width: int) -> list[Target]:
    """How every official tensor is made of diffusers tensors. `width`: of the transformer."""
    made = []
    for key, shape in shapes.items():
        names = keys.names(key)
        if names.how == "stack":
            cuts = _stacked(shape[0], len(names.keys), width)
            parts = tuple(Part(name, (rows, *shape[1:])) for name, (_, rows) in zip(names.keys, cuts, strict=True))
        elif names.how == "swap":
            parts = _swapped(names.keys[0], shape)
        else:
            parts = (Part(names.keys[0], _linear(shape) if names.how == "linear" else shape),)
        made.append(Target(key, shape, parts))
    return made


def to_diffusers(shapes: Shapes, keys: KeyMap, width: int) -> list[Target]:
    """How every diffusers tensor is made of official tensors. `width`: of the transformer."""
    made = []
    for key, shape in shapes.items():
        names = keys.names(key)
        if names.how == "stack":
            cuts = _stacked(shape[0], len(names.keys), width)
            for name, (start, rows) in zip(names.keys, cuts, strict=True):
                made.append(Target(name, (rows, *shape[1:]), (Part(key, shape, start, rows),)))
        elif names.how == "swap":
            made.append(Target(names.keys[0], shape, _swapped(key, shape)))
        else:
            flat = _linear(shape) if names.how == "linear" else shape
            made.append(Target(names.keys[0], flat, (Part(key, shape),)))
    return made


def _swapped(source: str, shape: tuple[int, ...]) -> tuple[Part, Part]:
    half = shape[0] // 2
    return Part(source, shape, half, half), Part(source, shape, 0, half)


def detect(keys: Iterable[str], where: object) -> Layout:
    """The layout of a transformer's keys. Raises InputError when it is neither."""
    known = set(keys)
    for name, key in (("official", "img_in.weight"), ("diffusers", "x_embedder.weight")):
        if key in known:
            return name  # type: ignore[return-value]
    raise InputError(f"{where}: no Step1X-Edit transformer: neither img_in.weight nor x_embedder.weight is in it")


def detect_vae(keys: Iterable[str], where: object) -> Layout:
    """The layout of an autoencoder's keys. Raises InputError when it is neither."""
    known = set(keys)
    if "encoder.norm_out.weight" in known:
        return "official"
    if "encoder.conv_norm_out.weight" in known:
        return "diffusers"
    raise InputError(
        f"{where}: no FLUX autoencoder: neither encoder.norm_out.weight nor encoder.conv_norm_out.weight is in it"
    )
