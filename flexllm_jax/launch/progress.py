"""Live progress of a run on stderr: bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from flexllm_jax.launch.replay import Replay
from flexllm_jax.launch.run import Run, judged_by
from flexllm_jax.launch.summary import number
from flexllm_jax.llm import JobHandle

_REFRESH_S = 0.25
_LINE_S = 5.0


class ProgressDisplay:
    """Shows a run while it goes on; a context manager."""

    def __init__(self):
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._shown = 0.0
        self._run: Run | None = None

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._live.start()
        self._shown = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal and self._run:
            self._live.update(_table(self._run), refresh=True)  # as it ended
        self._live.stop()

    def update(self, run: Run) -> None:
        """Show how far the run is, unless it was just shown."""
        self._run = run
        now = time.monotonic()
        if now - self._shown < (_REFRESH_S if self._console.is_terminal else _LINE_S):
            return
        self._shown = now
        if self._console.is_terminal:
            self._live.update(_table(run), refresh=True)
        else:
            self._console.print(_line(run), soft_wrap=True, highlight=False)


def _table(run: Run) -> Table:
    table = Table.grid(padding=(0, 2))
    if run.replay:
        bar = ProgressBar(total=run.replay.total, completed=len(run.replay.timings), width=30)
        table.add_row("requests", bar, _requests(run.replay))
        table.add_row("", "", _latencies(run.replay))
    for job in run.jobs:
        bar = ProgressBar(total=job.total_steps, completed=job.steps, width=30)
        table.add_row(job.name, bar, _job(job))
    return table


def _line(run: Run) -> str:
    parts = [f"{run.wall_s:6.0f} s"]
    if run.replay:
        parts.append(f"requests {_requests(run.replay)}, {_latencies(run.replay)}")
    parts += [f"{job.name} {_job(job)}" for job in run.jobs]
    return " | ".join(parts)


def _requests(replay: Replay) -> str:
    text = f"{len(replay.timings) - replay.failed}/{replay.total} done, "
    text += f"{replay.running} running, {replay.waiting} waiting"
    return text + (f", {replay.failed} failed" if replay.failed else "")


def _latencies(replay: Replay) -> str:
    texts = []
    for name in ("ttft", "tpot"):
        values = [v for t in replay.timings if (v := getattr(t, f"{name}_s")) is not None]
        p50, p99 = np.percentile(values, [50, 99]) * 1e3 if values else (None, None)
        texts.append(f"{name.upper()} p50 {number(p50)} p99 {number(p99)} ms")
    return ", ".join(texts)


def _job(job: JobHandle) -> str:
    text = f"{job.status}, " if job.status != "running" else ""
    text += f"step {job.steps}/{job.total_steps}"
    measure = judged_by(job)
    if job.metrics:
        text += f", {measure} {job.metrics[-1][measure]:.3f}"
    if job.validations:
        text += f", validation {measure} {job.validations[-1][1][measure]:.3f}"
    text += f", {number(job.tokens_per_s)} tokens/s"
    if job.status == "running" and job.eta_s is not None:
        text += f", {_duration(job.eta_s)} left"
    return text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
