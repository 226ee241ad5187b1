"""Tables and plots of simulations, alone or side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from flexllm_jax.experiments.simulation.simulate import Simulation

PALETTE = ("#d9822b", "#2f6fb0", "#3a8f5c", "#8457a8", "#b0332f", "#7a6a58", "#4aa3a3", "#c2577e")


def figures(report: dict[str, Any]) -> dict[str, float | None]:
    """What runs are compared by, from a report of an engine or of a simulation."""
    inference = report["inference"]
    finetune = [job["tokens_per_s"] for job in report["finetune"].values()]
    return {
        "slo_attainment": inference["slo_attainment"],
        "finetune_tokens_per_s": sum(finetune),
        "output_tokens_per_s": inference["output_tokens_per_s"],
        "tpot_mean_ms": inference["tpot_ms"]["mean"],
        "tpot_p99_ms": inference["tpot_ms"]["p99"],
        "ttft_mean_ms": inference["ttft_ms"]["mean"],
        "ttft_p99_ms": inference["ttft_ms"]["p99"],
    }


def comparison_table(rows: Iterable[tuple[str, Mapping[str, Any]]], title: str = "") -> Table:
    """A line for each run of `figures`; rates are tokens per second."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("run", no_wrap=True)
    for heading in ("SLO met", "finetune/s", "output/s", "TPOT ms", "p99", "TTFT ms", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, row in rows:
        attainment = row["slo_attainment"]
        table.add_row(
            label,
            "-" if attainment is None else f"{attainment:.2%}",
            _number(row["finetune_tokens_per_s"]),
            _number(row["output_tokens_per_s"]),
            *(_number(row[f"{name}_ms"]) for name in ("tpot_mean", "tpot_p99")),
            *(_number(row[f"{name}_ms"]) for name in ("ttft_mean", "ttft_p99")),
        )
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def plot_series(runs: Mapping[str, Simulation], file: Path, bin_s: float = 5.0) -> None:
    """Arrivals, and output and finetuning tokens per second over time, of one run or several."""
    matplotlib.use("agg")
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    names = ("arrivals_per_s", "output_tokens_per_s", "finetune_tokens_per_s")
    labels = ("requests/s", "output tokens/s", "finetuning tokens/s")
    for colour, (label, run) in zip(PALETTE, runs.items(), strict=False):
        series = run.series(bin_s)
        at = series["at_s"] - bin_s
        for axis, name in zip(axes, names, strict=True):
            if axis is axes[0]:
                if label == next(iter(runs)):
                    axis.step(at, series[name], where="post", color="#555555", linewidth=1.2)
            else:
                axis.step(at, series[name], where="post", color=colour, linewidth=1.4, label=label)
    for axis, text in zip(axes, labels, strict=True):
        axis.set_ylabel(text)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[-1].set_xlabel(f"seconds (bins of {bin_s:g} s)")
    figure.savefig(file, dpi=130)


def plot_sweep(
    rows: list[dict[str, Any]], file: Path, title: str, xlabel: str = "requests/s"
) -> None:
    """SLO attainment, finetuning and output tokens/s over the load: a column for each panel, a line
    for each system, as figures 10 and 11 of the paper. A row has panel, system, x and `figures`."""
    matplotlib.use("agg")
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    figure = Figure(figsize=(4.2 * len(panels) + 2.6, 7.5), layout="constrained")
    axes = figure.subplots(3, len(panels), sharex="col", squeeze=False)
    measures = {
        "slo_attainment": "SLO attainment, %",
        "finetune_tokens_per_s": "finetuning tokens/s",
        "output_tokens_per_s": "output tokens/s",
    }
    for column, panel in enumerate(panels):
        for line, (name, text) in enumerate(measures.items()):
            axis = axes[line][column]
            for index, system in enumerate(systems):
                points = [
                    (row["x"], row[name] * (100 if name == "slo_attainment" else 1))
                    for row in rows
                    if (row["panel"], row["system"]) == (panel, system) and row[name] is not None
                ]
                if not points:
                    continue
                colour = PALETTE[index % len(PALETTE)]
                style = "-" if index < len(PALETTE) else "--"
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    marker="o",
                    markersize=4,
                    color=colour,
                    label=system,
                    linewidth=2.2 if index == 0 else 1.4,
                )
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(text)
        axes[0][column].set_title(panel)
        axes[-1][column].set_xticks(sorted({row["x"] for row in rows if row["panel"] == panel}))
        axes[-1][column].set_xlabel(xlabel)
    axes[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title)
    figure.savefig(file, dpi=130)
