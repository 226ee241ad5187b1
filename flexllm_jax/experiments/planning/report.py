"""A plan as JSON, as a table, and as a plot."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from flexllm_jax.experiments.planning.advice import Advice
from flexllm_jax.experiments.planning.engine import PlannedEngine
from flexllm_jax.experiments.simulation.report import PALETTE

_GB = 1e9


@dataclass(frozen=True)
class Plan:
    """An engine, and what it would do. Without room for it there are no speeds and no load.

    times: of steps (`load.step_times`). finetuning: tokens/s of a job alone. load: results by
    number of engines, ascending (`load.size_fleet`). refused: requests that are too long. target:
    the SLO attainment to reach.
    """

    name: str
    engine: PlannedEngine
    times: dict[str, float]
    finetuning: float | None
    load: list[dict[str, Any]]
    requests: int
    refused: int
    target: float
    advice: list[Advice]

    @property
    def enough(self) -> dict[str, Any] | None:
        """The result of the fewest engines that reach the target; None if none was found."""
        met = (row for row in self.load if (row["slo_attainment"] or 0.0) >= self.target)
        return next(met, None)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        engine, enough = self.engine, self.enough
        return {
            "configuration": self.name,
            "device": engine.device.device_kind,
            "devices": engine.sizes.devices,
            "fits": engine.fits,
            "problem": engine.problem,
            "memory": {
                "available_bytes": engine.available,
                "parts": engine.parts,
                "jobs": engine.jobs,
                "page_bytes": engine.page_bytes,
                "num_pages": engine.num_pages,
                "kv_tokens": engine.kv_tokens,
                "saved": engine.saved,
            },
            "steps": self.times,
            "finetune_tokens_per_s_alone": self.finetuning,
            "requests": self.requests,
            "refused": self.refused,
            "slo": engine.config.scheduler.slo.model_dump(),
            "slo_target": self.target,
            "load": self.load,
            "devices_needed": enough["devices"] if enough else None,
            "would_help": [
                {
                    "change": one.change,
                    "kv_tokens": one.planned.kv_tokens,
                    "devices": one.planned.sizes.devices,
                    "finetune_tokens_per_s_alone": one.finetuning,
                }
                for one in self.advice
            ],
        }


def print_plan(plan: Plan, console: Console) -> None:
    """On the terminal."""
    engine = plan.engine
    verdict = "fits" if engine.fits else "does not fit"
    each = f" each of {engine.sizes.devices}" if engine.sizes.devices > 1 else ""
    console.print(Text(f"{plan.name} on{each} {engine.device.device_kind}: {verdict}", "bold"))
    if engine.problem:
        console.print(Text(engine.problem), soft_wrap=True)
    parts = [_memory(engine)]
    if plan.times:
        parts.append(_speed(plan))
    if plan.load:
        parts.append(_load(plan))
    if plan.advice:
        parts.append(_advice(plan))
    console.print(Group(*parts))
    for line in conclusions(plan):
        console.print(Text(line), soft_wrap=True)


def conclusions(plan: Plan) -> list[str]:
    """What the numbers come to, a line each."""
    lines = []
    if plan.refused:
        most = min(plan.engine.sizes.max_model_len, plan.engine.kv_tokens)
        lines.append(
            f"{plan.refused:,} of {plan.requests:,} requests are longer than the {most:,} tokens "
            f"that an engine takes, and are left out: raise model.max_model_len"
        )
    if plan.load:
        enough, target = plan.enough, f"{plan.target:.0%} of the requests within their objective"
        if enough is None:
            most = plan.load[-1]["devices"]
            lines.append(f"{most} GPUs do not answer {target}: no number of them may, at this SLO")
        else:
            lines.append(
                f"{enough['devices']} GPU{'s' * (enough['devices'] > 1)} for {target}, with "
                f"{enough['finetune_tokens_per_s']:,.0f} finetuning tokens/s beside them"
            )
    if not plan.engine.fits and not plan.advice:
        lines.append("no single change makes it fit: take a larger device or a smaller model")
    return lines


def _memory(engine: PlannedEngine) -> Table:
    table = _table(f"memory, GB of {engine.available / _GB:.1f}", "what", "GB")
    for name, size in engine.parts.items():
        label = f"{engine.jobs} job{'s' * (engine.jobs != 1)}" if name == "jobs" else name
        if name == "finetuning":
            label += f" ({', '.join(engine.saved)} of {engine.sizes.finetune_slots:,} tokens)"
        table.add_row(label, f"{size / _GB:.2f}")
    pages = f"{engine.num_pages:,} KV pages, {engine.kv_tokens:,} tokens"
    table.add_row(pages, f"{engine.num_pages * engine.page_bytes / _GB:.2f}")
    return table


def _speed(plan: Plan) -> Table:
    table = _table("predicted speed", "what", "is")
    for name, value in plan.times.items():
        milliseconds = name.endswith("_ms")
        text = name.removesuffix("_ms").removesuffix("_tokens_per_s").replace("_", " ")
        table.add_row(text, f"{value:,.1f} ms" if milliseconds else f"{value:,.0f} tokens/s")
    if plan.finetuning is not None:
        table.add_row("finetuning alone", f"{plan.finetuning:,.0f} tokens/s")
    return table


def _load(plan: Plan) -> Table:
    slo = plan.engine.config.scheduler.slo
    title = f"{plan.requests - plan.refused:,} requests, TPOT {slo.tpot_ms:g} and TTFT "
    columns = ("GPUs", "SLO met", "TPOT ms", "p99", "TTFT ms", "p99", "output/s", "finetuning/s")
    table = _table(f"{title}{slo.ttft_ms:g} ms, a job on each engine", *columns)
    for row in plan.load:
        table.add_row(
            str(row["devices"]),
            "-" if row["slo_attainment"] is None else f"{row['slo_attainment']:.1%}",
            *(_number(row[f"{name}_ms"]) for name in ("tpot_mean", "tpot_p99")),
            *(_number(row[f"{name}_ms"]) for name in ("ttft_mean", "ttft_p99")),
            _number(row["output_tokens_per_s"]),
            _number(row["finetune_tokens_per_s"]),
        )
    return table


def _advice(plan: Plan) -> Table:
    columns = ("change", "GPUs", "KV tokens", "finetuning alone, tokens/s")
    table = _table("what would help" if plan.engine.fits else "what makes it fit", *columns)
    for one in plan.advice:
        table.add_row(
            one.text,
            str(one.planned.sizes.devices),
            f"{one.planned.kv_tokens:,}",
            _number(one.finetuning),
        )
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", min_width=60)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def plot_plan(plan: Plan, file: Path) -> None:
    """The memory of a device, and, of the load, attainment and finetuning over the GPUs."""
    matplotlib.use("agg")
    columns = 3 if plan.load else 1
    figure = Figure(figsize=(3.2 + 3.8 * columns, 4.4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    _plot_memory(plan.engine, axes[0])
    if plan.load:
        devices = [row["devices"] for row in plan.load]
        attained = [100 * (row["slo_attainment"] or 0.0) for row in plan.load]
        tuned = [row["finetune_tokens_per_s"] for row in plan.load]
        for axis, values, label in (
            (axes[1], attained, "requests within their objective, %"),
            (axes[2], tuned, "finetuning beside them, tokens/s"),
        ):
            axis.plot(devices, values, marker="o", color=PALETTE[1], linewidth=2)
            axis.set_xlabel("GPUs")
            axis.set_ylabel(label)
            axis.set_xticks(devices)
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
        axes[1].axhline(100 * plan.target, color="#888888", linewidth=1, linestyle="--")
        axes[1].set_ylim(top=104)
    figure.suptitle(f"{plan.name} on {plan.engine.device.device_kind}")
    figure.savefig(file, dpi=130)


def _plot_memory(engine: PlannedEngine, axis: Axes) -> None:
    sizes = {**engine.parts, "KV pages": engine.num_pages * engine.page_bytes}
    bottom = 0.0
    colours = dict(zip(sizes, itertools.cycle(PALETTE), strict=False))
    for name, size in sizes.items():
        axis.bar(0, size / _GB, bottom=bottom, color=colours[name], width=0.6, label=name)
        bottom += size / _GB
    axis.axhline(engine.available / _GB, color="#333333", linewidth=1.2, linestyle="--")
    axis.set_xlim(-0.5, 0.5)
    axis.set_xticks([])
    axis.set_ylabel("memory of a device, GB (dashed: its limit)")
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1], labels[::-1], frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
