"""A load from its start to its report: a server, finetuning jobs over its API, and the clients.

Writes report.json, report.png and the server's log to a folder. What the load made on the server
(jobs, files) is cancelled and deleted before it is looked at for leaks.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import get_console

from flexllm_jax.config import ConfigError, load_config
from flexllm_jax.experiments.load.client import first_model
from flexllm_jax.experiments.load.generator import Load, LoadShape, run_and_watch
from flexllm_jax.experiments.load.report import draw, make_report, show
from flexllm_jax.experiments.load.server import ServerProcess

JOB = {"lora_rank": 8, "learning_rate": 1e-3, "max_steps": 100_000}
_GRADER = {
    "type": "text_similarity",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "evaluation_metric": "fuzzy_match",
}
_ANSWERS = {"batch_size": 8, "num_generations": 8, "max_tokens": 16, "scale_rewards": "group"}


@dataclass(frozen=True)
class Jobs:
    """Finetuning beside the load: jobs that learn from rows, and such that learn from rewards for
    answers to `prompts`, each with its `answer`, of which every second answers a batch ahead.
    turn_s: all are paused in every second turn of so many seconds; 0: never."""

    supervised: int = 2
    rows: Path = Path("runs/demo-world/train.jsonl")
    reinforcement: int = 0
    prompts: Path = Path("runs/demo-world/questions.jsonl")
    turn_s: float = 0.0

    def start(self, server: ServerProcess, model: str) -> list[str]:
        """Upload what they need and start them; their ids."""
        started = []
        if self.supervised:
            file = server.upload(self.rows)
            for i in range(self.supervised):
                job = server.start_job(model, file, f"load-{i}", **JOB, batch_tokens=512)
                started.append(job)
        if self.reinforcement:
            file = server.upload(self.prompts)
            for i in range(self.reinforcement):
                own = {"grader": _GRADER, "hyperparameters": _ANSWERS | {"steps_ahead": i % 2}}
                method = {"type": "reinforcement", "reinforcement": own}
                job = server.start_job(model, file, f"learns-{i}", **JOB, method=method)
                started.append(job)
        return started


def run_load(
    script: Path,
    config: Path,
    overrides: Sequence[str],
    out: Path,
    shape: LoadShape,
    jobs: Jobs = Jobs(),
) -> dict[str, Any]:
    """Run the load on a server that `script` (serve.py) starts; the report.

    Raises ConfigError for a configuration that cannot be used.
    """
    scheduler = load_config(config, overrides).scheduler
    classes = {"standard": scheduler.slo, **scheduler.slo_classes}
    if shape.slo not in classes:
        raise ConfigError(f"slo: {shape.slo!r} is none of {', '.join(classes)}")
    slo = {name: getattr(classes[shape.slo], name) for name in ("ttft_ms", "tpot_ms")}
    out.mkdir(parents=True, exist_ok=True)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every client is an open file
    server = ServerProcess(script, config, overrides, out)
    try:
        model = first_model(server.client)
        load = Load(server.url, model, shape)
        body = {"model": model, "prompt": "a", "max_tokens": 4}
        server.client.post("/v1/completions", json=body).raise_for_status()
        before = server.settled(load.began)
        started = jobs.start(server, model)
        samples = asyncio.run(run_and_watch(server, load, started, jobs.turn_s))
        tokens = server.tokens_of_jobs()
        for job in started:
            server.cancel_job(job)
        for file in load.files:
            server.delete_file(file)
        after = server.settled(load.began, before.kv_usage)
    finally:
        status = server.stop()
    report = make_report(load, samples, before, after, slo, tokens)
    if status != 0:
        report["problems"].append(f"the server ended with status {status}")
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(load, samples, slo, out / "report.png")
    show(report, get_console())
    return report
