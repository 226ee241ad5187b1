"""Prometheus metrics: vLLM's names for inference, ours for finetuning and steps.

What an engine tells is labelled with its number, as in vLLM; what is known of requests is not.
"""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flexllm_jax.config import Config
from flexllm_jax.server.engine_metrics import StateMetrics, add_total
from flexllm_jax.server.engines.client import EngineClient
from flexllm_jax.server.engines.protocol import Stats, Step
from flexllm_jax.server.http.access import Admitted
from flexllm_jax.server.request_metrics import COUNTS, FAST, RequestHistograms
from flexllm_jax.server.traces import traces_to
from flexllm_jax.server.visible_metrics import ADAPTER_LISTS, VisibleMetrics

_ATTAINMENT_WINDOW = 1000
JOB_STATES = (
    "validating_files",
    "queued",
    "running",
    "paused",
    "succeeded",
    "failed",
    "cancelled",
)
_PHASES = ("forward", "backward", "answers")  # of finetuning, by which its tokens are counted
_ENDED_JOBS = 100  # that have labels of their own
_DRAFTS = ("drafts", "draft_tokens", "accepted_tokens")  # of speculative decoding


class Latencies(NamedTuple):
    """What a request took, seconds; of one that failed, until then."""

    slo: str
    met: bool
    ttft_s: float
    tpot_s: float | None


