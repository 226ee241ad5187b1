"""`report.json`: what a run did, how fast, and on what.

Latencies and throughputs are as the paper counts them (see `scheduler.slo`): TTFT from arrival,
TPOT as a mean over a request's tokens, finetuning throughput in forward tokens over wall time.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from flexllm_jax.engine.cache import peak_memory
from flexllm_jax.llm import LLM, Job
from flexllm_jax.run import Run
from scheduler.slo import summarize

_PACKAGES = ("flexllm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def make_report(run: Run) -> dict[str, Any]:
    """The report of a run that has ended, plain JSON data."""
    replay = run.replay
    inference = summarize(replay.timings if replay else [], run.llm.engine.slo)
    if replay and replay.failures:
        inference["failures"] = dict(replay.failures.most_common())
    return {
        "inference": inference,
        "finetune": {job.name: _job_section(job) for job in run.jobs},
        "engine": _engine_section(run.llm, run.wall_s),
    }


def _job_section(job: Job) -> dict[str, Any]:
    return {
        "status": job.status,
        "reason": job.reason,
        "steps": job.steps,
        "total_steps": job.total_steps,
        "tokens": job.tokens,
        "tokens_per_s": job.tokens_per_s,
        "losses": job.losses,
        "validation_losses": [list(entry) for entry in job.validation_losses],
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
        "compile_s": runner.compile_s,
        "recompiles_after_warmup": runner.compilations.count,
        "host_ms_per_step": {"mean": float(host_ms.mean()), "p50": float(p50), "p99": float(p99)},
        "peak_memory_bytes": peak_memory(runner.device),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = "not installed"
    return versions


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


def summary_table(report: dict[str, Any]) -> Table:
    """The report in a few lines."""
    table = Table(show_header=False, title="summary", title_justify="left")
    inference, engine = report["inference"], report["engine"]
    if inference["requests"]:
        table.add_row(
            "requests",
            f"{inference['completed']:,} completed, {inference['failed']:,} failed "
            f"of {inference['requests']:,}",
        )
        for reason, count in list(inference.get("failures", {}).items())[:3]:
            table.add_row("", f"{count:,} failed: {reason}")
        table.add_row(
            "tokens",
            f"{inference['prompt_tokens']:,} in, {inference['output_tokens']:,} out"
            f" ({number(inference['output_tokens_per_s'])}/s)",
        )
        for name in ("ttft_ms", "tpot_ms"):
            row = inference[name]
            text = ", ".join(f"{key} {number(value)}" for key, value in row.items())
            table.add_row(name.removesuffix("_ms").upper(), f"{text} ms")
        attainment = inference["slo_attainment"]
        table.add_row("SLO met", "-" if attainment is None else f"{attainment:.1%}")
    for name, job in report["finetune"].items():
        losses, validated = job["losses"], job["validation_losses"]
        text = f"{job['status']}, {job['steps']}/{job['total_steps']} steps, "
        text += f"{job['tokens']:,} tokens ({number(job['tokens_per_s'])}/s)"
        if losses:
            text += f", loss {losses[0]:.3f} → {losses[-1]:.3f}"
        if validated:
            text += f", validation loss {validated[-1][1]:.3f}"
        table.add_row(f"job {name}", text)
        if job["reason"]:
            table.add_row("", job["reason"])
        if job["adapter_dir"]:
            table.add_row("", f"adapter: {job['adapter_dir']}")
    host = engine["host_ms_per_step"]
    table.add_row(
        "engine",
        f"{engine['device']}, {engine['wall_s']:.1f} s, {engine['steps']:,} steps, host "
        f"{host['p50']:.2f} ms a step, {engine['recompiles_after_warmup']} recompilations, "
        f"{engine['peak_memory_bytes'] / 2**20:,.0f} MiB at most",
    )
    return table


def number(value: float | None) -> str:
    """A measured value with three digits or so; - for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
