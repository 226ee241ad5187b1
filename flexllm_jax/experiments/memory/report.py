"""Tables and plots of the experiment on memory (`activation_memory`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from flexllm_jax.experiments.memory.activations import STAGES, MemoryCaseSection

Row = dict[str, Any]
SHORT = dict(zip(STAGES, ("none", "pruned", "+ remat.", "+ token-level"), strict=True))
OURS, PAPER, KV = "#2f6fb0", "#b9b9b9", "#173a5e"


def panels(rows: list[Row]) -> list[tuple[str, int, str]]:
    """Model, tokens and bypass of each panel, in order."""
    return list(dict.fromkeys((row["model"], row["tokens"], row["bypass"]) for row in rows))


def stages_of(rows: list[Row], panel: tuple[str, int, str]) -> list[Row]:
    """The rows of a panel, by stage."""
    own = [row for row in rows if (row["model"], row["tokens"], row["bypass"]) == panel]
    return [row for stage in STAGES for row in own if row["stage"] == stage]


def memory_table(rows: list[Row], title: str) -> Table:
    """GB by stage, a line for each panel, the paper's in brackets."""
    table = Table(title=title)
    columns = ("of it KV", "of it states", "KB/token", "GFLOP/token again")
    for column in ("model", "tokens", "bypass", *SHORT.values(), *columns):
        table.add_column(column, justify="left" if column in ("model", "bypass") else "right")
    for panel in panels(rows):
        own = stages_of(rows, panel)
        cells = dict.fromkeys(STAGES, "")
        cells |= {row["stage"]: f"{row['bytes'] / 1e9:.2f}" + _paper(row) for row in own}
        last = own[-1]
        table.add_row(
            panel[0],
            f"{panel[1]:,}",
            panel[2],
            *cells.values(),
            f"{last['kv'] / 1e9:.2f}",
            f"{last['states'] / 1e9:.2f}",
            f"{last['bytes'] / panel[1] / 1e3:.0f}",
            f"{last['recomputed_flops_per_token'] / 1e9:.1f}",
        )
    return table


def _paper(row: Row) -> str:
    return f" ({row['paper_bytes'] / 1e9:.1f})" if row["paper_bytes"] else ""


def parts_table(row: Row) -> Table:
    """Everything in memory, GB by purpose."""
    table = Table(title=f"{row['model']}, {row['tokens']:,} tokens, {row['bypass']}: GB in memory")
    table.add_column("")
    sides = row["parts"]
    for side in sides:
        table.add_column(side, justify="right")
    for name in dict.fromkeys(name for parts in sides.values() for name in parts):
        cells = [f"{parts[name] / 1e9:.2f}" if name in parts else "" for parts in sides.values()]
        table.add_row(name, *cells)
    table.add_row("sum", *(f"{sum(parts.values()) / 1e9:.2f}" for parts in sides.values()))
    return table


def conclusions(case: MemoryCaseSection, rows: list[Row]) -> Iterator[str]:
    """What became of a case's targets, a line each."""
    for row in rows:
        what = f"{row['model']}, {row['tokens']:,} tokens, {row['bypass']}"
        if row["stage"] == STAGES[-1] and case.target_gb is not None:
            met = "met" if row["bytes"] <= case.target_gb * 1e9 else "NOT met"
            yield (
                f"{what}: {row['bytes'] / 1e9:.2f} GB with everything on, "
                f"target {case.target_gb:g}: {met}"
            )
        if "parts" in row and case.target_saved is not None:
            separate, ours = (sum(parts.values()) for parts in row["parts"].values())
            saved = 1 - ours / separate
            met = "met" if saved >= case.target_saved else "NOT met"
            yield (
                f"{what}: {ours / 1e9:.1f} GB in memory instead of {separate / 1e9:.1f}: "
                f"{saved:.1%} less, target {case.target_saved:.0%}: {met}"
            )


def plot_memory(rows: list[Row], file: Path, title: str) -> None:
    """Bars of each panel's stages, with keys and values apart; the paper's beside ours."""
    matplotlib.use("agg")
    shown = panels(rows)
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.4 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, shown, strict=False):
        own = stages_of(rows, panel)
        paper = any(row["paper_bytes"] for row in own)
        width = 0.4 if paper else 0.65
        largest = max(max(row["bytes"], row["paper_bytes"] or 0) for row in own) / 1e9
        for row in own:
            at, first = STAGES.index(row["stage"]), row is own[0]
            ours = at - width / 2 if paper else at
            kv, total = row["kv"] / 1e9, row["bytes"] / 1e9
            axis.bar(ours, total - kv, width, bottom=kv, color=OURS, label=_once(first, "ours"))
            axis.bar(ours, kv, width, color=KV, label=_once(first, "of it keys and values"))
            _label(axis, ours, total)
            if row["paper_bytes"]:
                theirs = row["paper_bytes"] / 1e9
                axis.bar(at + width / 2, theirs, width, color=PAPER, label=_once(first, "paper"))
                _label(axis, at + width / 2, theirs)
        axis.set_title(f"{panel[0]}, {panel[1]:,} tokens, {panel[2]}", fontsize=10)
        axis.set_xticks(range(len(STAGES)), list(SHORT.values()), fontsize=8)
        axis.set_ylim(0, largest * 1.14)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("GB")
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=130)


def _once(first: bool, label: str) -> str | None:
    return label if first else None


def _label(axis: Any, at: float, value: float) -> None:
    text = f"{value:.0f}" if value >= 20 else f"{value:.1f}"
    axis.annotate(text, (at, value), (0, 2), textcoords="offset points", ha="center", fontsize=8)
