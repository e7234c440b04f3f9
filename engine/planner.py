"""What an edit takes of the memory, phase by phase, before anything is loaded.

A pure function of a model's sizes, a profile and the work: it needs no GPU and no weights, and runs anywhere. The
figures are those of planned_bytes.py; what stays where is here, as the profile's residency says.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from step1x.engine.errors import InputError
from step1x.profiles import Profile, Residency, load_profile, profile_names

if TYPE_CHECKING:
    from step1x.engine.hollow import ModelSizes
    from step1x.engine.image import Canvas
    from step1x.engine.planned_bytes import Stored, Work

Kind = Literal["weights", "tables", "kept", "activations", "graphs", "context"]

PHASES = ("load", "encode_text", "encode_image", "prepare", "denoise", "decode")  # stages of timing.py that take much
# CUDA's context with the workspaces of its libraries and CUDA graphs: an estimate (performance.md §C).
CONTEXT_BYTES = 1_200_000_000
# A process on a CPU before it edits, without weights: Python, torch, transformers, and code that oneDNN makes. Measured
# on Linux with torch 2.13 as the resident set of a loaded process (docs/memory.md).
LIBRARY_BYTES = 506_000_000
SIZES = (512, 768, 1024)
SIZE_STEP = 64  # between the sizes that are proposed


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes memory."""

    name: str
    kind: Kind
    bytes: int


