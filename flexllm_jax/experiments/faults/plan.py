"""Which faults a round has, and when: a seed and the round's number decide it, and nothing else.

Kinds are dealt from a shuffled deck, so that each comes up as often as the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_PROCESS = ("start-up", "upload", "validation", "training", "checkpoint", "publish")
# When each kind may come. A job can be paused or cancelled once there is one; a server that cannot
# write, or has no database, refuses to start.
MOMENTS: dict[str, tuple[str, ...]] = {
    "kill http": _PROCESS,
    "kill engine": _PROCESS,
    "stop http": _PROCESS,
    "stop engine": _PROCESS,
    "sigterm": _PROCESS,
    "pause": _PROCESS[2:],
    "cancel": _PROCESS[2:],
    "full disk": _PROCESS[1:],
    "locked database": _PROCESS[1:],
}
KINDS = tuple(MOMENTS)
ORDER = _PROCESS  # in which the moments of a round come


@dataclass(frozen=True)
class Fault:
    """A fault: `after_s` from its moment on, for `lasts_s` where it is something that ends."""

    kind: str
    moment: str
    after_s: float
    lasts_s: float

    def __str__(self) -> str:
        return f"{self.kind} at {self.moment}"


def plan_round(seed: int, number: int, faults: int) -> list[Fault]:
    """The faults of round `number`, in the order in which they come."""
    planned = []
    for place in range(number * faults, (number + 1) * faults):
        deck, card = divmod(place, len(KINDS))
        kind = KINDS[np.random.default_rng([seed, 0, deck]).permutation(len(KINDS))[card]]
        random = np.random.default_rng([seed, 1, place])
        moment = MOMENTS[kind][random.integers(len(MOMENTS[kind]))]
        after_s, lasts_s = random.uniform(0, 0.4), random.uniform(0.5, 4.5)
        planned.append(Fault(kind, moment, float(after_s), float(lasts_s)))
    return sorted(planned, key=lambda fault: ORDER.index(fault.moment))
