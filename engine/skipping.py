"""The sampling loop by a plan: steps that compute everything, some rows, one branch, or nothing (policy.py).

What is kept between steps belongs to one request and dies with it (`Cache`). A plan of full steps gives the same bits
as `denoise.denoise`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from step1x.engine.denoise import Branch, Loop, RowsVelocity, Velocity, advance, euler, folded, times_of
from step1x.engine.dit import DiT, Modulations, Request, Rope, Step
from step1x.engine.errors import InputError
from step1x.engine.kept import Active, Kept
from step1x.engine.plan import Guide, Mode, StepPlan, edited_tokens, relative_change, similarity, spelled
from step1x.engine.policy import Dense, Policy, Probe
from step1x.engine.schedule import guided
from step1x.engine.selection import Selection, choose, distance
from step1x.engine.timing import OnStep

LEAST_BUCKET = 16
Select = Callable[[Tensor, Tensor], Selection]  # of the estimated result and the reference, (batch, tokens, 64) each


def by_similarity(grid: tuple[int, int]) -> Select:
    """Tokens whose estimated result differs from the reference (step-skipping.md §1.2)."""

    def select(estimate: Tensor, reference: Tensor) -> Selection:
        similar = similarity(estimate, reference)
        return choose(edited_tokens(similar, grid), similar, bucket(grid))

    return select


def by_mask(mask: Tensor, grid: tuple[int, int]) -> Select:
    """The tokens (batch, tokens) bool that a mask marks."""
    order = distance(mask, grid)
    return lambda estimate, reference: choose(mask.to(estimate.device), order.to(estimate.device), bucket(grid))


def bucket(grid: tuple[int, int]) -> int:
    """Tokens that the region is rounded up to: a sixteenth of all, 256 at 1024 x 1024 (step-skipping.md §1.10)."""
    return max(grid[0] * grid[1] // 16, LEAST_BUCKET)


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipping:
    """What a request leaves out. eight_bit: keys and values are kept in 8 bits."""

    policy: Policy
    select: Select
    eight_bit: bool = False


@dataclass(slots=True)
class Cache:
    """What one request keeps from step to step."""

    velocity: Tensor | None = None  # guided, of the last computed step: of all target tokens, or of the active ones
    residuals: list[Tensor] = field(default_factory=list)  # of the same tokens and step, of each of its forwards
    guide: Guide = Guide.BOTH  # of that step
    difference: Tensor | None = None  # conditional less unconditional velocity of all target tokens
    selection: Selection | None = None
    rows: Tensor | None = None  # target tokens that `velocity` and the latents that move are of; None: all
    kept: list[Kept] = field(default_factory=list)  # of each branch
    views: dict[tuple[object, ...], tuple[Active, Rope]] = field(default_factory=dict)
    signal: Tensor | None = None  # of the probe
    gathered: float = 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a plan: the latents (batch, Nt, 64), the steps as they were done, and the edited tokens."""

    latents: Tensor
    steps: tuple[StepPlan, ...]
    selection: Selection | None

    @property
    def notes(self) -> dict[str, str | int | float]:
        """For the result's metadata: the plan's letters, and how many tokens of each picture are edited."""
        edited = self.selection and {"edited_tokens": ", ".join(map(str, self.selection.edited))}
        return {"plan": spelled(self.steps), **(edited or {})}


def skip(
    dit: DiT,
    loop: Loop,
    state: tuple[Tensor, Tensor],
    skipping: Skipping,
    on_step: OnStep | None = None,
    trail: list[Tensor] | None = None,
) -> Done:
    """As `denoise.denoise`, leaving out what the policy says. The branches must run by the fused operations.

    Raises InputError for a policy that what runs the branches cannot follow.
    """
    plan = skipping.policy.plan([float(level) for level in loop.schedule], loop.guidance is not None)
    if skipping.policy.residual and any(branch.runner.halves is None for branch in loop.forwards):
        raise InputError(
            "TeaCache keeps what the blocks add, which an exported engine gives to nobody; use --backend torch"
        )
    run = _Run(dit, loop, state, skipping, plan)
    for index in range(len(plan)):
        run.step(index)
        if trail is not None:
            trail.append(run.latents)
        if on_step is not None:
            on_step(index + 1, len(plan))
    return Done(run.latents, tuple(run.done), run.cache.selection)


