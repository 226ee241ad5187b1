"""What /metrics says of jobs, of engines that tell of them one after the other."""

import json
from types import SimpleNamespace

import msgspec
import pytest

from flexllm_jax.config import build_config
from flexllm_jax.server import metrics as metrics_module
from flexllm_jax.server.engines.protocol import JobReport, States, Stats
from flexllm_jax.server.metrics import ServerMetrics
from flexllm_jax.server.visible_metrics import VisibleMetrics
from tests.server.running import KEY, make_config

ENGINE = SimpleNamespace(name="0", info=None)


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_module, "_ENDED_JOBS", 2)
    config = build_config(make_config(tmp_path / "model", tmp_path))
    return ServerMetrics(config, "tiny")


def report(name, status, forward):
    return JobReport(
        *(name, "a", status, 1, 2, forward, forward // 2, 0, 0.0, {"loss": 1.5}, None, 0, []),
        answered=forward // 10,
    )


def take(metrics, *jobs):
    metrics.take(ENGINE, Stats(False, 0.0, 0.0, 0, 0, 0, 1, 0, 0, 0, [], [], list(jobs)))


def series(metrics, sees=None):
    """Lines of jobs: {(name, job, phase): value}."""
    found = {}
    for family in VisibleMetrics(metrics.registry, sees or (lambda name: True)).collect():
        for sample in family.samples:
            if "job" in sample.labels and not sample.name.endswith("_created"):
                key = sample.labels["job"], sample.labels.get("phase", "loss")
                assert key not in found, "told twice"
                found[key] = sample.value
    return found


def test_jobs_that_ended_long_ago_are_one_sum(metrics):
    """Their labels go, the total stays, whatever becomes of the engine; running ones are kept."""
    take(metrics, report("runs", "running", 10))
    for number in range(5):
        metrics.engine_started(ENGINE)
        take(metrics, report("runs", "running", 10), report(f"job-{number}", "running", 60))
        take(metrics, report("runs", "running", 10), report(f"job-{number}", "succeeded", 100))
        take(metrics, report("runs", "running", 10))
        forward = {job: n for (job, phase), n in series(metrics).items() if phase == "forward"}
        assert sum(forward.values()) == 10 + 100 * (number + 1) + 10 * (number + 1)
    assert forward == {"": 300, "job-3": 100, "job-4": 100, "runs": 60}
    assert series(metrics)["", "backward"] == 150
    assert {job for job, phase in series(metrics) if phase == "loss"} == {"job-3", "job-4", "runs"}
    assert metrics.jobs == {"runs", "job-3", "job-4"}
    hidden = series(metrics, sees=lambda name: name == "runs")
    assert hidden == {("", "forward"): 500, ("", "backward"): 250, ("", "answers"): 50} | {
        ("runs", "forward"): 60,
        ("runs", "backward"): 30,
        ("runs", "answers"): 6,
        ("runs", "loss"): 1.5,
    }


def test_a_job_that_goes_on_has_labels_again(metrics):
    for name in ("failed", "b", "c", "d"):
        take(metrics, report(name, "failed", 100))
    take(metrics)
    assert ("failed", "forward") not in series(metrics)
    take(metrics, report("failed", "running", 40))
    assert series(metrics)["failed", "forward"] == 40
    assert series(metrics)["", "forward"] == 200


def test_recurrent_state_is_told_of_models_that_have_it(metrics):
    def told():
        names = ("flexllm:state_slots", "flexllm:state_slots_used", "flexllm:state_snapshots_total")
        samples = [s for family in metrics.registry.collect() for s in family.samples]
        return {next(iter(s.labels.values())): s.value for s in samples if s.name == names[2]} | {
            (s.name.removeprefix("flexllm:state_"), s.labels["of"]): s.value
            for s in samples
            if s.name in names[:2]
        }

    stats = Stats(False, 0.0, 0.0, 3, 0, 0, 1, 0, 0, 0, [], [], [])
    metrics.take(ENGINE, stats)
    assert told() == {}
    for read in (1, 4):
        metrics.take(ENGINE, msgspec.structs.replace(stats, states=States(3, 8, 2, 4, 9, read, 7)))
    slots = {("slots", "requests"): 8, ("slots", "snapshots"): 4}
    counted = {"saved": 9, "read": 4, "evicted": 7}
    used = {("slots_used", "requests"): 3, ("slots_used", "snapshots"): 2}
    assert told() == slots | counted | used
    metrics.engine_lost(ENGINE)
    assert told() == slots | counted | dict.fromkeys(used, 0)


# What the dashboards in vLLM's examples draw of requests.
DRAWN = (
    "generation_tokens_total",
    "inter_token_latency_seconds_bucket",
    "iteration_tokens_total_count",
    "kv_cache_usage_perc",
    "num_requests_running",
    "num_requests_waiting",
    "prompt_tokens_total",
    "request_decode_time_seconds_sum",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_sum",
    "request_prefill_time_seconds_sum",
    "request_prompt_tokens_bucket",
    "request_queue_time_seconds_sum",
    "request_success_total",
    "request_time_per_output_token_seconds_bucket",
    "time_to_first_token_seconds_bucket",
    "cache_config_info",
    "request_params_n_sum",
    "request_params_max_tokens_sum",
    "request_inference_time_seconds_sum",
)


def test_requests_are_told_as_vllm_tells_them(server, client):
    """Of two outputs of a prompt: sizes, what was asked for, and where the time went."""

    def values():
        return {name: server.metric(f"vllm:{name}", KEY) for name in (*DRAWN, *SUMS)}

    before = values()
    ask = {"model": "tiny", "prompt": list(range(3, 33)), "max_tokens": 7, "n": 2}
    client.completions.create(**ask, extra_body={"ignore_eos": True})
    server.wait(lambda: server.metric("vllm:num_requests_running", KEY) == 0)
    after = values()
    new = {name: after[name] - before[name] for name in after}
    assert (new["request_params_n_sum"], new["request_params_max_tokens_sum"]) == (2, 7)
    assert (new["generation_tokens_total"], new["prompt_tokens_total"]) == (14, 60)
    assert (new["request_generation_tokens_sum"], new["request_prompt_tokens_sum"]) == (14, 60)
    assert new["request_max_num_generation_tokens_sum"] == 7
    computed = new["request_prefill_kv_computed_tokens_sum"]
    assert computed + new["prompt_tokens_cached_total"] == 60
    parts = ("queue", "prefill", "decode")
    whole = sum(new[f"request_{part}_time_seconds_sum"] for part in parts)
    assert whole == pytest.approx(new["e2e_request_latency_seconds_sum"], rel=1e-6) and whole > 0
    text = server.get("/metrics", KEY)[1]
    assert [name for name in DRAWN if f"vllm:{name}" not in text] == []
    config = 'vllm:cache_config_info{block_size="8",enable_prefix_caching="True",engine="0"'
    assert f'{config},num_gpu_blocks="48"}} 1.0' in text
    assert json.loads(server.get("/load")[1]) == {"server_load": 0}
    assert server.get("/ping")[0] == 200 and server.post("/ping", b"")[0] == 200


SUMS = (
    "request_generation_tokens_sum",
    "request_prompt_tokens_sum",
    "request_prefill_kv_computed_tokens_sum",
    "prompt_tokens_cached_total",
    "e2e_request_latency_seconds_sum",
)
