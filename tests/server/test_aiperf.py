"""aiperf, unmodified: of a short load of streaming chats it counts what the server counts."""

import json
import os
import shutil
import subprocess

import pytest

from tests.server.running import KEY

REQUESTS, TOKENS = 20, 12


def test_a_short_load(server, chat_llama, tmp_path):
    program = shutil.which("aiperf")
    if program is None:
        pytest.skip("no program `aiperf`: pip install aiperf, here or in an environment of its own")
    counters = "vllm:request_success_total", "vllm:generation_tokens_total"
    before = [server.metric(name) for name in counters]
    options = {
        "model": "tiny",
        "url": server.url,
        "api-key": KEY,
        "endpoint-type": "chat",
        "tokenizer": str(chat_llama),
        "concurrency": 4,
        "request-count": REQUESTS,
        "isl": 24,
        "osl": TOKENS,
        "extra-inputs": "ignore_eos:true",
        "random-seed": 1,
        "workers-max": 1,
        "ui": "none",
        "output-artifact-dir": str(tmp_path),
    }
    command = [program, "profile", "--streaming", "--use-server-token-count"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["error_summary"] == [] and not report["was_cancelled"]
    assert report["request_count"]["avg"] == REQUESTS
    length = report["output_sequence_length"]
    assert length["min"] == length["max"] == TOKENS
    assert 0 < report["time_to_first_token"]["min"] <= report["request_latency"]["min"]
    counted = [server.metric(name) - was for name, was in zip(counters, before, strict=True)]
    assert counted == [REQUESTS, REQUESTS * TOKENS]