def watched(
    dit: DiT, loop: Loop, state: tuple[Tensor, Tensor], grid: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Guided velocity and signal of `Probe.TARGET`, (batch, Nt, channels) each, of every step of a dense run."""
    skipping = Skipping(policy=Dense(), select=by_similarity(grid))
    plan = skipping.policy.plan([float(level) for level in loop.schedule], loop.guidance is not None)
    run = _Run(dit, loop, state, skipping, plan)
    for index in range(len(plan)):
        signal = run.signal(Probe.TARGET, index)
        run.step(index, watched=True)
        assert run.cache.velocity is not None
        yield run.cache.velocity, signal


class _Run:
    """One request on its way."""

    def __init__(
        self, dit: DiT, loop: Loop, state: tuple[Tensor, Tensor], skipping: Skipping, plan: Sequence[StepPlan]
    ) -> None:
        self.dit, self.loop, self.skipping, self.plan = dit, loop, skipping, list(plan)
        self.reuses = any(step.guide is Guide.REUSE for step in plan)
        self.done: list[StepPlan] = []
        self.cache = Cache()
        latents, self.reference = state
        self.latents = latents.to(dit.dtype)
        self.target = latents.shape[1]
        self.times = times_of(loop.schedule, self.latents, loop.variant)
        self.forwards = folded(dit, loop.forwards, self.times) if loop.algebra.fold else list(loop.forwards)
        self.conditional = [first_rows(self.forwards[0], len(latents))]

    def step(self, index: int, *, watched: bool = False) -> None:
        """watched: the guided velocity of a computed step is in the cache after it, wanted or not."""
        planned = self._decided(index)
        self.done.append(planned)
        self._follow(planned)
        now, following = (float(self.loop.schedule[at]) for at in (index, index + 1))
        if planned.mode is Mode.SKIP and self.skipping.policy.residual:
            prediction = self._prediction(index, replace(planned, guide=self.cache.guide))
            self._move(lambda moving: advance(self.loop, moving, prediction, now, following - now))
            return
        if planned.mode is Mode.SKIP:
            assert self.cache.velocity is not None
            velocity = self.cache.velocity * planned.scale
            self.cache.velocity = velocity
            self._move(lambda moving: euler(moving, velocity, following - now, self.loop.variant.dtype_flow))
            return
        prediction = self._prediction(index, planned)
        self._move(lambda moving: advance(self.loop, moving, prediction, now, following - now))
        if watched or self._is_wanted(index):
            self.cache.velocity = self._guided(prediction, now)
        if planned.jump is not None:
            self._jump(index, planned.jump)

    def _decided(self, index: int) -> StepPlan:
        """The step's plan, after a look at the probe if the policy has one."""
        planned, policy = self.plan[index], self.skipping.policy
        if policy.probe is None:
            return planned
        signal = self.signal(policy.probe, index)
        before, self.cache.signal = self.cache.signal, signal
        if before is None or before.shape != signal.shape:
            self.cache.gathered = 0.0
            return planned if before is None or planned.instead is None else replace(planned, mode=planned.instead)
        planned, self.cache.gathered = policy.decide(planned, self.cache.gathered, relative_change(signal, before))
        return planned

    def signal(self, probe: Probe, index: int) -> Tensor:
        """Of a step, before it is done."""
        rows = self.dit.img_in(self._moving().to(self.dit.dtype))
        if probe is Probe.RELEASED:
            both = torch.cat((rows, self.dit.img_in(self.reference.to(self.dit.dtype))), dim=1)
            return F.layer_norm(both, both.shape[-1:], eps=1e-6)
        step = self._step(self.conditional[0], index)
        shift, scale = step.mods.double[0][0].chunk(6, dim=-1)[:2]
        return (1 + scale) * F.layer_norm(rows, rows.shape[-1:], eps=1e-6) + shift

    def _follow(self, planned: StepPlan) -> None:
        """Which tokens move from here on: the edited ones, or all again."""
        selection = self.cache.selection
        region = planned.mode is Mode.REGION or (planned.mode is Mode.SKIP and self.cache.rows is not None)
        if not region:
            self.cache.rows = None
        elif self.cache.rows is None and selection is not None and not selection.fell_back:
            self.cache.rows = selection.active
            if self.cache.velocity is not None:
                self.cache.velocity = taken(self.cache.velocity, selection.active)
            self.cache.residuals = [taken(rows, repeated(selection.active, len(rows))) for rows in self.cache.residuals]

    def _moving(self) -> Tensor:
        """The latents of the tokens that move."""
        return self.latents if self.cache.rows is None else taken(self.latents, self.cache.rows)

    def _move(self, step: Callable[[Tensor], Tensor]) -> None:
        moved = step(self._moving())
        self.latents = moved if self.cache.rows is None else put(self.latents, self.cache.rows, moved)

    def _is_wanted(self, index: int) -> bool:
        """Whether the guided velocity of a step is used again: by skips, or for the tokens that are left behind."""
        skipped = self._skips(index + 1) and not self.skipping.policy.residual
        return skipped or self.plan[index].jump is not None

    def _skips(self, index: int) -> bool:
        return index < len(self.plan) and self.plan[index].mode is Mode.SKIP

    def _guided(self, prediction: Tensor, now: float) -> Tensor:
        """The velocity that a step follows."""
        loop = self.loop
        if loop.guidance is None or len(prediction) == len(self.latents):
            return prediction
        cond, uncond = prediction.chunk(2)
        wide = loop.variant.dtype_flow == "autocast-fp32"
        return guided(cond, uncond, loop.guidance.scale, now > loop.guidance.rescale_above, wide)

    def _jump(self, index: int, to: int) -> None:
        """Tells edited tokens from the others once, and takes the others to the level at which they come back."""
        velocity, schedule = self.cache.velocity, self.loop.schedule
        assert velocity is not None
        following, there = float(schedule[index + 1]), float(schedule[to])
        if self.cache.selection is None:
            estimate = self.latents - following * velocity  # of the step's end, on the same line as its beginning
            self.cache.selection = self.skipping.select(estimate, self.reference)
        kept = self.cache.selection.kept
        if not kept.shape[1] or self.cache.selection.fell_back:
            return
        ahead = euler(taken(self.latents, kept), taken(velocity, kept), there - following, self.loop.variant.dtype_flow)
        self.latents = put(self.latents, kept, ahead)

    def _prediction(self, index: int, planned: StepPlan) -> Tensor:
        """Velocities of the moving tokens: conditional rows, then unconditional ones where the step is guided."""
        forwards = self.forwards if planned.guide is Guide.BOTH else self.conditional
        tokens = self._tokens(planned)
        if planned.mode is not Mode.SKIP:
            self.cache.residuals, self.cache.guide = [], planned.guide
        made = torch.cat([self._velocity(at, branch, tokens, index, planned) for at, branch in enumerate(forwards)])
        if self.loop.guidance is None or planned.guide is Guide.COND:
            return made
        if planned.guide is Guide.BOTH:
            if planned.mode is not Mode.SKIP:
                self._remember(made)
            return made
        assert self.cache.difference is not None
        rows = self.cache.rows
        difference = self.cache.difference if rows is None else taken(self.cache.difference, rows)
        return torch.cat((made, made - difference))

    def _remember(self, prediction: Tensor) -> None:
        """Keeps the difference of guidance, if a step reuses it: of the tokens that move, beside the others' own."""
        if self.reuses:
            cond, uncond = prediction.chunk(2)
            whole, rows = self.cache.difference, self.cache.rows
            self.cache.difference = cond - uncond if rows is None or whole is None else put(whole, rows, cond - uncond)

    def _tokens(self, planned: StepPlan) -> Tensor:
        """The image tokens that the step computes."""
        moving = self._moving().to(self.dit.dtype)
        return torch.cat((moving, self.reference.to(moving.dtype)), dim=1) if planned.mode is Mode.FULL else moving

    def _velocity(self, at: int, branch: Branch, tokens: Tensor, index: int, planned: StepPlan) -> Tensor:
        """Of one forward, at the tokens that move."""
        tokens, step, runner = repeated(tokens, branch.request.rows), self._step(branch, index), branch.runner
        moving = self.target if planned.mode is Mode.FULL else tokens.shape[1]
        if not self.skipping.policy.residual:
            run = runner.at(index / len(self.plan))
            return self._computed(run, runner.rows, at, branch, tokens, step, planned)[:, :moving]
        assert runner.halves is not None
        blocks, some, final = runner.halves
        if planned.mode is Mode.SKIP:
            return final(self.dit.img_in(tokens) + self.cache.residuals[at], step.mods.final)
        rows = self._computed(blocks, some, at, branch, tokens, step, planned)[:, :moving]
        if self._skips(index + 1):
            self.cache.residuals.append(rows - self.dit.img_in(tokens[:, :moving]))
        return final(rows, step.mods.final)

    def _computed(
        self,
        run: Velocity,
        some: RowsVelocity | None,
        at: int,
        branch: Branch,
        tokens: Tensor,
        step: Step,
        planned: StepPlan,
    ) -> Tensor:
        """What comes of a forward's tokens by `run`, or by `some` where keys are kept or rows are left out."""
        pruned = self.target if self.loop.algebra.prune else None
        if planned.mode is Mode.FULL and not planned.fill:
            return run(tokens, step, branch.rope, pruned)
        active, rope = self._view(at, branch, planned, step.text.shape[1])
        assert some is not None
        return some(tokens, step, rope, pruned if planned.mode is Mode.FULL else None, active)

    def _step(self, branch: Branch, index: int) -> Step:
        if branch.steps:
            return branch.steps[index]
        return self.dit.condition(branch.request, self.times[index].expand(branch.request.rows))

    def _view(self, at: int, branch: Branch, planned: StepPlan, texts: int) -> tuple[Active, Rope]:
        """The rows that a step computes of a branch, and their rotary tables."""
        rows = self.cache.rows if planned.mode is Mode.REGION else None
        key = (at, branch.request.rows, planned.mode is Mode.FULL, rows is None)
        if key not in self.cache.views:
            kept = self._kept(at).first(branch.request.rows)
            if planned.mode is Mode.FULL:
                self.cache.views[key] = (Active.all(kept, texts), branch.rope)
            else:
                device = self.latents.device
                image = torch.arange(self.target, device=device)[None] if rows is None else rows
                if len(image) > 1:
                    image = repeated(image, branch.request.rows)
                active = Active.of(kept, image, texts)
                self.cache.views[key] = (active, active.rope(branch.rope))
        return self.cache.views[key]

    def _kept(self, at: int) -> Kept:
        """Keys and values of a forward; those of the conditional rows alone are a part of them."""
        if not self.cache.kept:
            image = self.target + self.reference.shape[1]
            self.cache.kept = [
                Kept(self.dit, rows.shape[0], rows.shape[1] + image, eight_bit=self.skipping.eight_bit)
                for rows in (branch.request.text.rows for branch in self.forwards)
            ]
        return self.cache.kept[at]


def repeated(given: Tensor, count: int) -> Tensor:
    """The rows of a batch, again and again until there are `count`."""
    if len(given) == 1:
        return given.expand(count, *given.shape[1:])
    return given.repeat(count // len(given), *[1] * (given.ndim - 1))


def taken(tokens: Tensor, rows: Tensor) -> Tensor:
    """Tokens (batch, N, channels) at rows (batch, n)."""
    return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[2]))


