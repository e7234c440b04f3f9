"""FLOPs of a plan in closed form (step-skipping.md §6.5), 2 per multiply-add.

Counted are the blocks and the image tokens' way in and out: what depends on the mode of a step. What is made of text
and timestep alone (connector, modulations) is not, nor are norms, activations and softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from step1x.engine.dit import DiTConfig
from step1x.engine.plan import Guide, Mode, StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of one branch of one picture. active: target tokens of region steps."""

    text: int
    target: int
    reference: int
    active: int

    def evaluated(self, mode: Mode) -> tuple[int, int]:
        """Target and reference rows that a step of a mode evaluates."""
        if mode is Mode.SKIP:
            return 0, 0
        return self.active if mode is Mode.REGION else self.target, self.reference if mode is Mode.FULL else 0

    def share(self, mode: Mode) -> float:
        """The step's work over a full one's: c(r), the share of rows evaluated. Attention counts keys of all rows."""
        queries = 0 if mode is Mode.SKIP else self.text + sum(self.evaluated(mode))
        return queries / (self.text + self.target + self.reference)


def forward(config: DiTConfig, rows: Rows, mode: Mode, prune: bool = True) -> int:
    """FLOPs of one branch in one step, one picture. prune: the last block leaves out what only others would use."""
    if mode is Mode.SKIP:
        return 0
    target, reference = rows.evaluated(mode)
    width, hidden = config.hidden_size, config.mlp_hidden
    queries, keys = rows.text + target + reference, rows.text + rows.target + rows.reference
    kept = target if prune and config.depth_single else queries
    whole = config.depth + config.depth_single - 1
    ends = 2 * (target + reference) * width * config.in_channels
    ends += 2 * (target if prune else target + reference) * width * config.out_channels
    keys_and_values = 4 * queries * width * width
    each = 4 * width * (width + hidden) + 4 * width * keys  # a row's query, projection, MLP and attention
    return whole * (keys_and_values + queries * each) + keys_and_values + kept * each + ends


def flops(
    plan: Sequence[StepPlan], config: DiTConfig, rows: Rows, *, guided: bool = True, prune: bool = True, batch: int = 1
) -> int:
    """FLOPs of all steps. guided: BOTH steps have two branches."""
    total = 0
    for step in plan:
        branches = 2 if guided and step.guide is Guide.BOTH else 1
        total += branches * forward(config, rows, step.mode, prune)
    return batch * total


def speedup(
    plan: Sequence[StepPlan], config: DiTConfig, rows: Rows, *, guided: bool = True, prune: bool = True
) -> float:
    """How much less a plan computes than as many full steps."""
    dense = flops([StepPlan(Mode.FULL)] * len(plan), config, rows, guided=guided, prune=prune)
    return dense / flops(plan, config, rows, guided=guided, prune=prune)
