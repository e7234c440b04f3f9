"""What --speed stands for: policies, each held to a distance from the dense result (docs/skipping.md)."""

from typing import Literal, get_args

from step1x.engine.policy import Dense, Policy, Region

Speed = Literal["exact", "balanced", "fast", "turbo"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)


def policy_of(speed: Speed) -> Policy:
    return Dense()


def masked(speed: Speed) -> Policy:
    """The same, of the tokens that a mask marks."""
    return Region(refreshes=(), post=0)
