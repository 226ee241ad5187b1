"""What a load on a server came to: counts, latencies, SLO attainment, and what grew meanwhile.

A `problem` is a request or an upload that failed or was lost, memory or file descriptors that grow
from the second to the last quarter of the load, KV pages that stay in use, or finetuning jobs that
stand still.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from flexllm_jax.experiments.load.client import Completion
from flexllm_jax.experiments.load.generator import OUTCOMES, Load
from flexllm_jax.experiments.load.server import Sample

_GROWTH = 0.05  # of resident memory from the second to the last quarter; more is a leak
_LOST_TO_JOBS = 0.01  # of the requests that are on time
_SPARE_FDS = 4  # a process may open a few on first use: a database connection, a log


def percentiles(values: list[float]) -> dict[str, float] | None:
    """p50, p90 and p99 in milliseconds."""
    if not values:
        return None
    found = np.percentile(np.array(values) * 1e3, [50, 90, 99])
    return dict(zip(("p50", "p90", "p99"), map(float, found), strict=True))


def quarter(samples: list[Sample], seconds: float, number: int, name: str) -> float:
    """The median of a quantity in a quarter of the load."""
    low, high = seconds * number / 4, seconds * (number + 1) / 4
    values = [getattr(s, name) for s in samples if low <= s.at <= high]
    return float(np.median(values)) if values else float("nan")


def make_report(
    load: Load,
    samples: list[Sample],
    before: Sample,
    after: Sample,
    slo: dict[str, float],
    tokens: Mapping[str, Mapping[str, float]] = {},
) -> dict[str, Any]:
    """`tokens`: of every job, by phase. What is written; `problems` is empty when all went well."""
    shape = load.shape
    counts = Counter(request.outcome for request in load.requests)
    done = [r for r in load.requests if r.outcome == "finished"]
    ttft = [r.ttft_s for r in done if r.ttft_s is not None]
    tpot = [r.tpot_s for r in done if r.tpot_s is not None]
    wall_s = max(samples[-1].at, shape.seconds)
    trained = [s.finetune_tokens for s in samples if s.at <= shape.seconds]
    failures = [r.why for r in load.requests if r.why]
    failures += [told for told in load.uploads if not told.startswith("file-")]
    names = list(asdict(before))[1:]
    return {
        "clients": shape.clients,
        "seconds": shape.seconds,
        "requests": {"sent": len(load.requests), **{name: counts[name] for name in OUTCOMES}},
        "uploads": {"kept": len(set(load.files)), "seconds": load.uploads_s},
        "why": Counter(failures).most_common(10),
        "output_tokens_per_s": sum(r.tokens for r in load.requests) / wall_s,
        "finetune_tokens_per_s": trained[-1] / shape.seconds,
        "ttft_ms": percentiles(ttft),
        "tpot_ms": percentiles(tpot),
        "slo": slo,
        "attainment": attainment(done, slo),
        "tokens_of_jobs": tokens,
        "turns": by_turns(load, done, slo),
        "before": asdict(before),
        "after_warm_up": {name: quarter(samples, shape.seconds, 1, name) for name in names},
        "last_quarter": {name: quarter(samples, shape.seconds, 3, name) for name in names},
        "after": asdict(after),
        "problems": list(find_problems(load, samples, before, after, slo)),
    }


def attainment(done: list[Completion], slo: dict[str, float]) -> dict[str, float | None]:
    """The share of finished requests that met each objective, and both."""
    ttft = [r.ttft_s * 1e3 <= slo["ttft_ms"] for r in done if r.ttft_s is not None]
    tpot = [r.tpot_s * 1e3 <= slo["tpot_ms"] for r in done if r.tpot_s is not None]
    both = [
        (r.ttft_s or 0) * 1e3 <= slo["ttft_ms"] and (r.tpot_s or 0) * 1e3 <= slo["tpot_ms"]
        for r in done
    ]
    met = {"ttft": ttft, "tpot": tpot, "both": both}
    return {name: float(np.mean(values)) if values else None for name, values in met.items()}


def by_turns(
    load: Load, done: list[Completion], slo: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Attainment and latencies of the requests that were answered while jobs trained, and of those
    while all were paused; empty where jobs took no turns."""
    found = {}
    for name, jobs in (("with jobs", True), ("without", False)):
        turns = [turn for turn in load.turns if turn.jobs == jobs]
        own = [r for r in done if any(turn.holds(*_span(load, r)) for turn in turns)]
        if own:
            found[name] = {
                "requests": len(own),
                "attainment": attainment(own, slo)["both"],
                "ttft_ms": percentiles([r.ttft_s for r in own if r.ttft_s is not None]),
                "tpot_ms": percentiles([r.tpot_s for r in own if r.tpot_s is not None]),
            }
    return found


def _span(load: Load, done: Completion) -> tuple[float, float]:
    """When a request was sent and answered, on the load's clock."""
    sent = done.sent - load.began
    return sent, sent + (done.ttft_s or 0.0) + (done.tpot_s or 0.0) * (done.tokens - 1)


