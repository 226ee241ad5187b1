"""How well the latency objectives were met: TTFT, TPOT, attainment, by class of service."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scheduler.request import Slo


@dataclass(frozen=True)
class RequestTiming:
    """When a request arrived and got its first and last token, in seconds on one clock.

    A failed request may have no tokens. `slo` is its class; None: the default one.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    first_token_at: float | None
    last_token_at: float | None
    failed: bool = False
    slo: Slo | None = None

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
    """The `inference` section of report.json; `slo` is of the requests that bring none.

    Latencies are over completed requests, in milliseconds; attainment is over all of them, failed
    ones counting as missed; goodput is attainment with each request counted by the weight of its
    class. Throughput is over the time from the first arrival to the last token. What has no data
    (no request, no second token) is None. Several classes are also reported one by one.
    """
    timings = list(timings)
    section = _summary(timings, slo)
    ends = [t.last_token_at for t in timings if t.last_token_at is not None]
    wall_s = max(ends) - min(t.arrival for t in timings) if ends else 0.0
    tokens = section["output_tokens"]
    section["output_tokens_per_s"] = tokens / wall_s if wall_s > 0 else None
    classes = {(timing.slo or slo).name: timing.slo or slo for timing in timings}
    weights = np.array([(timing.slo or slo).weight for timing in timings])
    met = np.array([timing.meets(timing.slo or slo) for timing in timings])
    section["goodput"] = float((weights * met).sum() / weights.sum()) if timings else None
    if len(classes) > 1:
        section["classes"] = {
            name: _summary([t for t in timings if (t.slo or slo).name == name], of_class)
            for name, of_class in sorted(classes.items())
        }
    return section


def _summary(timings: list[RequestTiming], slo: Slo) -> dict[str, Any]:
    completed = [timing for timing in timings if not timing.failed]
    met = [timing.meets(timing.slo or slo) for timing in timings]
    return {
        "requests": len(timings),
        "completed": len(completed),
        "failed": len(timings) - len(completed),
        "prompt_tokens": sum(timing.prompt_tokens for timing in timings),
        "output_tokens": sum(timing.output_tokens for timing in timings),
        "ttft_ms": _distribution_ms(timing.ttft_s for timing in completed),
        "tpot_ms": _distribution_ms(timing.tpot_s for timing in completed),
        "slo_attainment": sum(met) / len(met) if met else None,
    }


def _distribution_ms(seconds: Iterable[float | None]) -> dict[str, float | None]:
    values = np.array([s for s in seconds if s is not None]) * 1e3
    if not values.size:
        return {"mean": None, "p50": None, "p99": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"mean": float(values.mean()), "p50": float(p50), "p99": float(p99)}
