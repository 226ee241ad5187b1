"""A load from its start to its report: a server, finetuning jobs over its API, and the clients.

Writes report.json, report.png and the server's log to a folder. What the load made on the server
(jobs, files) is cancelled and deleted before it is looked at for leaks.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import get_console

from flexllm_jax.config import load_config
from flexllm_jax.experiments.load.client import first_model
from flexllm_jax.experiments.load.generator import Load, LoadShape, run_and_watch
from flexllm_jax.experiments.load.report import draw, make_report, show
from flexllm_jax.experiments.load.server import ServerProcess

JOB = {"lora_rank": 8, "learning_rate": 1e-3, "batch_tokens": 512, "max_steps": 100_000}
TRAINING_FILE = Path("runs/demo-world/train.jsonl")


def run_load(
    script: Path,
    config: Path,
    overrides: Sequence[str],
    out: Path,
    shape: LoadShape,
    jobs: int = 2,
    training_file: Path = TRAINING_FILE,
) -> dict[str, Any]:
    """Run the load on a server that `script` (serve.py) starts; the report.

    Raises ConfigError for a configuration that cannot be used.
    """
    objectives = load_config(config, overrides).scheduler.slo
    slo = {"ttft_ms": objectives.ttft_ms, "tpot_ms": objectives.tpot_ms}
    out.mkdir(parents=True, exist_ok=True)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every client is an open file
    server = ServerProcess(script, config, overrides, out)
    try:
        model = first_model(server.client)
        load = Load(server.url, model, shape)
        rows = server.upload(training_file)
        body = {"model": model, "prompt": "a", "max_tokens": 4}
        server.client.post("/v1/completions", json=body).raise_for_status()
        before = server.settled(load.began)
        started = [server.start_job(model, rows, f"load-{i}", **JOB) for i in range(jobs)]
        samples = asyncio.run(run_and_watch(server, load))
        for job in started:
            server.cancel_job(job)
        for file in load.files:
            server.delete_file(file)
        after = server.settled(load.began, before.kv_usage)
    finally:
        status = server.stop()
    report = make_report(load, samples, before, after, slo)
    if status != 0:
        report["problems"].append(f"the server ended with status {status}")
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(load, samples, slo, out / "report.png")
    show(report, get_console())
    return report
