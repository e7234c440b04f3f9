"""What --speed stands for: policies, each held to a distance from the dense result (docs/skipping.md)."""

from typing import Literal, get_args

from step1x.engine.policy import CfgReuse, Decay, Dense, Policy, RefFreeze, Region, Together, regione

Speed = Literal["exact", "balanced", "fast", "turbo"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)
TURBO_THRESHOLD = 0.06  # of the velocity decay: three times the release's

PRESETS: dict[Speed, Policy] = {
    "exact": Dense(),
    "balanced": Together((regione(), CfgReuse(last=2))),
    "fast": Together((regione(), RefFreeze(first=2, last=1), CfgReuse())),
    "turbo": Together((regione(threshold=TURBO_THRESHOLD), RefFreeze(), CfgReuse())),
}
# Where a mask says which tokens move, nothing must be told apart, refreshed or smoothed: other pixels are the source's.
MARKED = Region(refreshes=(), post=0)
MASKED: dict[Speed, Policy] = {
    "exact": MARKED,
    "balanced": Together((MARKED, Decay())),
    "fast": Together((MARKED, Decay(), CfgReuse())),
    "turbo": Together((MARKED, Decay(threshold=TURBO_THRESHOLD), RefFreeze(), CfgReuse())),
}
