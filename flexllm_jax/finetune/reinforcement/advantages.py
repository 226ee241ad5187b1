"""What an answer's tokens count for, from the rewards of its group (GRPO, arXiv 2402.03300; Dr.
GRPO, 2503.20783; DAPO, 2503.14476), as TRL computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

_EPS = 1e-4  # TRL's, beside a deviation


def advantages(
    rewards: Sequence[Sequence[float]], scale: Literal["none", "group", "batch"]
) -> list[np.ndarray]:
    """Reward minus the group's mean, by group and answer; divided by the deviation of the group's
    rewards, or of all. Equal rewards have advantages of exactly 0."""
    groups = [np.asarray(own, np.float64) for own in rewards]
    everything = np.concatenate(groups) if groups else np.zeros(0)
    of_all = everything.std(ddof=1) if len(everything) > 1 else 0.0
    found = []
    for own in groups:
        gain = np.zeros_like(own) if np.ptp(own) == 0 else own - own.mean()
        if scale == "group":
            gain = gain / (own.std(ddof=1) + _EPS)
        elif scale == "batch":
            gain = gain / (of_all + _EPS)
        found.append(gain)
    return found


def divisor(
    normalization: Literal["dapo", "grpo", "dr_grpo"], lengths: Sequence[int], max_tokens: int
) -> float:
    """What the sum over all answers' tokens is divided by, once each is times `token_weight`."""
    if normalization == "dapo":
        return float(max(1, sum(lengths)))
    return float(max(1, len(lengths)) * (max_tokens if normalization == "dr_grpo" else 1))


def token_weight(normalization: Literal["dapo", "grpo", "dr_grpo"], length: int) -> float:
    """Factor of the tokens of an answer of `length` trained tokens."""
    return 1 / max(1, length) if normalization == "grpo" else 1.0
