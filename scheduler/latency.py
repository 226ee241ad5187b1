"""Predicts how long a step takes on the device.

    seconds = base[token_bucket] + sum of coefficient x feature        (all >= 0)

fitted from a profile taken at start-up, then corrected online by a running ratio of measured to
predicted time. Coefficients are nonnegative so that more work never predicts less time, which the
scheduler's searches rely on. The spread of recent errors gives the scheduler's safety margin.
FlexLLM's f(c, s), section 6 of the paper, has the same role.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COEFFICIENTS = (
    "decode_tokens",
    "kv_tokens",
    "attention_pairs",
    "layer_units",
    "loss_units",
    "adapter_slots",
)


@dataclass(frozen=True)
class StepFeatures:
    """What a step's duration depends on.

    token_bucket     token slots of the forward program, 0 when none runs
    decode_tokens, prefill_tokens, finetune_tokens   slots in use, by kind
    kv_tokens        KV entries the decode tokens read
    attention_pairs  sum of query length x key length over prefill and finetuning chunks
    layer_units, loss_units   backward units after the forward, by kind
    adapters         whether any token of the forward carries an adapter
    """

    token_bucket: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    finetune_tokens: int = 0
    kv_tokens: int = 0
    attention_pairs: int = 0
    layer_units: int = 0
    loss_units: int = 0
    adapters: bool = False

    @property
    def has_units(self) -> bool:
        """Whether the step runs backward units."""
        return self.layer_units + self.loss_units > 0


class LatencyModel:
    """Seconds of a step from its features; see the module's text for the formula.

    `bases` maps profiled token buckets to seconds, not decreasing; a bucket between two profiled
    ones is interpolated, one above the largest extrapolated in proportion. `coefficients` gives
    seconds per unit of each of `COEFFICIENTS`, 0 where absent.
    """

    def __init__(
        self, bases: Mapping[int, float], coefficients: Mapping[str, float] | None = None
    ) -> None:
        coefficients = dict(coefficients or {})
        if unknown := sorted(set(coefficients) - set(COEFFICIENTS)):
            raise ValueError(f"unknown latency coefficients {unknown}, known: {COEFFICIENTS}")
        self.bases = {int(bucket): float(bases[bucket]) for bucket in sorted(bases)}
        self.coefficients = {name: float(coefficients.get(name, 0.0)) for name in COEFFICIENTS}
        seconds = list(self.bases.values())
        if any(not value >= 0 for value in (*seconds, *self.coefficients.values())):
            raise ValueError("latency bases and coefficients must be nonnegative seconds")
        if sorted(seconds) != seconds:
            raise ValueError(f"latency bases must not decrease with the bucket: {self.bases}")
        self.corrections = {False: 1.0, True: 1.0}  # by StepFeatures.has_units
        self.mean_error = 0.05  # running mean of |measured / predicted - 1|
        self.observations = 0
        self._base_s: dict[int, float] = {}  # of every bucket asked for so far

    @classmethod
    def fit(cls, samples: Iterable[tuple[StepFeatures, float]]) -> LatencyModel:
        """The model with the least squared relative error on (features, seconds) samples.

        ValueError without samples or with a time that is not positive.
        """
        samples = list(samples)
        seconds = np.array([seconds for _, seconds in samples], dtype=np.float64)
        if not samples or not (seconds > 0).all():
            raise ValueError("latency profile: need at least one sample, all of positive seconds")
        buckets = sorted({features.token_bucket for features, _ in samples})
        # A base is a sum of increments over the smaller buckets, so bases cannot decrease.
        matrix = np.array(
            [
                [float(features.token_bucket >= bucket) for bucket in buckets]
                + [_value(features, name) for name in COEFFICIENTS]
                for features, _ in samples
            ]
        )
        solution = _nonnegative_least_squares(matrix / seconds[:, None], np.ones(len(samples)))
        bases = np.cumsum(solution[: len(buckets)])
        return cls(
            dict(zip(buckets, bases.tolist(), strict=True)),
            dict(zip(COEFFICIENTS, solution[len(buckets) :].tolist(), strict=True)),
        )

    @property
    def margin(self) -> float:
        """Share of a time budget to plan for so that few steps exceed it, in [0.5, 1].

        Errors of a corrected prediction lie about evenly around 0; few are over three times their
        mean size.
        """
        return max(0.5, 1 / (1 + 3 * self.mean_error))

    def predict(self, features: StepFeatures) -> float:
        """Expected seconds of a step, corrected by what was observed."""
        return self._uncorrected(features) * self.corrections[features.has_units]

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from a measured step. One outlier moves the correction by 5 % at most."""
        uncorrected = self._uncorrected(features)
        if uncorrected <= 0 or not 0 < seconds < float("inf"):
            return
        correction = self.corrections[features.has_units]
        ratio = min(max(seconds / uncorrected, correction / 2), correction * 2)
        error = min(abs(seconds / (uncorrected * correction) - 1), 1.0)
        self.observations += 1
        weight = 0.05  # an average over about the last 20 steps
        self.corrections[features.has_units] += weight * (ratio - correction)
        self.mean_error += weight * (error - self.mean_error)

    def save(self, path: Path | str) -> None:
        """Write the fitted model (not the online correction) as JSON."""
        content = {"bases": self.bases, "coefficients": self.coefficients}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> LatencyModel:
        """Read what `save` wrote; ValueError naming the file if it is not that."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            bases = {int(bucket): float(s) for bucket, s in content["bases"].items()}
            return cls(bases, content["coefficients"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a latency profile ({error}): delete it") from error

    def _uncorrected(self, features: StepFeatures) -> float:
        bucket, by = features.token_bucket, self.coefficients
        base = self._base_s.get(bucket)
        if base is None:
            base = self._base_s[bucket] = self._interpolate(bucket)
        return (
            base
            + by["decode_tokens"] * features.decode_tokens
            + by["kv_tokens"] * features.kv_tokens
            + by["attention_pairs"] * features.attention_pairs
            + by["layer_units"] * features.layer_units
            + by["loss_units"] * features.loss_units
            + by["adapter_slots"] * bucket * features.adapters
        )

    def _interpolate(self, bucket: int) -> float:
        if not self.bases or (bucket == 0 and 0 not in self.bases):
            return 0.0
        largest = max(self.bases)
        if bucket > largest > 0:
            return self.bases[largest] * bucket / largest
        return float(np.interp(bucket, list(self.bases), list(self.bases.values())))


def _value(features: StepFeatures, name: str) -> float:
    if name == "adapter_slots":
        return float(features.token_bucket * features.adapters)
    return float(getattr(features, name))


def _nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin over x >= 0 of |matrix x - target|, by Lawson and Hanson's active sets (1974)."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    matrix = matrix / scale
    x = np.zeros(matrix.shape[1])
    passive = np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(10 * len(x)):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[passive] = -np.inf
        if gradient.max() <= 1e-10:
            break
        passive[gradient.argmax()] = True
        while passive.any():
            solution = np.zeros_like(x)
            solution[passive] = np.linalg.lstsq(matrix[:, passive], target, rcond=None)[0]
            blocked = passive & (solution <= 0)
            if not blocked.any():
                x = solution
                break
            # Go as far towards the solution as stays nonnegative; what reaches 0 is fixed there.
            steps = x[blocked] / (x[blocked] - solution[blocked] + 1e-300)
            x = x + steps.min() * (solution - x)
            passive &= x > 1e-12
            x[~passive] = 0.0
    return x / scale
