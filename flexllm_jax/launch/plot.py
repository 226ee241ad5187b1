"""`report.png`: a run over time: throughput, latencies against their objectives, losses or
rewards of jobs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexllm_jax.launch.run import Run, judged_by

INFERENCE, FINETUNING, OBJECTIVE = "#2f6fb0", "#d9822b", "#b0332f"
_BINS = 60


def write_plot(run: Run, out_dir: Path) -> Path:
    """Draw the run, which has ended; panels for what it did not do are left out."""
    matplotlib.use("agg")
    panels = [_throughput]
    if run.replay:
        panels += [_ttft, _tpot]
    measures = {judged_by(job) for job in run.jobs if job.metrics}
    panels += [partial(_learning, measure=measure) for measure in sorted(measures)]
    figure = Figure(figsize=(9, 2.3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for draw, axis in zip(panels, axes, strict=True):
        draw(axis, run)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=min(0, axis.dataLim.ymin))
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0, max(run.wall_s, 1e-3))
    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / "report.png"
    figure.savefig(file, dpi=130)
    return file


def _throughput(axis: Axes, run: Run) -> None:
    """Tokens per second, over intervals long enough to hold several steps of each kind."""
    at = np.array([0.0, *(sample.at for sample in run.samples)])
    edges = np.linspace(0, run.wall_s, min(_BINS, max(2, len(at) // 2)))
    series = {}
    if run.replay:
        series["inference"] = (INFERENCE, [sample.output_tokens for sample in run.samples])
    if run.jobs:
        series["finetuning"] = (FINETUNING, [sample.finetune_tokens for sample in run.samples])
    for name, (colour, tokens) in series.items():
        done = np.interp(edges, at, [0, *tokens])
        axis.stairs(np.diff(done) / np.diff(edges), edges, color=colour, label=name, linewidth=1.5)
    axis.set_ylabel("tokens/s")


def _ttft(axis: Axes, run: Run) -> None:
    _latency(axis, run, "ttft_s", run.llm.engine.slos["standard"].ttft_s)


def _tpot(axis: Axes, run: Run) -> None:
    _latency(axis, run, "tpot_s", run.llm.engine.slos["standard"].tpot_s)


def _latency(axis: Axes, run: Run, name: str, objective_s: float) -> None:
    """A dot for every request, where it arrived."""
    timings = run.replay.timings if run.replay else []
    points = [(t.arrival - run.started, v) for t in timings if (v := getattr(t, name)) is not None]
    if points:
        at, seconds = np.array(points).T
        axis.plot(at, seconds * 1e3, ".", color=INFERENCE, markersize=5)
    axis.axhline(objective_s * 1e3, color=OBJECTIVE, linewidth=1, linestyle="--", label="SLO")
    axis.set_ylabel(f"{name.removesuffix('_s').upper()}, ms")


def _learning(axis: Axes, run: Run, measure: str) -> None:
    """The loss or reward of every optimizer step of this run, and of the validations among them."""
    for job in run.jobs:
        times = np.array(job.step_times) - run.started
        if not times.size or judged_by(job) != measure:
            continue
        values = [metrics[measure] for metrics in job.metrics]
        first = len(values) - len(times)
        (line,) = axis.plot(times, values[first:], linewidth=1.3, label=job.name)
        validated = [
            (times[step - first - 1], found[measure])
            for step, found in job.validations
            if step > first
        ]
        if validated:
            axis.plot(*np.array(validated).T, "o", color=line.get_color(), label="validation")
    axis.set_ylabel(measure)
