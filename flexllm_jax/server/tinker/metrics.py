"""What /metrics and the dashboard say of the Tinker API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flexllm_jax.server.http.access import Client
from flexllm_jax.server.tinker.service import TinkerService

_SHOWN = 50


class TinkerMetrics(Collector):
    """Counted when they are asked for."""

    def __init__(self, tinker: TinkerService):
        self._tinker = tinker

    def collect(self) -> Iterator[Metric]:
        """All families."""
        tinker = self._tinker
        counts = tinker.counts()
        for name, text in (
            ("sessions", "Sessions of the Tinker API whose clients are there."),
            ("samplers", "Samplers of the Tinker API."),
        ):
            yield GaugeMetricFamily(f"flexllm:tinker_{name}", text, counts[name])
        models = GaugeMetricFamily(
            "flexllm:tinker_models",
            "Models of the Tinker API that have requests or a client, by where they are.",
            labels=["state"],
        )
        for state in ("on_engine", "waiting", "failed"):
            models.add_metric([state], counts["models"][state])
        yield models
        futures = GaugeMetricFamily(
            "flexllm:tinker_futures", "Futures in memory.", labels=["kind", "state"]
        )
        for (kind, state), count in sorted(counts["futures"].items()):
            futures.add_metric([kind, state], count)
        yield futures
        tokens = CounterMetricFamily(
            "flexllm:tinker_tokens", "Tokens of the Tinker API, by use.", labels=["use"]
        )
        for use in ("training", "prefill", "sampled"):
            tokens.add_metric([use], tinker.totals[use])
        yield tokens
        failures = CounterMetricFamily(
            "flexllm:tinker_failures", "Futures that failed.", labels=["category"]
        )
        for category in ("user", "server"):
            failures.add_metric([category], tinker.failures[category])
        yield failures


def shown(tinker: TinkerService, client: Client) -> dict[str, Any]:
    """What a client sees on the dashboard."""
    runs = [run for run in tinker.training.runs.values() if client.may_see(run.row.owner)]
    samples = Counter(
        "waiting" if not future.done.is_set() else "done"
        for future in tinker.samplers.futures.values()
        if client.may_see(future.owner)
    )
    mine = [s for s in tinker.sessions.active.values() if client.may_see(s.owner)]
    runs.sort(key=lambda run: -run.row.last_request_at)
    return {
        "sessions": len(mine),
        "samplers": tinker.samplers.count(client),
        "samples_waiting": samples["waiting"],
        "models": [
            {
                "id": run.row.id,
                "base_model": run.row.base_model,
                "rank": run.row.rank,
                "state": run.state,
                "waiting": len(run.pending),
            }
            for run in runs[:_SHOWN]
        ],
    }
