"""Jobs that learn from pairs of answers which one is preferred: DPO, IPO, SimPO (see `losses`).

With s the sum of an answer's log-probabilities (SimPO: their mean) and s_ref the same under the
weights that the job starts from (SimPO: 0), an answer's reward is beta (s - s_ref), as in TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flexllm_jax.config import PreferenceConfig
from flexllm_jax.finetune.data import TrainingPair
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch


class Preference:
    """A preference loss, a mean over the pairs of a batch (`dataset.Method`)."""

    def __init__(self, config: PreferenceConfig):
        self.loss = Loss.of(config.type, **config.model_dump(exclude={"type"}))
        self.needs_reference = config.type != "simpo"

    def data(self, row: TrainingPair, reference: Sequence[float]) -> list[Datum]:
        """The preferred and the rejected sequence."""
        answers = ((row.preferred, 1.0), (row.rejected, -1.0))
        return [
            Datum.following(answer.tokens, answer.weights, advantage, known)
            for (answer, advantage), known in zip(answers, reference or (0.0, 0.0), strict=True)
        ]

    def divisor(self, rows: Sequence[Any]) -> float:
        """The number of pairs."""
        return float(len(rows))

    def measure(self, packed: PackedMicrobatch, logprob: np.ndarray) -> np.ndarray:
        """Rewards of its answers, [pairs, 2]."""
        gains = []
        for datum, own in zip(packed.data, packed.split(logprob), strict=True):
            gain = (datum.weight * (own - datum.reference)).sum(dtype=np.float64)
            gains.append(gain if self.needs_reference else gain / (datum.weight.sum() or 1))
        return self.loss.settings.beta * np.array(gains).reshape(-1, 2)

    def metrics(self, measured: list[np.ndarray]) -> dict[str, float]:
        """Share of pairs whose preferred answer has more reward, mean difference, mean rewards."""
        preferred, rejected = np.concatenate(measured).T
        return {
            "accuracy": float(np.mean(preferred > rejected)),
            "margin": float(np.mean(preferred - rejected)),
            "reward_preferred": float(np.mean(preferred)),
            "reward_rejected": float(np.mean(rejected)),
        }