class ServerMetrics:
    """All metrics of a server, in a registry of their own. Counters go on when the engine is
    started again."""

    def __init__(self, config: Config, model_name: str):
        self.registry = registry = CollectorRegistry()
        self._slos = {"standard": config.scheduler.slo, **config.scheduler.slo_classes}
        self._model = model_name
        self._slots = config.adapters.slots
        endpoint = config.server.otlp_traces_endpoint
        self.traces = traces_to(endpoint) if endpoint else None

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple, *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        model, engine = "model_name", "engine"
        own = (model, engine)
        self.running = gauge("vllm:num_requests_running", "Requests being computed.", *own)
        self.waiting = gauge("vllm:num_requests_waiting", "Requests waiting.", *own)
        self.kv_usage = gauge("vllm:kv_cache_usage_perc", "KV pages in use; 1 is all.", *own)
        self.prefix_queries = counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", *own
        )
        self.prefix_hits = counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", *own
        )
        self.requests = RequestHistograms(registry, model_name)
        self.cache_config = gauge(
            "vllm:cache_config_info",
            "The KV cache; the value is 1.",
            *("block_size", "num_gpu_blocks", "enable_prefix_caching", engine),
        )
        self._prefix_caching = str(config.cache.prefix_caching)
        self.success = counter(
            "vllm:request_success", "Requests that ended.", model, "finished_reason"
        )
        self.preemptions = counter("vllm:num_preemptions", "Requests that lost their pages.", *own)
        self.drafts = {n: counter(f"vllm:spec_decode_num_{n}", "Drafts.", *own) for n in _DRAFTS}
        self.step_tokens = histogram(
            "vllm:iteration_tokens_total", "Inference tokens of a step.", COUNTS, *own
        )
        self.lora_info = gauge(
            "vllm:lora_requests_info",
            "Adapters of the requests at hand; the value is the time.",
            "max_lora",
            *ADAPTER_LISTS,
        )
        self.finetune_tokens = counter(
            "flexllm:finetune_tokens", "Finetuning tokens computed.", "job", "phase"
        )
        self.finetune_loss = gauge("flexllm:finetune_loss", "Loss of the last step.", "job")
        self.finetune_jobs = gauge("flexllm:finetune_jobs", "Jobs by their state.", "state")
        self.attainment = gauge(
            "flexllm:slo_attainment_ratio",
            f"Of the last {_ATTAINMENT_WINDOW} requests of a class, those on time.",
            "slo",
        )
        self.step_seconds = histogram(
            "flexllm:step_seconds", "A step on the device, by what it held.", FAST, "kind", engine
        )
        self.prediction_error = histogram(
            "flexllm:step_prediction_error_ratio",
            "|predicted - measured| / measured of steps.",
            (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5),
            engine,
        )
        self.engine_cpu = counter(
            "flexllm:engine_cpu_seconds",
            "CPU time of the engine's threads: for steps, and for messages to the HTTP process.",
            "thread",
            engine,
        )
        self.adapter_version = gauge(
            "flexllm:adapter_version", "Version of a served adapter.", "adapter", engine
        )
        self.free_slots = gauge(
            "flexllm:adapter_slots_free", "Slots of the bank that hold no adapter.", engine
        )
        text = "Versions that jobs answer with that wait in the host's memory for a slot."
        self.versions_on_host = gauge("flexllm:adapter_versions_on_host", text, engine)
        text = "Those that went there (host), and came back (device)."
        self.versions_moved = counter("flexllm:adapter_versions_moved", text, "to", engine)
        self.states = StateMetrics(registry)
        self.engine_jobs = gauge("flexllm:engine_jobs", "Jobs that an engine trains.", engine)
        self.engine_up = gauge("flexllm:engine_up", "1: the engine serves; 0: not now.", engine)
        self.recompiles = counter(
            "flexllm:xla_recompiles", "Programs compiled while serving.", engine
        )
        self._met = {name: deque(maxlen=_ATTAINMENT_WINDOW) for name in self._slos}
        self.recent: deque[Latencies] = deque(maxlen=_ATTAINMENT_WINDOW)
        self.jobs: set[str] = set()  # of which there is something
        self._ended: dict[str, None] = {}  # of these, the first first
        self._tokens = defaultdict[tuple[str, str], float](float)  # of these, by phase
        self._adapters: dict[str, Counts[str]] = {"running": Counts(), "waiting": Counts()}
        self._totals: dict[str, dict[Any, float]] = {}  # by engine: of the one that runs now
        self._versions: dict[str, dict[str, int]] = {}  # by engine: of its adapters
        for reason in ("stop", "length", "abort", "error"):
            self.success.labels(model_name, reason)

    def batch(self, admitted: Admitted, outputs: int, n: int, max_tokens: int) -> Batch:
        """For the `RequestMetrics` of one HTTP request with such parameters."""
        self.requests.params_n.observe(n)
        self.requests.params_max_tokens.observe(max_tokens)
        return Batch(self, admitted, outputs)

    def render(self, sees: Callable[[str], bool] | None = None) -> bytes:
        """The text of /metrics. With `sees`: of jobs and adapters those that it says yes to; tokens
        of all other jobs are one sum, of the job ""."""
        return generate_latest(
            self.registry if sees is None else VisibleMetrics(self.registry, sees)
        )

    # -- from the engine --------------------------------------------------------------------------

    def engine_started(self, engine: EngineClient) -> None:
        """The engine's own counts start from 0."""
        self._totals[engine.name] = {}
        self.engine_up.labels(engine.name).set(1)
        if engine.info is not None:
            pages = str(engine.info.page_size), str(engine.info.num_pages)
            self.cache_config.labels(*pages, self._prefix_caching, engine.name).set(1)

    def engine_lost(self, engine: EngineClient) -> None:
        """Nothing runs in an engine that has ended."""
        self.engine_up.labels(engine.name).set(0)
        self.engine_jobs.labels(engine.name).set(0)
        self.free_slots.labels(engine.name).set(0)
        self.versions_on_host.labels(engine.name).set(0)
        self._versions.pop(engine.name, None)
        self.states.lost(engine.name)
        for each in (self.running, self.waiting, self.kv_usage):
            each.labels(self._model, engine.name).set(0)

    def take(self, engine: EngineClient, stats: Stats) -> None:
        """Take in an engine's statistics."""
        name, totals = engine.name, self._totals.setdefault(engine.name, {})
        own = (self._model, name)
        self.running.labels(*own).set(stats.num_running)
        self.waiting.labels(*own).set(stats.num_waiting)
        self.kv_usage.labels(*own).set(stats.pages_used / stats.num_pages)
        add_total(self.prefix_queries.labels(*own), totals, "queries", stats.prefix_queries)
        add_total(self.prefix_hits.labels(*own), totals, "hits", stats.prefix_hits)
        add_total(self.recompiles.labels(name), totals, "recompiles", stats.recompiles)
        for thread, seconds in (("step", stats.step_cpu_s), ("messages", stats.message_cpu_s)):
            add_total(self.engine_cpu.labels(thread, name), totals, thread, seconds)
        self.free_slots.labels(name).set(stats.free_slots)
        self.versions_on_host.labels(name).set(stats.on_host)
        for to, count in (("host", stats.spilled), ("device", stats.returned)):
            add_total(self.versions_moved.labels(to, name), totals, ("moved", to), count)
        self.engine_jobs.labels(name).set(sum(job.status == "running" for job in stats.jobs))
        self.states.take(name, stats.states, totals)
        for step in stats.steps:
            if tokens := step.decode_tokens + step.prefill_tokens:
                self.step_tokens.labels(*own).observe(tokens)
            self.preemptions.labels(*own).inc(step.preempted)
            for what, drafts in self.drafts.items() if step.drafts else ():
                drafts.labels(*own).inc(getattr(step, what))
            self.step_seconds.labels(step_kind(step), name).observe(step.measured_s)
            error = abs(step.predicted_s - step.measured_s) / max(step.measured_s, 1e-9)
            self.prediction_error.labels(name).observe(error)
        for job in stats.jobs:
            self.jobs.add(job.name)
            for phase, tokens in zip(
                _PHASES, (job.forwarded, job.backwarded, job.answered), strict=True
            ):
                counter = self.finetune_tokens.labels(job.name, phase)
                self._tokens[job.name, phase] += add_total(
                    counter, totals, (job.name, phase), tokens
                )
            self._ended.pop(job.name, None)
            if job.status not in ("running", "paused"):
                self._ended[job.name] = None
            if job.metrics:
                self.finetune_loss.labels(job.name).set(job.metrics["loss"])
        self._forget({job.name for job in stats.jobs})
        self._versions[name] = {adapter.name: adapter.version for adapter in stats.adapters}
        self.adapter_version.clear()
        for holder, versions in self._versions.items():
            for adapter, version in versions.items():
                self.adapter_version.labels(adapter, holder).set(version)
        self.lora_info.clear()
        names = (",".join(sorted(self._adapters[key])) for key in ("running", "waiting"))
        self.lora_info.labels(str(self._slots - 1), *names).set_to_current_time()

    def _forget(self, told: set[str]) -> None:
        """Of jobs that have ended long ago, and that no engine tells of, their sum stays."""
        old = [job for job in self._ended if job not in told]
        for job in old[: max(0, len(self._ended) - _ENDED_JOBS)]:
            del self._ended[job]
            self.jobs.discard(job)
            for phase in _PHASES:
                self.finetune_tokens.labels("", phase).inc(self._tokens.pop((job, phase), 0))
                self.finetune_tokens.remove(job, phase)
                for totals in self._totals.values():
                    totals.pop((job, phase), None)
            self.finetune_loss.labels(job)  # it may have none
            self.finetune_loss.remove(job)

    def count_jobs(self, states: Mapping[str, int]) -> None:
        """Take in how many jobs there are of each state."""
        for state in JOB_STATES:
            self.finetune_jobs.labels(state).set(states.get(state, 0))

    # -- from requests ----------------------------------------------------------------------------

    def note_slo(self, slo: str, met: bool, ttft_s: float, tpot_s: float | None) -> None:
        """A request of a class has ended, on time or not."""
        self.recent.append(Latencies(slo, met, ttft_s, tpot_s))
        results = self._met[slo]
        results.append(met)
        self.attainment.labels(slo).set(sum(results) / len(results))

    def meets(self, slo: str, ttft_s: float, tpot_s: float | None) -> bool:
        """Whether latencies are within the objectives of a class."""
        limits = self._slos[slo]
        in_time = ttft_s * 1e3 <= limits.ttft_ms
        return in_time and (tpot_s is None or tpot_s * 1e3 <= limits.tpot_ms)

    def move_adapter(self, adapter: str | None, was: str | None, now: str | None) -> None:
        """A request for an adapter waits, runs, or has ended (None)."""
        if adapter is None:
            return
        if was:
            self._adapters[was][adapter] -= 1
            self._adapters[was] += Counts()  # forget those at 0
        if now:
            self._adapters[now][adapter] += 1


