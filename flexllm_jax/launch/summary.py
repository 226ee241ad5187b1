"""The end of a script's run: report and plot are written, and what they say is told in short."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import get_console
from rich.table import Table

from flexllm_jax.config.cli import INTERRUPTED
from flexllm_jax.launch.plot import write_plot
from flexllm_jax.launch.report import make_report, write_report
from flexllm_jax.launch.run import Run

_REASONS = 5  # most reasons of failed requests to tell; the report has all


def conclude(run: Run, *, interrupted: bool) -> int:
    """Write the report and the plot of a closed run and tell what they say; returns the exit
    status."""
    out_dir = run.llm.config.output_dir
    report = make_report(run)
    files = write_report(report, out_dir), write_plot(run, out_dir)
    console = get_console()
    console.print(summary_table(report))
    for problem in problems(report):
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {files[0]}, {files[1]}", soft_wrap=True)
    if interrupted:
        return INTERRUPTED
    return 1 if any(job.status == "failed" for job in run.jobs) else 0


def problems(report: dict[str, Any]) -> Iterator[str]:
    """What did not go as wished, a line each."""
    failures = report["inference"].get("failures", {})
    for reason, count in list(failures.items())[:_REASONS]:
        yield f"{count:,} failed: {reason}"
    if len(failures) > _REASONS:
        yield f"and {len(failures) - _REASONS:,} more reasons, which report.json has"
    for name, job in report["finetune"].items():
        yield from (f"job {name}: {text}" for text in [*job["messages"], job["reason"]] if text)


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
        if losses and not job["samples"]:
            text += f", loss {losses[0]:.3f} → {losses[-1]:.3f}"
        if validated:
            text += f", validation loss {validated[-1][1]:.3f}"
        table.add_row(f"job {name}", text)
        if job["samples"]:
            table.add_row("", _rewards(job))
        if measured := _measured(job):
            table.add_row("", measured)
        if job["adapter_dir"]:
            table.add_row("", f"adapter: {job['adapter_dir']}")
    host = engine["host_ms_per_step"]
    table.add_row(
        "engine",
        f"{engine['device']}, {engine['wall_s']:.1f} s, {engine['steps']:,} steps, host "
        f"{host['p50']:.2f} ms a step, {engine['recompiles_after_warmup']} recompilations, "
        f"{engine['padding']['share']:.0%} padding, "
        f"{engine['peak_memory_bytes'] / 2**20:,.0f} MiB at most",
    )
    return table


def _rewards(job: dict[str, Any]) -> str:
    """What a reinforcement job has learnt, and with what it was done at once."""
    metrics, validations = job["metrics"], job["validations"]
    text = f"reward {number(metrics[0]['reward'])} → {number(metrics[-1]['reward'])}"
    if validations:
        rewards = [number(v["reward"]) for v in validations]
        text += f", in validation {' → '.join(rewards[:1] + rewards[1:][-1:])}"
    drift = sum(m["kl_sampler"] for m in metrics) / len(metrics)
    text += f"; KL of sampler and trainer {round(drift, 6) + 0.0:.6f}"
    seconds = job["tokens"] / job["tokens_per_s"] if job["tokens_per_s"] else 0.0
    if seconds:
        said = number(job["sampled_tokens"] / seconds)
        text += f"; {said} tokens/s answered, {number(job['tokens_per_s'])} trained"
    return text


def _measured(job: dict[str, Any]) -> str:
    """What else the job's method reports, of the last step and the last validation."""
    last = {"": job["metrics"][-1:], "validation ": job["validations"][-1:]}
    own = ("loss", "reward", "gradient_norm", "step", "kl_sampler")
    return ", ".join(
        f"{when}{name.replace('_', ' ')} {number(value)}"
        for when, entries in last.items()
        for entry in entries
        for name, value in entry.items()
        if name not in own
    )


def number(value: float | None) -> str:
    """A measured value with three digits or so; - for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
