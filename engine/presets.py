"""What --speed stands for: policies, each held to a distance from the dense result (docs/skipping.md)."""

from typing import get_args

from step1x.engine.norms import Gammas, Norms
from step1x.engine.plan import DECAY_THRESHOLD, GAMMAS_V11
from step1x.engine.policy import CfgReuse, Decay, Dense, Policy, RefFreeze, Region, Together, regione
from step1x.profiles import Speed

SPEEDS: tuple[Speed, ...] = get_args(Speed)
TURBO_THRESHOLD = 0.06  # of the velocity decay: three times the release's
# Where a mask says which tokens move, nothing must be told apart, refreshed or smoothed: other pixels are the source's.
MARKED = Region(refreshes=(), post=0)


def presets(norms: Norms | None = None) -> dict[Speed, Policy]:
    """The policies without a mask. norms: of the model's guided velocity; None: RegionE's table for v1.1."""
    return {
        "exact": Dense(),
        "balanced": Together((regione(norms), CfgReuse(last=2))),
        "fast": Together((regione(norms), RefFreeze(first=2, last=1), CfgReuse())),
        "turbo": Together((regione(norms, TURBO_THRESHOLD), RefFreeze(), CfgReuse())),
    }


def masked(norms: Norms | None = None) -> dict[Speed, Policy]:
    """The policies with one; norms as for `presets`."""

    def decay(threshold: float = DECAY_THRESHOLD) -> Decay:
        return Decay(norms=norms or Gammas(GAMMAS_V11), threshold=threshold)

    return {
        "exact": MARKED,
        "balanced": Together((MARKED, decay())),
        "fast": Together((MARKED, decay(), CfgReuse())),
        "turbo": Together((MARKED, decay(TURBO_THRESHOLD), RefFreeze(), CfgReuse())),
    }


PRESETS, MASKED = presets(), masked()
