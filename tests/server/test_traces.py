"""OpenTelemetry's traces, as the SDK's own exporter in memory has them."""

import time
from typing import Any

import pytest

from flexllm_jax.config import ConfigError, build_config
from flexllm_jax.server.engines.protocol import Fact, JobReport, Stats
from flexllm_jax.server.http.access import Admission, Client
from flexllm_jax.server.metrics import RequestMetrics, ServerMetrics
from flexllm_jax.server.traces import Traces

ENGINE: Any = None  # whose they are makes no difference


@pytest.fixture
def exported():
    """Traces, and their spans by name."""
    reason = "opentelemetry-sdk is in the extra test-clients"
    trace = pytest.importorskip("opentelemetry.sdk.trace", reason=reason)
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Traces(provider), exporter.get_finished_spans


def test_an_output_is_queued_prefilled_and_decoded(exported, tmp_path):
    traces, spans = exported
    config = build_config({"model": {"path": str(tmp_path)}}, "test")
    metrics = ServerMetrics(config, "tiny")
    metrics.traces = traces
    admitted = Admission(config.server).admit(Client("a"), 1, 5, 8)
    arrival = time.monotonic() - 10
    output = RequestMetrics(metrics.batch(admitted, 1, 1, 8), arrival, 5, "mine", "standard")
    output.token(arrival + 3, queued_s=1.0)
    output.token(arrival + 7, None)
    output.end("stop")
    found = {span.name: span for span in spans()}
    request = found["llm_request"]
    for name, began, ended in (("queue", 0, 1), ("prefill", 1, 3), ("decode", 3, 7)):
        span = found[name]
        assert span.parent.span_id == request.context.span_id
        assert span.start_time - request.start_time == pytest.approx(began * 1e9, abs=1e3)
        assert span.end_time - request.start_time == pytest.approx(ended * 1e9, abs=1e3)
    assert request.end_time - request.start_time == pytest.approx(7e9, abs=1e3)
    assert abs(request.start_time / 1e9 - (time.time() - 10)) < 2
    assert request.attributes == {
        "gen_ai.request.model": "mine",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 2,
        "finish_reason": "stop",
        "slo": "standard",
    }


def test_a_step_of_a_job_is_told_once(exported):
    traces, spans = exported
    facts = [Fact(1, "started"), Fact(2, "step", 1, {"loss": 2.0}), Fact(3, "step", 2)]

    def stats(count):
        job = ("j", "run", "running", 2, 9, 0, 0, 0, 0.0, {}, None, 0, facts[:count])
        return Stats(False, 0.0, 0.0, 0, 0, 0, 1, 0, 0, 0, [], [], [JobReport(*job)])

    for count in (2, 2, 3):
        traces.take(ENGINE, stats(count))
    assert [span.name for span in spans()] == ["finetuning_step"] * 2
    first, second = (dict(span.attributes) for span in spans())
    assert first == {"job": "j", "step": 1, "loss": 2.0} and second == {"job": "j", "step": 2}


def test_without_the_libraries_the_setting_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter", None)
    tree = {"model": {"path": str(tmp_path)}, "server": {"otlp_traces_endpoint": "http://x/v1/t"}}
    with pytest.raises(ConfigError, match=r"pip install 'flexllm_jax\[traces\]'"):
        ServerMetrics(build_config(tree, "test"), "tiny")
