"""Latency objectives: the deadline of every token, the slack left, and how well they were met.

Token n (counted from 0) of a request is due at `first_token_time + n * tpot_s`; the first at
`arrival + ttft_s`. Time won on earlier tokens is therefore slack that finetuning may spend now,
while the request's TPOT, which is a mean over its tokens, still meets the objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.request import Sequence, Slo


def next_token_deadline(sequence: Sequence, first_token_at: float) -> float:
    """When the token after all dispatched ones is due, in seconds on the clock of `arrival`.

    `first_token_at` stands in for the time of a first token that is still in flight.
    """
    sampled = len(sequence.output) + sequence.in_flight
    if not sampled:
        return sequence.request.arrival + sequence.slo.ttft_s
    if sequence.first_token_at is not None:
        first_token_at = sequence.first_token_at
    return first_token_at + sampled * sequence.slo.tpot_s


def slack(sequences: Iterable[Sequence], start: float) -> float:
    """Seconds a step that starts at `start` may take before a next token is late; inf if none."""
    return min([next_token_deadline(s, start) for s in sequences], default=math.inf) - start


def step_budget(sequences: Iterable[Sequence], start: float, margin: float) -> float:
    """Seconds a step that starts at `start` may take: the smallest slack, at most one TPOT.

    `start` is when the device will have finished the steps in flight; `margin` in (0, 1] covers
    prediction errors. The cap of one TPOT keeps a request that arrives meanwhile from waiting
    longer; it needs no margin, as larger slack covers the error. Inf without sequences; 0 when a
    token is already late.
    """
    sequences = list(sequences)
    tpot_s = min([sequence.slo.tpot_s for sequence in sequences], default=math.inf)
    return max(0.0, min(slack(sequences, start) * margin, tpot_s))


@dataclass(frozen=True)
class RequestTiming:
    """When a request arrived and got its first and last token, in seconds on one clock.

    A failed request may have no tokens.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    first_token_at: float | None
    last_token_at: float | None
    failed: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Queueing + time to first token, or None without a token."""
        return None if self.first_token_at is None else self.first_token_at - self.arrival

    @property
    def tpot_s(self) -> float | None:
        """(last - first token time) / (output tokens - 1), or None below two tokens."""
        if self.first_token_at is None or self.last_token_at is None or self.output_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.output_tokens - 1)

    def meets(self, slo: Slo) -> bool:
        """Whether the request completed within both objectives; one token has no TPOT to miss."""
        if self.failed or self.ttft_s is None:
            return False
        return self.ttft_s <= slo.ttft_s and (self.tpot_s is None or self.tpot_s <= slo.tpot_s)


def summarize(timings: Iterable[RequestTiming], slo: Slo) -> dict[str, Any]:
    """The `inference` section of report.json.

    Latencies are over completed requests, in milliseconds; attainment is over all of them, failed
    ones counting as missed. Throughput is over the time from the first arrival to the last token.
    What has no data (no request, no second token) is None.
    """
    timings = list(timings)
    completed = [timing for timing in timings if not timing.failed]
    ends = [t.last_token_at for t in timings if t.last_token_at is not None]
    wall_s = max(ends) - min(t.arrival for t in timings) if ends else 0.0
    output_tokens = sum(timing.output_tokens for timing in timings)
    return {
        "requests": len(timings),
        "completed": len(completed),
        "failed": len(timings) - len(completed),
        "prompt_tokens": sum(timing.prompt_tokens for timing in timings),
        "output_tokens": output_tokens,
        "output_tokens_per_s": output_tokens / wall_s if wall_s > 0 else None,
        "ttft_ms": _distribution_ms(timing.ttft_s for timing in completed),
        "tpot_ms": _distribution_ms(timing.tpot_s for timing in completed),
        "slo_attainment": (
            sum(timing.meets(slo) for timing in timings) / len(timings) if timings else None
        ),
    }


def _distribution_ms(seconds: Iterable[float | None]) -> dict[str, float | None]:
    values = np.array([s for s in seconds if s is not None]) * 1e3
    if not values.size:
        return {"mean": None, "p50": None, "p99": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"mean": float(values.mean()), "p50": float(p50), "p99": float(p99)}
