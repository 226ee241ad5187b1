"""Predicts how long a step takes on the device.

    seconds = correction[bucket] x (base[bucket] + sum of coefficient x feature of the forward)
            + unit correction    x (sum of coefficient x feature of the backward units)

Bases and coefficients (all >= 0) are fitted from a profile taken at start-up, or come from a
roofline of the device (`roofline.py`); the corrections follow what is measured. Nothing is
negative, so more work in a bucket never predicts less time. The errors of recent predictions give
the scheduler's safety margin. FlexLLM's f(c, s), section 6 of the paper, has the same role.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from enum import IntEnum
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scheduler.latency.least_squares import nonnegative_least_squares


class Sampling(IntEnum):
    """What is done to sample a step's tokens; each kind does what those before it do, too."""

    GREEDY = 0  # the largest logit
    ADJUSTED = 1  # penalties, and tokens that are not allowed
    DRAWN = 2  # random draws
    FILTERED = 3  # from the most likely tokens: top-k, top-p, min-p


_FORWARD = (
    "decode_tokens",
    "prefill_tokens",
    "finetune_tokens",
    "decode_kv",
    "chunk_kv",
    "attention_pairs",
    "adapter_slots",
    "dropout_slots",
)
# Of each row that is sampled: of a kind, beside what the kind before costs; of log-probabilities.
_SAMPLED = ("adjusted_rows", "drawn_rows", "filtered_rows", "logprob_rows")
_UNITS = ("layer_units", "loss_units", "backward_pairs", "dropout_units")
COEFFICIENTS = _FORWARD + _SAMPLED + _UNITS
_RECENT = 1000  # observations that the reported errors are of
_RETURN = 0.01  # how fast a bucket's correction returns to the mean while others are observed
_QUANTILE = 0.85  # of the steps shall stay within a budget; slack makes up for the others


class StepFeatures(NamedTuple):
    """What a step's duration depends on.

    token_bucket     token slots of the forward program, 0 when none runs
    decode_tokens, prefill_tokens, finetune_tokens   slots in use, by kind
    decode_kv        KV entries that decode tokens read
    chunk_kv         KV entries that prefill and finetuning chunks read
    attention_pairs  sum of query length x key length over prefill and finetuning chunks
    layer_units, loss_units   backward units after the forward, by kind
    backward_pairs   sum of slice length x key length over the layer units; of all of these, where
                     layers have windows, what `windows.KeyReads` counts
    adapters         whether any token of the forward carries an adapter
    sampling, logprobs   the most that any sampled token needs
    most_rows        rows that the largest step samples; every step has as many, or one for each
                     token slot, and the sampling is done for all of them
    dropout          whether the forward's finetuning tokens are of a job with dropout
    dropout_units    those of the layer units that are
    """

    token_bucket: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    finetune_tokens: int = 0
    decode_kv: float = 0
    chunk_kv: float = 0
    attention_pairs: float = 0
    layer_units: int = 0
    loss_units: int = 0
    backward_pairs: float = 0
    adapters: bool = False
    sampling: int = Sampling.GREEDY
    logprobs: bool = False
    most_rows: int = 0
    dropout: bool = False
    dropout_units: int = 0

    def with_prefill(self, bucket: int, tokens: int) -> StepFeatures:
        """As if a step of that bucket had so many prefill tokens; `_replace` takes longer."""
        return StepFeatures(bucket, self.decode_tokens, tokens, *self[3:])

    @property
    def has_units(self) -> bool:
        """Whether the step runs backward units."""
        return self.layer_units + self.loss_units > 0


