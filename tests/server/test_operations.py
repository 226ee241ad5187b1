"""What operators see: metrics, logs, and adapters that are loaded from folders."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engines import load_with_adapter, random_prompts, reference_greedy, save_random_adapter

PROMPT = random_prompts([20])[0]
ASK = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "vllm:iteration_tokens_total_bucket",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:lora_requests_info",
    "flexllm:finetune_jobs",
    "flexllm:slo_attainment_ratio",
    "flexllm:step_seconds_bucket",
    "flexllm:step_prediction_error_ratio_bucket",
    "flexllm:adapter_version",
    "flexllm:engine_cpu_seconds_total",
    "flexllm:xla_recompiles_total",
]


def samples(server):
    families = text_string_to_metric_families(server.get("/metrics")[1])
    return [sample for family in families for sample in family.samples]


def value(server, name, **labels):
    return sum(
        s.value for s in samples(server) if s.name == name and labels.items() <= s.labels.items()
    )


def test_the_http_process_has_no_jax(server):
    """It would take a second more to start, and hundreds of MiB."""
    libraries = {
        p: Path(f"/proc/{p}/maps").read_text() for p in (server.process.pid, server.engine_pid)
    }
    assert "jaxlib" in libraries[server.engine_pid]
    assert "jaxlib" not in libraries[server.process.pid]


def test_metrics_count_what_happened(server, client):
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    names += ("vllm:e2e_request_latency_seconds_count", "vllm:inter_token_latency_seconds_count")
    names += ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")

    def totals():
        return [value(server, name) for name in names]

    before = totals()
    ended = value(server, "vllm:request_success_total", finished_reason="length")
    client.completions.create(model="random", **ASK)
    client.completions.create(model="random", **ASK)  # its whole pages are in the prefix cache
    expected = [40, 24, 2, 22, 32, 16]
    server.wait(lambda: [a - b for a, b in zip(totals(), before, strict=True)] == expected, 10)
    now = value(server, "vllm:request_success_total", finished_reason="length")
    assert now - ended == 2
    server.wait(lambda: value(server, "vllm:kv_cache_usage_perc") == 0)
    assert {sample.name for sample in samples(server)} >= set(NAMES)
    assert value(server, "flexllm:adapter_version", adapter="random") >= 1
    assert value(server, "flexllm:step_seconds_count", kind="inference") > 20
    assert 0 < value(server, "flexllm:slo_attainment_ratio", slo="standard") <= 1
    assert value(server, "flexllm:xla_recompiles_total") == 0


def test_metrics_show_the_load_while_it_lasts(server, client):
    """Twice as many long outputs as there is room for."""
    ask = {"model": "random", "prompt": PROMPT, "max_tokens": 130, "n": 12}
    preempted = value(server, "vllm:num_preemptions_total")
    seen = []

    def ended():
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        seen.append([value(server, "vllm:" + name) for name in names])
        names = [s.labels for s in samples(server) if s.name == "vllm:lora_requests_info"]
        seen[-1] += [labels[k] for labels in names for k in labels if k.endswith("_adapters")]
        return answer.done() and seen[-1][:3] == [0, 0, 0]

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            client.completions.create, **ask, extra_body={"ignore_eos": True, "seed": 1}
        )
        server.wait(ended)
        assert answer.result().usage.completion_tokens == 12 * 130
    running, waiting, usage = (max(row[i] for row in seen) for i in range(3))
    assert 1 <= running <= 6 and waiting >= 1 and 0.5 < usage <= 1
    assert {"random"} == {name for row in seen for name in row[3:]} - {""}
    assert value(server, "vllm:num_preemptions_total") > preempted
    states = {s.labels["state"] for s in samples(server) if s.name == "flexllm:finetune_jobs"}
    assert {"queued", "running", "paused", "succeeded", "failed", "cancelled"} <= states


def test_a_class_of_service_has_its_own_attainment(server, client):
    body = ASK["extra_body"] | {"slo": "batch"}
    client.completions.create(model="tiny", **(ASK | {"extra_body": body}))
    server.wait(lambda: value(server, "flexllm:slo_attainment_ratio", slo="batch") == 1)


def load(server, name, path, **fields):
    body = json.dumps({"lora_name": name, "lora_path": str(path), **fields}).encode()
    return server.post("/v1/load_lora_adapter", body)


def unload(server, name):
    return server.post("/v1/unload_lora_adapter", json.dumps({"lora_name": name}).encode())


def test_adapters_are_loaded_replaced_and_unloaded(server, client, adapter, llama, tokenizer):
    allowed = adapter.parent
    for seed in (5, 6):
        save_random_adapter(llama, allowed / str(seed), seed=seed)

    def answer():
        return client.completions.create(model="hot", **ASK).choices[0].text

    def expected(seed):
        reference = load_with_adapter(llama, allowed / str(seed))
        return tokenizer.decode(reference_greedy(reference, PROMPT, 12), skip_special_tokens=True)

    assert load(server, "hot", allowed / "5")[0] == 200
    assert answer() == expected(5)
    status, _, body = load(server, "hot", allowed / "6")
    assert status == 400 and "load_inplace" in body
    assert load(server, "hot", "6", load_inplace=True)[0] == 200  # relative to an allowed folder
    assert answer() == expected(6)  # and not what the prefix cache has of its first version
    assert "hot" in [model.id for model in client.models.list()]
    assert unload(server, "hot")[0] == 200
    assert "hot" not in [model.id for model in client.models.list()]
    assert unload(server, "hot")[0] == 404


def test_adapters_come_from_allowed_folders_only(server, adapter, tmp_path):
    allowed = adapter.parent
    outside = shutil.copytree(adapter, tmp_path / "outside")
    (allowed / "link").symlink_to(outside)
    half = allowed / "half"
    half.mkdir()
    shutil.copy(adapter / "adapter_config.json", half)
    (half / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for path in (
        outside,
        allowed / "link",
        half,
        allowed / ".." / allowed.name / adapter.name,
        "../outside",
        "/etc/passwd",
        "/",
        "a\0b",
    ):
        status, _, body = load(server, "sneaky", path)
        assert status == 403, (path, body)
    assert load(server, "sneaky", allowed / "absent")[0] == 404
    assert load(server, "tiny", adapter)[0] == 400
    broken = allowed / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not a file of tensors")
    status, _, body = load(server, "sneaky", broken)
    assert status == 400 and "safetensors" in json.loads(body)["error"]["message"]


def test_logs_are_json_and_name_the_client(server, client):
    client.completions.create(model="tiny", prompt="a", max_tokens=1)
    _, headers, _ = server.post("/v1/completions", b"{}")
    request_id = headers["x-request-id"]
    server.wait(lambda: request_id in server.output)
    lines = [json.loads(line) for line in server.lines]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    line = next(line for line in lines if line.get("request_id") == request_id)
    assert (line["path"], line["status"], line["client"]) == ("/v1/completions", 400, "tests")
    assert "key-of-the-tests" not in server.output


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/openapi.json"])
def test_machines_ask_without_a_key(server, path):
    assert server.get(path)[0] == 200