@dataclass(frozen=True, slots=True)
class Phase:
    """What is there at the moment of a stage when most memory is taken."""

    name: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Bytes in the device's memory by phase, and those of weights that wait in pinned host memory.

    Of a profile for the CPU, the phases are in host memory.
    """

    model: "ModelSizes"
    profile: Profile
    work: "Work"
    phases: tuple[Phase, ...]
    host: tuple[Item, ...]

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def budget(self) -> int:
        """Bytes that the phases may take; 0: no limit."""
        of_device = self.profile.host_memory_gb if self.profile.device == "cpu" else self.profile.budget_gb
        return round(of_device * 1e9)

    @property
    def over(self) -> int:
        """Bytes by which the peak is over the budget; negative: to spare. 0 without a limit."""
        return self.peak.bytes - self.budget if self.budget else 0

    @property
    def host_bytes(self) -> int:
        return sum(item.bytes for item in self.host)

    @property
    def host_over(self) -> int:
        """As `over`, of pinned host memory."""
        limit = round(self.profile.host_memory_gb * 1e9)
        return self.host_bytes - limit if limit else 0

    @property
    def fits(self) -> bool:
        return self.over <= 0 and self.host_over <= 0

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return {
            "model": self.model.name,
            "profile": self.profile.name,
            **asdict(self.work),
            "phases": [{**asdict(phase), "bytes": phase.bytes} for phase in self.phases],
            "peak": self.peak.name,
            "peak_bytes": self.peak.bytes,
            "budget_bytes": self.budget,
            "host": [asdict(item) for item in self.host],
            "host_bytes": self.host_bytes,
            "host_limit_bytes": round(self.profile.host_memory_gb * 1e9),
            "fits": self.fits,
        }


def plan(
    model: "ModelSizes",
    profile: Profile,
    *,
    canvas: "Canvas | None" = None,
    batch: int | None = None,
    steps: int | None = None,
    guided: bool = True,
    rows: int | None = None,
) -> Plan:
    """The memory that an edit takes.

    By default it is the largest that the profile is for (a square of its size, its batch), with the steps of the
    model's variant and the longest instruction that it reads. rows: valid text rows of another one.
    """
    from step1x.engine.image import Canvas, fit
    from step1x.engine.planned_bytes import Work

    work = Work(
        canvas=canvas or Canvas(*fit(1, 1, profile.size)),
        batch=batch or profile.batch,
        steps=steps or model.variant.steps,
        guided=guided,
        rows=rows or model.variant.text_tokens,
    )
    placed = _placed(model, profile)
    items = _stages(model, profile, work)
    always = [Item(place.name, "weights", place.always) for place in placed]
    if on_gpu(profile):
        always.append(Item("CUDA context, workspaces", "context", CONTEXT_BYTES))
    if profile.device == "cpu":
        always.append(Item("Python and libraries", "context", LIBRARY_BYTES))
    phases = []
    for name in PHASES:
        brought = [Item(f"{place.name}, brought", "weights", place.brought) for place in placed if name in place.phases]
        phases.append(Phase(name, tuple(item for item in (*always, *brought, *items[name]) if item.bytes)))
    host = tuple(Item(place.name, "weights", place.host) for place in placed if place.host)
    return Plan(model=model, profile=profile, work=work, phases=tuple(phases), host=host)


def weights_bytes(model: "ModelSizes", profile: Profile) -> int:
    """What a plan takes at least: weights and context in the phase that has most of them. Needs no plan."""
    placed = _placed(model, profile)
    brought = max(sum(place.brought for place in placed if name in place.phases) for name in PHASES)
    return sum(place.always for place in placed) + brought + (CONTEXT_BYTES if on_gpu(profile) else 0)


def on_gpu(profile: Profile) -> bool:
    """Whether the phases are in a GPU's memory; "auto" is planned for one."""
    return profile.device not in ("cpu", "mps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the weights of a component are: bytes on the device in every phase, in its own phases, and on the host."""

    name: str
    always: int
    phases: tuple[str, ...] = ()  # in which it works
    brought: int = 0  # in these
    host: int = 0  # pinned


def _placed(model: "ModelSizes", profile: Profile) -> list[Place]:
    import torch

    from step1x.engine.planned_bytes import text_weights, transformer_weights, vae_weights

    # A machine without a GPU has one memory: nothing is gained by bringing and dropping.
    lies = Residency() if profile.device == "cpu" else profile.residency
    dtype, schemes = getattr(torch, profile.dtype), profile.weights
    transformer = transformer_weights(model.dit, dtype, schemes.dit, schemes.folded)
    text = text_weights(model.qwen, dtype, schemes.text, schemes.vision)
    vae = vae_weights(model.vae, getattr(torch, profile.vae_dtype))
    reading = ("encode_text",)
    return [
        _streamed("transformer", transformer["transformer"], ("denoise",), lies.stream_blocks),
        _resident("connector", transformer["connector"]),
        _folded("modulations", transformer["modulations"], lies.folded),
        _by_residency("language model", text["language model"], lies.text, reading),
        _embeddings("embeddings", text["embeddings"], lies.text, reading),
        _by_residency("vision tower", text["vision tower"], lies.vision, reading),
        _by_residency("autoencoder", vae, lies.vae, ("encode_image", "decode")),
    ]


def _folded(name: str, tensors: "Stored", residency: str) -> Place:
    if residency == "resident":
        return _resident(name, tensors)
    largest = max(_summed(tensors, lambda key: key.rpartition(".")[0]).values())
    return Place(name=name, always=0, phases=("prepare",), brought=largest, host=sum(tensors.values()))


def _embeddings(name: str, tensors: "Stored", residency: str, phases: tuple[str, ...]) -> Place:
    """Rows of a streamed model's embeddings are looked up on the host: an edit needs hundreds of its 150 thousand."""
    if residency == "stream":
        return Place(name=name, always=0, host=sum(tensors.values()))
    return _by_residency(name, tensors, residency, phases)


def _resident(name: str, tensors: "Stored") -> Place:
    return Place(name=name, always=sum(tensors.values()))


def _by_residency(name: str, tensors: "Stored", residency: str, phases: tuple[str, ...]) -> Place:
    if residency == "resident":
        return _resident(name, tensors)
    if residency == "evict":
        total = sum(tensors.values())
        return Place(name=name, always=0, phases=phases, brought=total, host=sum(tensors.values()))
    streamed = _streamed(name, tensors, phases, len(_summed(tensors, _block)))
    # All of it goes after use, also what lies between the streamed blocks.
    return replace(streamed, always=0, brought=streamed.brought + streamed.always, host=sum(tensors.values()))


def _streamed(name: str, tensors: "Stored", phases: tuple[str, ...], count: int) -> Place:
    """`count` of the blocks on the host, evenly spaced, and on the device two buffers of the largest one.

    Raises InputError if there are not so many.
    """
    from step1x.engine.residency import spaced

    blocks = _summed(tensors, _block)
    if count > len(blocks):
        raise InputError(f"stream_blocks is {count}, but the {name} has {len(blocks)} blocks")
    away = [list(blocks)[index] for index in spaced(count, len(blocks))]
    size, host = sum(tensors.values()), [tensors[key] for key in tensors if _block(key) in away]
    buffers = 2 * max((blocks[block] for block in away), default=0)
    return Place(name=name, always=size - sum(host), phases=phases, brought=buffers, host=sum(host))


def _block(key: str) -> str | None:
    """The block that a tensor belongs to: double_blocks.3 of double_blocks.3.img_attn.qkv.weight."""
    parts = key.split(".")
    return next((".".join(parts[: index + 1]) for index, part in enumerate(parts) if part.isdigit()), None)


def _summed(tensors: "Stored", group: Callable[[str], str | None]) -> dict[str, int]:
    """Bytes by group; those of None are left out."""
    sums: dict[str, int] = {}
    for key, size in tensors.items():
        name = group(key)
        if name is not None:
            sums[name] = sums.get(name, 0) + size
    return sums


def _stages(model: "ModelSizes", profile: Profile, work: "Work") -> dict[str, list[Item]]:
    """What is computed in each phase, and what of it is kept for later ones."""
    from step1x.engine.planned_bytes import text_bytes, transformer_bytes, vae_bytes

    text, dit = text_bytes(model, profile, work), transformer_bytes(model, profile, work)
    encode, decode = vae_bytes(model, profile, work)
    # One pool holds a step's activations for all graphs, and keeps them between edits.
    graphs = Item("CUDA graphs", "graphs", dit.graphs)
    pool = Item("CUDA graphs", "graphs", dit.graphs + dit.step if dit.graphs else 0)
    kept, request = Item("text as read", "tables", text.kept), Item("request", "tables", dit.request)
    return {
        "load": [],
        "encode_text": [pool, Item("activations", "activations", text.peak)],
        "encode_image": [pool, kept, Item("activations", "activations", encode)],
        "prepare": [pool, kept, request, Item("activations", "activations", dit.prepare)],
        "denoise": [
            *(graphs, kept, request, Item("folded", "tables", dit.tables)),
            Item("keys and values", "kept", _keys_and_values(model, profile, work)),
            Item("activations", "activations", dit.step),
        ],
        "decode": [pool, kept, request, Item("activations", "activations", decode)],
    }


def _keys_and_values(model: "ModelSizes", profile: Profile, work: "Work") -> int:
    """What steps on some rows need of the others (kept.py): of every branch that is evaluated."""
    from step1x.engine.kept import kept_bytes

    if profile.speed == "exact":
        return 0
    rows = work.rows + 2 * work.canvas.tokens
    branches = 2 if work.guided else 1
    return kept_bytes(model.dit, branches * work.batch * rows, 1 if profile.kv_dtype == "float8" else 2)


def check(plan: Plan) -> None:
    """Raises InputError for a plan over its budget: the phase, its largest items, and what fits instead."""
    if plan.fits:
        return
    profile, canvas = plan.profile, plan.work.canvas
    what = f"{plan.model.name} with {profile.name}, {canvas.width}x{canvas.height}, batch {plan.work.batch}"
    if plan.over > 0:
        over, limit, where, items = plan.over, plan.budget, plan.peak.name, plan.peak.items
    else:
        over, limit, where, items = plan.host_over, round(profile.host_memory_gb * 1e9), "host memory", plan.host
    largest = sorted(items, key=lambda item: -item.bytes)[:3]
    most = ", ".join(f"{item.name} {item.bytes / 1e9:.1f}" for item in largest)
    raise InputError(
        f"{what}, is {over / 1e9:.1f} GB over its {limit / 1e9:g} GB in {where} ({most}); {proposal(plan)}"
    )


def proposal(plan: Plan) -> str:
    """What fits where a plan does not: the shipped profile with the nearest budget below, else the largest size."""
    own = plan.profile
    shipped = [load_profile(name) for name in profile_names()]
    others = [one for one in shipped if one.device == own.device and one != own and 0 < one.budget_gb <= own.budget_gb]
    # Of one budget, first those that run on every card that the asked one runs on.
    for other in sorted(others, key=lambda one: (-one.budget_gb, one.capability > own.capability)):
        if _again(plan, profile=other).fits:
            needs = f" (compute capability {other.capability})" if other.capability > own.capability else ""
            return f"{other.name}{needs} fits"
    level = round((plan.work.canvas.width * plan.work.canvas.height) ** 0.5)
    smaller = range(SIZE_STEP, level, SIZE_STEP)
    fitting = bisect_left(smaller, True, key=lambda size: not _again(plan, size=size).fits)
    return f"size {smaller[fitting - 1]} fits" if fitting else "no shipped profile and no size fits"


def _again(asked: Plan, *, profile: Profile | None = None, size: int | None = None) -> Plan:
    """The plan for another profile, or for another size of the same shape."""
    from step1x.engine.image import Canvas, fit

    work = asked.work
    canvas = work.canvas if size is None else Canvas(*fit(work.canvas.width, work.canvas.height, size))
    return plan(
        asked.model,
        profile or asked.profile,
        canvas=canvas,
        batch=work.batch,
        steps=work.steps,
        guided=work.guided,
        rows=work.rows,
    )
