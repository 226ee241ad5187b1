"""OpenTelemetry's traces: a span for each output, in which it is queued, in prefill and in decode,
and one for each optimizer step of a job.

Spans are made when they end, from times that are taken anyway. The libraries are those of the extra
`traces`; without `server.otlp_traces_endpoint` they are not imported.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from flexllm_jax.config import ConfigError
from flexllm_jax.server.engines.client import EngineClient
from flexllm_jax.server.engines.protocol import Stats
from flexllm_jax.version import __version__


class Traces:
    """Spans for a provider of tracers."""

    def __init__(self, provider: Any):
        self._inside = import_module("opentelemetry.trace").set_span_in_context
        self._tracer = provider.get_tracer("flexllm_jax", __version__)
        self._monotonic_began_ns = time.time_ns() - time.monotonic_ns()
        self._seen: dict[str, tuple[str, int, float]] = {}  # by job: run, facts, the last's time

    def _span(self, name: str, start: float, end: float, inside: Any = None, **told: Any) -> Any:
        """A span between two times of `time.monotonic`."""
        context = None if inside is None else self._inside(inside)
        start_ns, end_ns = (self._monotonic_began_ns + int(at * 1e9) for at in (start, end))
        span = self._tracer.start_span(name, context, start_time=start_ns, attributes=told)
        span.end(max(start_ns, end_ns))
        return span

    def output(
        self,
        arrival: float,
        queued_s: float | None,
        first_at: float,
        last_at: float,
        attributes: dict[str, Any],
    ) -> None:
        """An output has ended; `first_at` is 0 for one without a token."""
        request = self._span("llm_request", arrival, last_at or time.monotonic(), **attributes)
        if not first_at:
            return
        started = min(arrival + (queued_s or 0.0), first_at)
        self._span("queue", arrival, started, request)
        self._span("prefill", started, first_at, request)
        self._span("decode", first_at, last_at, request)

    def take(self, engine: EngineClient, stats: Stats) -> None:
        """What an engine says of its jobs: steps that were not told before."""
        now = time.monotonic()
        for job in stats.jobs:
            run, known, since = self._seen.get(job.name, ("", 0, now))
            if run != job.run:
                run, known, since = job.run, 0, now
            for fact in job.facts:
                if fact.number > known and fact.kind == "step":
                    told = {"job": job.name, "step": fact.step, **fact.metrics}
                    self._span("finetuning_step", since, now, **told)
                if fact.number > known and fact.kind in ("step", "started"):
                    since = now
                known = max(known, fact.number)
            self._seen[job.name] = run, known, since


def traces_to(endpoint: str) -> Traces:
    """Spans that are sent to a collector over OTLP (HTTP). ConfigError without the libraries."""
    try:
        sdk = import_module("opentelemetry.sdk.trace")
        resources = import_module("opentelemetry.sdk.resources")
        export = import_module("opentelemetry.sdk.trace.export")
        otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"server.otlp_traces_endpoint: {error.name} is not installed: "
            f"pip install 'flexllm_jax[traces]', or set it to null"
        ) from None
    service = resources.Resource.create({"service.name": "flexllm_jax"})
    provider = sdk.TracerProvider(resource=service)
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter(endpoint)))
    return Traces(provider)
