"""`report.json`: what a run did, how fast, and on what.

Latencies and throughputs are as the paper counts them (see `scheduler.slo`): TTFT from arrival,
TPOT as a mean over a request's tokens, finetuning throughput in forward tokens over wall time.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from flexllm_jax.engine.in_flight import BucketUse
from flexllm_jax.engine.memory.cache import peak_memory
from flexllm_jax.launch.run import Run
from flexllm_jax.llm import LLM, JobHandle
from flexllm_jax.version import __version__
from scheduler.slo import summarize

_SAMPLES = 64  # answers of a reinforcement job's last batch
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def make_report(run: Run) -> dict[str, Any]:
    """The report of a run that has ended, plain JSON data."""
    replay = run.replay
    inference = summarize(replay.timings if replay else [], run.llm.engine.slos["standard"])
    if replay and replay.failures:
        inference["failures"] = dict(replay.failures.most_common())
    return {
        "inference": inference,
        "finetune": {job.name: _job_section(job) for job in run.jobs},
        "engine": _engine_section(run.llm, run.wall_s),
    }


def _job_section(job: JobHandle) -> dict[str, Any]:
    return {
        "status": job.status,
        "reason": job.reason,
        "steps": job.steps,
        "total_steps": job.total_steps,
        "tokens": job.tokens,
        "tokens_per_s": job.tokens_per_s,
        "losses": job.losses,
        "validation_losses": [list(entry) for entry in job.validation_losses],
        "metrics": job.metrics,
        "validations": [{"step": step, **measured} for step, measured in job.validations],
        "sampled_tokens": job.sampled_tokens,
        "samples": job.samples[:_SAMPLES],
        "adapter_dir": str(job.adapter_dir) if job.adapter_dir else None,
        "messages": job.messages,
    }


def _engine_section(llm: LLM, wall_s: float) -> dict[str, Any]:
    engine = llm.engine
    runner = engine.runner
    host_ms = np.array(engine.host_seconds or [0.0]) * 1e3
    p50, p99 = np.percentile(host_ms, [50, 99])
    return {
        "device": runner.device.device_kind,
        "policy": llm.config.scheduler.policy,
        "wall_s": wall_s,
        "steps": engine.steps,
        "startup_s": engine.startup_s,
        "compile_s": runner.start_seconds["programs"],
        "recompiles_after_warmup": runner.compilations.count,
        "programs": len(runner.programs),
        "padding": _padding(engine.buckets),
        "host_ms_per_step": {"mean": float(host_ms.mean()), "p50": float(p50), "p99": float(p99)},
        "latency_model": engine.scheduler.latency.errors(),
        "peak_memory_bytes": peak_memory(runner.device),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _padding(buckets: dict[int, BucketUse]) -> dict[str, Any]:
    """Share of the token slots that held no token, in all and by bucket."""
    by_bucket = {
        str(bucket): {"steps": use.steps, "padding": 1 - use.tokens / (use.steps * bucket)}
        for bucket, use in sorted(buckets.items())
    }
    slots = sum(use.steps * bucket for bucket, use in buckets.items())
    tokens = sum(use.tokens for use in buckets.values())
    return {"share": 1 - tokens / slots if slots else 0.0, "buckets": by_bucket}


def _versions() -> dict[str, str]:
    return {"flexllm_jax": __version__, **{package: version(package) for package in _PACKAGES}}


def write_report(report: dict[str, Any], out_dir: Path) -> Path:
    """Write `report.json`; a reader sees the old one or the new one, never half of one."""
    out_dir.mkdir(parents=True, exist_ok=True)
    file, unfinished = out_dir / "report.json", out_dir / ".report.json.tmp"
    with unfinished.open("w", encoding="utf-8") as stream:
        json.dump(report, stream, indent=2, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)
    return file