def find_problems(
    load: Load, samples: list[Sample], before: Sample, after: Sample, slo: dict[str, float]
) -> Iterator[str]:
    """What was lost, failed or leaked."""
    seconds = load.shape.seconds
    counts = Counter(request.outcome for request in load.requests)
    for outcome in ("failed", "lost"):
        if counts[outcome]:
            yield f"{counts[outcome]} requests {outcome}"
    kept = len(set(load.files))
    if kept < load.shape.uploads:
        yield f"{load.shape.uploads - kept} of {load.shape.uploads} uploads failed"
    if after.kv_usage > before.kv_usage:
        yield f"{after.kv_usage:.1%} of the KV pages are still in use"
    if after.free_slots < before.free_slots:
        yield f"{before.free_slots - after.free_slots:.0f} slots for adapters are still in use"
    turns = by_turns(load, [r for r in load.requests if r.outcome == "finished"], slo)
    if len(turns) == 2:
        beside, alone = (turns[name]["attainment"] for name in ("with jobs", "without"))
        if beside < alone - _LOST_TO_JOBS:
            yield f"{beside:.1%} of the requests are on time with jobs, {alone:.1%} without"
    for process in ("http", "engine"):
        was, now = (getattr(s, f"{process}_fds") for s in (before, after))
        if now > was + _SPARE_FDS:
            yield f"{process}: {now} file descriptors, {was} before the load"
        second, last = (quarter(samples, seconds, q, f"{process}_rss") for q in (1, 3))
        if last > second * (1 + _GROWTH):
            yield (
                f"{process}: memory grew from {second / 2**20:.0f} MiB in the second quarter to "
                f"{last / 2**20:.0f} in the last"
            )
    trained = [s.finetune_tokens for s in samples if s.at <= seconds]
    if trained[-1] == trained[len(trained) // 4]:
        yield "no job trained after the first quarter: raise finetune.floor"


def draw(load: Load, samples: list[Sample], slo: dict[str, float], file: Path) -> None:
    """The load over time: requests, latencies, memory, file descriptors and pages."""
    matplotlib.use("agg")
    figure = Figure(figsize=(9, 13), layout="constrained")
    axes = figure.subplots(6, 1, sharex=True)
    at = np.array([s.at for s in samples])

    def line(axis: Any, values: list[float], label: str) -> None:
        axis.plot(at, values, label=label, linewidth=1.3)

    line(axes[0], [s.running for s in samples], "running")
    line(axes[0], [s.waiting for s in samples], "waiting")
    axes[0].set_ylabel("requests")
    done = [r for r in load.requests if r.outcome == "finished"]
    for axis, name in ((axes[1], "ttft"), (axes[2], "tpot")):
        times = [(r.sent - load.began, getattr(r, f"{name}_s")) for r in done]
        points = [(sent, seconds * 1e3) for sent, seconds in times if seconds is not None]
        if points:
            axis.plot(*np.array(points).T, ".", markersize=2, label="a request")
        axis.axhline(slo[f"{name}_ms"], color="#b0332f", linewidth=1, linestyle="--", label="SLO")
        axis.set_ylabel(f"{name.upper()}, ms")
    line(axes[3], [s.http_rss / 2**20 for s in samples], "HTTP process")
    line(axes[3], [s.engine_rss / 2**20 for s in samples], "engine process")
    axes[3].set_ylabel("resident MiB")
    line(axes[4], [s.http_fds for s in samples], "HTTP process")
    line(axes[4], [s.engine_fds for s in samples], "engine process")
    axes[4].set_ylabel("open files")
    line(axes[5], [s.kv_usage * 100 for s in samples], "KV pages")
    axes[5].set_ylabel("in use, %")
    axes[5].set_xlabel("seconds")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, dpi=130)


def show(report: dict[str, Any], console: Console) -> None:
    """The report on the console."""
    table = Table("", "before", "2nd quarter", "last quarter", "after")
    names = ("http_rss", "engine_rss", "http_fds", "engine_fds", "kv_usage", "free_slots")
    for name in names:
        values = [report[k][name] for k in ("before", "after_warm_up", "last_quarter", "after")]
        shown = [f"{v / 2**20:.0f} MiB" if "rss" in name else f"{v:.4g}" for v in values]
        table.add_row(name, *shown)
    console.print(table)
    for name in ("requests", "uploads", "ttft_ms", "tpot_ms", "attainment"):
        values = report[name] or {}
        parts = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
        console.print(f"{name}: {', '.join(parts)}", highlight=False)
    for name, own in report["turns"].items():
        times = (f"{kind} p50/p99 {t['p50']:.1f}/{t['p99']:.1f}" for kind, t in _times(own))
        console.print(
            f"{name}: {own['requests']} requests, {own['attainment']:.2%} on time, "
            + ", ".join(times),
            highlight=False,
        )
    for job, tokens in report["tokens_of_jobs"].items():
        parts = ", ".join(f"{phase} {count:.0f}" for phase, count in tokens.items())
        console.print(f"{job}: tokens {parts}", highlight=False)
    for name in ("output_tokens_per_s", "finetune_tokens_per_s"):
        console.print(f"{name}: {report[name]:.0f}", highlight=False)
    for why, count in report["why"]:
        console.print(f"{count} x {why}", highlight=False)
    console.print("problems: " + ("; ".join(report["problems"]) or "none"), highlight=False)


def _times(told: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return [(kind, told[kind]) for kind in ("ttft_ms", "tpot_ms") if told[kind]]