class LatencyModel:
    """Seconds of a step from its features; see the module's text for the formula.

    bases           token bucket -> seconds, not decreasing; a bucket between two of them is
                    interpolated, one above the largest extrapolated in proportion
    coefficients    seconds per unit of each of `COEFFICIENTS`, 0 where absent (`adapter_slots` are
                    the token slots of a step that carries adapters, `dropout_slots` of one with
                    dropout; `_SAMPLED` see there)
    spread          the error to reckon with until there are observations: 85 % of steps take at
                    most 1 + `spread` times what is predicted
    online          False: errors are tracked, and nothing is corrected
    """

    def __init__(
        self,
        bases: Mapping[int, float],
        coefficients: Mapping[str, float] | None = None,
        *,
        spread: float = 0.1,
        online: bool = True,
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
        self.spread, self.online = spread, online
        self.unit_correction = 1.0
        *by_token, self._by_slot, self._by_dropout = (self.coefficients[n] for n in _FORWARD)
        self._by_token = tuple(by_token)
        *by_kind, self._by_logprob_row = (self.coefficients[name] for name in _SAMPLED)
        self._by_sampled_row = tuple(accumulate(by_kind, initial=0.0))  # of each kind
        self._by_units = tuple(self.coefficients[name] for name in _UNITS)
        self._base_s: dict[int, float] = {}  # of every bucket asked for so far
        self._corrections: dict[int, float] = {}  # of every bucket observed so far
        self._mean_correction = 1.0  # for the others
        self._observed: dict[int | None, int] = {}  # observations of a bucket, or (None) of units
        self._error_size = spread / 2  # running mean
        self._first_weight = 1.0 if spread >= 0.3 else 0.25  # of observations
        self.observations = 0
        # (features, seconds, error) of the newest observations
        self.recent: deque[tuple[StepFeatures, float, float]] = deque(maxlen=_RECENT)

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
        solution = nonnegative_least_squares(matrix / seconds[:, None], np.ones(len(samples)))
        bases = np.cumsum(solution[: len(buckets)])
        return cls(
            dict(zip(buckets, bases.tolist(), strict=True)),
            dict(zip(COEFFICIENTS, solution[len(buckets) :].tolist(), strict=True)),
        )

    def copy(self, *, scale: float = 1.0, online: bool = True) -> LatencyModel:
        """The same model, its seconds multiplied by `scale`, without its corrections."""
        bases = {bucket: scale * seconds for bucket, seconds in self.bases.items()}
        coefficients = {name: scale * seconds for name, seconds in self.coefficients.items()}
        return LatencyModel(bases, coefficients, spread=self.spread, online=online)

    # ---- predicting ----

    def predict(self, features: StepFeatures) -> float:
        """Expected seconds of a step."""
        return self.forward_s(features) + self.unit_s(features)

    def forward_s(self, features: StepFeatures) -> float:
        """Expected seconds of a step's forward program."""
        bucket, decode, prefill, finetune, decode_kv, chunk_kv, pairs = features[:7]
        base = self._base_s.get(bucket)
        if base is None:
            base = self._base_s[bucket] = self._interpolate(bucket)
        by_decode, by_prefill, by_finetune, by_decode_kv, by_chunk_kv, by_pair = self._by_token
        seconds = (
            base
            + by_decode * decode
            + by_prefill * prefill
            + by_finetune * finetune
            + by_decode_kv * decode_kv
            + by_chunk_kv * chunk_kv
            + by_pair * pairs
        )
        if features.adapters:
            seconds += (self._by_slot + self._by_dropout * features.dropout) * bucket
        if features.sampling or features.logprobs:
            by_row = self._by_sampled_row[features.sampling]
            if features.logprobs:
                by_row += self._by_logprob_row
            seconds += by_row * min(bucket, features.most_rows)
        return seconds * self._corrections.get(bucket, self._mean_correction)

    def unit_s(self, features: StepFeatures) -> float:
        """Expected seconds of a step's backward units."""
        by_layer, by_loss, by_pair, by_dropout = self._by_units
        return self.unit_correction * (
            by_layer * features[7]
            + by_loss * features[8]
            + by_pair * features[9]
            + by_dropout * features.dropout_units
        )

    def _interpolate(self, bucket: int) -> float:
        if not self.bases or (bucket == 0 and 0 not in self.bases):
            return 0.0
        largest = max(self.bases)
        if bucket > largest > 0:
            return self.bases[largest] * bucket / largest
        return float(np.interp(bucket, list(self.bases), list(self.bases.values())))

    # ---- learning ----

    @property
    def margin(self) -> float:
        """Share of a time budget to plan for so that 85 % of the steps stay within it, in
        [0.4, 1]."""
        return max(0.4, 1 / (1 + self.spread))

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from a measured step.

        Without units it corrects the forward of its bucket; with units the rest of the time, after
        the forward's, corrects them, the more so the more of the step they are (and both alike,
        while the bucket was never seen without). A first observation counts fully if the model is
        a guess, a quarter if it was fitted; later ones ever less, down to 5 %; none more than a
        factor of 2. Buckets not seen for long return to the mean correction of the others: one that
        an outlier made look slow would otherwise never be tried again.
        """
        forward_s, unit_s = self.forward_s(features), self.unit_s(features)
        if forward_s + unit_s <= 0 or not 0 < seconds < float("inf"):
            return
        error = seconds / (forward_s + unit_s) - 1
        self.observations += 1
        self.recent.append((features, seconds, error))
        # The quantile of a stream: up when exceeded, down when not, in proportion to the odds.
        self._error_size += 0.05 * (min(abs(error), 1.0) - self._error_size)
        odds = _QUANTILE if error > self.spread else _QUANTILE - 1
        self.spread = max(0.0, self.spread + 0.3 * self._error_size * odds)
        if not self.online:
            return
        bucket, whole = features.token_bucket, seconds / (forward_s + unit_s)
        if unit_s > 0:
            known = not bucket or bucket in self._observed
            ratio = max(seconds - forward_s, 0.0) / unit_s if known else whole
            weight = self._weight(None) * unit_s / (forward_s + unit_s)
            self.unit_correction *= 1 + weight * (min(max(ratio, 0.5), 2.0) - 1)
            if known:
                return
            weight = self._weight(-bucket)
        else:
            weight = self._weight(bucket)
        correction = self._corrections.get(bucket, self._mean_correction)
        ratio = min(max(whole, 0.5), 2.0)
        corrections, mean = self._corrections, self._mean_correction
        for other in corrections:
            corrections[other] += _RETURN * (mean - corrections[other])
        corrections[bucket] = correction * (1 + weight * (ratio - 1))
        self._mean_correction = sum(corrections.values()) / len(corrections)

    def _weight(self, key: int | None) -> float:
        """Of an observation of a bucket alone, of one (-bucket) with units, or (None) of units."""
        count = self._observed[key] = self._observed.get(key, 0) + 1
        return max(0.05, self._first_weight / count)

    def keep(self, observations: int) -> None:
        """Keep so many of the newest in `recent`."""
        self.recent = deque(self.recent, maxlen=observations)

    def errors(self) -> dict[str, float | int | None]:
        """How far off the last 1,000 predictions were, before they were learnt from: measured /
        predicted - 1, as median and 95 % quantile of its size and as its mean."""
        newest = list(self.recent)[-_RECENT:]
        errors = np.array([error for _, _, error in newest])
        if not errors.size:
            return {"observations": 0, "p50": None, "p95": None, "signed": None}
        p50, p95 = np.percentile(np.abs(errors), [50, 95])
        return {
            "observations": self.observations,
            "p50": float(p50),
            "p95": float(p95),
            "signed": float(errors.mean()),
        }

    # ---- files ----

    def save(self, path: Path | str, key: Mapping[str, str] | None = None) -> None:
        """Write the fitted model (not the online correction) as JSON; `key` says what it is of."""
        content = {"key": key or {}, "bases": self.bases, "coefficients": self.coefficients}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str, key: Mapping[str, str] | None = None) -> LatencyModel | None:
        """Read what `save` wrote; None if it is of something else than `key`.

        ValueError naming the file if it is not a latency profile.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            bases = {int(bucket): float(s) for bucket, s in content["bases"].items()}
            if key is not None and content["key"] != dict(key):
                return None
            return cls(bases, content["coefficients"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a latency profile ({error}): delete it") from error


def _value(features: StepFeatures, name: str) -> float:
    if name == "adapter_slots":
        return float(features.token_bucket * features.adapters)
    if name == "dropout_slots":
        return float(features.token_bucket * features.dropout)
    if name in _SAMPLED:
        counts = *(features.sampling >= kind for kind in list(Sampling)[1:]), features.logprobs
        rows = min(features.token_bucket, features.most_rows)
        return float(rows * counts[_SAMPLED.index(name)])
    return float(getattr(features, name))
