"""What is reported of a batch of answers, and of an optimizer step on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.finetune.reinforcement.episodes import Group


@dataclass(frozen=True)
class AnswerMeasures:
    """Of a batch's answers, those of dropped groups too."""

    values: dict[str, float]

    @classmethod
    def of(cls, groups: Sequence[Group], dropped: int, began: float) -> AnswerMeasures:
        """`began`: when the first answer did (time.monotonic)."""
        episodes = [episode for group in groups for episode in group.episodes]
        count = max(1, len(episodes))
        rewards = np.array([episode.reward or 0.0 for episode in episodes] or [0.0])
        lengths = [episode.length for episode in episodes]
        values = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "length": sum(lengths) / count,
            "cut": sum(episode.cut for episode in episodes) / count,
            "grader_errors": sum(episode.error is not None for episode in episodes) / count,
            "equal_groups": sum(group.equal for group in groups) / max(1, len(groups)),
            "dropped_groups": float(dropped),
            "rollout_tokens_per_s": sum(lengths) / max(1e-9, time.monotonic() - began),
        }
        drifts = [
            np.array(e.logprob)[e.said] - np.array(e.reference)[e.said]
            for e in episodes
            if e.reference is not None
        ]
        if drifts:
            drift = np.concatenate(drifts)
            values["kl"] = float((np.exp(-drift) + drift - 1).mean())  # never below 0, as TRL's
        return cls(values)

    def of_validation(self) -> dict[str, float]:
        """What a validation tells."""
        told = ("reward", "reward_std", "length", "cut", "grader_errors")
        return {name: self.values[name] for name in told}


@dataclass
class UpdateMeasures:
    """Of an optimizer step, from the log-probabilities of its microbatches.

    `kl_sampler`: mean of log-probability when sampled minus now, the divergence of the weights that
    answered from those that are trained. `clipped`: share of tokens whose ratio is out of bounds.
    """

    answers: AnswerMeasures
    loss: Loss
    divisor: float
    began: float = field(default_factory=time.monotonic)
    _loss_sum: float = 0.0
    _drift: float = 0.0
    _clipped: int = 0
    _labels: int = 0
    _tokens: int = 0

    def add(self, packed: PackedMicrobatch, logprob: np.ndarray) -> None:
        """Account for a microbatch's results."""
        losses, coefficient = packed.evaluate(logprob)
        said = packed.label >= 0
        drift = (packed.reference - logprob)[said]
        self._loss_sum += float(losses[said].sum(dtype=np.float64))
        self._drift += float(drift.sum(dtype=np.float64))
        self._labels += int(said.sum())
        self._tokens += packed.tokens
        if self.loss.name in ("ppo", "gspo"):
            clipped = (coefficient == 0) & (packed.advantage != 0) & said
            self._clipped += int(clipped.sum())
        else:
            ratio, bounds = np.exp(-drift), self.loss.settings
            self._clipped += int(((ratio < bounds.low) | (ratio > bounds.high)).sum())

    def metrics(self) -> dict[str, float]:
        """Once all are in."""
        labels = max(1, self._labels)
        return {
            "loss": self._loss_sum / self.divisor,
            **self.answers.values,
            "kl_sampler": self._drift / labels,
            "clipped": self._clipped / labels,
            "train_tokens_per_s": self._tokens / max(1e-9, time.monotonic() - self.began),
        }