class Batch:
    """The outputs of one HTTP request: when the last has ended, its admission is given back."""

    def __init__(self, metrics: ServerMetrics, admitted: Admitted, outputs: int):
        self.metrics, self.admitted = metrics, admitted
        self._left, self._tokens, self._longest = outputs, 0, 0

    def end(self, tokens: int) -> None:
        """One output has ended, with so many tokens."""
        self._left -= 1
        self._tokens += tokens
        self._longest = max(self._longest, tokens)
        if not self._left:
            self.metrics.requests.longest.observe(self._longest)
            self.admitted.close(self._tokens)


class RequestMetrics:
    """One output from its arrival to its end. Times are those of this process, and do not count how
    fast the client reads."""

    def __init__(
        self, batch: Batch, arrival: float, prompt_tokens: int, adapter: str | None, slo: str
    ):
        self._batch, self._metrics = batch, batch.metrics
        self._arrival, self._prompt_tokens = arrival, prompt_tokens
        self._adapter, self._slo = adapter, slo
        self._tokens = 0
        self._first_at = self._last_at = 0.0
        self._queued_s: float | None = None
        self._ended = False
        self._metrics.move_adapter(adapter, None, "waiting")

    def token(self, now: float, queued_s: float | None, cached_tokens: int = 0) -> None:
        """A token came at `now`; the first one says how long the request was queued, and how much
        of its prompt was in the prefix cache."""
        metrics, told = self._metrics, self._metrics.requests
        if not self._tokens:
            self._first_at, self._queued_s = now, queued_s
            told.ttft.observe(now - self._arrival)
            told.prompt_tokens.inc(self._prompt_tokens)
            told.cached_tokens.inc(cached_tokens)
            told.computed.observe(self._prompt_tokens - cached_tokens)
            if queued_s is not None:
                told.queue.observe(queued_s)
                told.prefill.observe(max(0.0, now - self._arrival - queued_s))
            metrics.move_adapter(self._adapter, "waiting", "running")
            self._batch.admitted.started(self._prompt_tokens)
        else:
            told.itl.observe(now - self._last_at)
        told.output_tokens.inc()
        self._tokens += 1
        self._last_at = now

    def end(self, reason: str) -> None:
        """The output has ended: stop, length, abort (by the client) or error; the first counts."""
        if self._ended:
            return
        self._ended = True
        metrics = self._metrics
        model = metrics._model
        metrics.move_adapter(self._adapter, "running" if self._tokens else "waiting", None)
        metrics.success.labels(model, reason).inc()
        if reason in ("stop", "length"):
            told, taken_s = metrics.requests, self._last_at - self._arrival
            told.e2e.observe(taken_s)
            told.decode.observe(self._last_at - self._first_at)
            told.prompt_size.observe(self._prompt_tokens)
            told.output_size.observe(self._tokens)
            if self._queued_s is not None:
                told.inference.observe(max(0.0, taken_s - self._queued_s))
            tpot = None
            if self._tokens > 1:
                tpot = (self._last_at - self._first_at) / (self._tokens - 1)
                told.tpot.observe(tpot)
            ttft = self._first_at - self._arrival
            metrics.note_slo(self._slo, metrics.meets(self._slo, ttft, tpot), ttft, tpot)
        elif reason == "error":
            metrics.note_slo(self._slo, False, time.monotonic() - self._arrival, None)
        if metrics.traces is not None:
            told = {"gen_ai.request.model": self._adapter or model, "slo": self._slo}
            told |= {"gen_ai.usage.input_tokens": self._prompt_tokens, "finish_reason": reason}
            told |= {"gen_ai.usage.output_tokens": self._tokens}
            times = self._arrival, self._queued_s, self._first_at, self._last_at
            metrics.traces.output(*times, told)
        self._batch.end(self._tokens)


def step_kind(step: Step) -> str:
    """What a step held: inference, finetune, or both (mixed)."""
    inference = step.decode_tokens + step.prefill_tokens > 0
    finetuning = step.forward_tokens + step.backward_units > 0
    if inference and finetuning:
        return "mixed"
    return "inference" if inference else "finetune"