def put(tokens: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """The tokens with new ones at rows (batch, n), in the wider of both dtypes."""
    wide = tokens.to(torch.promote_types(tokens.dtype, new.dtype))
    return wide.scatter(1, rows[..., None].expand_as(new), new.to(wide.dtype))


def first_rows(branch: Branch, count: int) -> Branch:
    """A branch of the first `count` rows of another's batch."""
    if branch.request.rows == count:
        return branch
    request, (cos, sin) = branch.request, branch.rope
    text = request.text
    parts = {name: cut(getattr(text, name), count) for name in text.__dataclass_fields__}
    prepared = replace(text, **parts)  # type: ignore[arg-type]
    return replace(
        branch,
        request=Request(prepared, cut(request.mapped, count), cut(request.bias, count), request.biased),
        rope=(cos[:count], sin[:count]),
        steps=tuple(
            Step(step.text[:count], first_modulations(step.mods, count), cut(step.bias, count), step.biased)
            for step in branch.steps
        ),
    )


def first_modulations(mods: Modulations, count: int) -> Modulations:
    double = [(image[:count], text[:count]) for image, text in mods.double]
    return Modulations(double, [vectors[:count] for vectors in mods.single], mods.final[:count])


def cut(rows: Tensor | None, count: int) -> Tensor | None:
    return None if rows is None else rows[:count]
