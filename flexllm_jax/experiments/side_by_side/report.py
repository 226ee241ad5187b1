"""A comparison as a table and as a plot: medians of the rounds, and every round's dot."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from flexllm_jax.experiments.side_by_side.workload import EpochWorkload, Workload


def show(workload: Workload, result: dict[str, Any], console: Console) -> None:
    """Print the result as a table."""
    table = Table(title=f"{workload.title}, medians")
    for column in ("", "transformers + PEFT", "flexllm_jax", "ours ÷ theirs", "target"):
        table.add_column(column, justify="right" if column else "left")
    for kind in ("finetune", "decode"):
        r = result[kind]
        cells = (f"{median(r['theirs']):.1f}", f"{median(r['ours']):.1f}", f"{r['ratio']:.2f}")
        target = workload.targets.get(kind)
        table.add_row(f"{kind} tokens/s", *cells, f">= {target}" if target else "")
    console.print(table)
    both = result["coserving"]
    console.print(
        f"co-serving: {both['together_s']:.1f} s together, {both['sequential_s']:.1f} s one after "
        f"the other; {both['finetune_tokens_per_s_beside_requests']:.0f} finetuning tokens/s "
        f"beside requests; TPOT {both['tpot_ms_coserved']:.1f} ms "
        f"(alone {both['tpot_ms_alone']:.1f} ms)"
    )


def plot(result: dict[str, Any], file: Path) -> None:
    """Ours beside theirs, and together beside one after the other."""
    matplotlib.use("agg")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, kind in zip(axes, ("finetune", "decode"), strict=False):
        for i, side in enumerate(("theirs", "ours")):
            values = result[kind][side]
            _bar(axis, i, median(values), values, ours=side == "ours")
        axis.set_xticks([0, 1], ["transformers\n+ PEFT", "flexllm_jax"])
        axis.set_title(f"{kind}, tokens/s (ratio {result[kind]['ratio']:.2f})")
    both = result["coserving"]
    names = ["one after\nthe other", "co-served"]
    axes[2].bar(names, [both["sequential_s"], both["together_s"]], color="#2f6fb0", width=0.6)
    axes[2].set_title("requests and job, seconds")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _bar(axis: Any, place: int, height: float, rounds: list[float], *, ours: bool) -> None:
    """A side's bar, with a dot for every round."""
    axis.bar(place, height, color="#2f6fb0" if ours else "#9aa5b1", width=0.6)
    axis.plot([place] * len(rounds), rounds, ".", color="black", markersize=4)


def write_result(result: dict[str, Any], file: Path) -> None:
    """A comparison as JSON, with the machine and the versions that it is of."""
    packages = ("jax", "flax", "torch", "transformers", "peft")
    environment = {"machine": platform.machine(), "versions": {p: version(p) for p in packages}}
    whole = result | {"environment": environment}
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def show_epoch(workload: EpochWorkload, result: dict[str, Any], console: Console) -> None:
    """Print an epoch's result as a table."""
    table = Table(
        title=f"{workload.title}, {result['rows']} rows, {result['tokens']:,} tokens, "
        f"{result['tokens_that_count']:,} of them in the loss"
    )
    for column in ("", "seconds", "tokens in the loss per s", "mean loss", "ours ÷ theirs"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in result["seconds"].items():
        ratio = result["ratio"].get(name)
        loss = result["mean_loss"][name]
        table.add_row(
            name,
            f"{seconds:.1f}",
            f"{result['tokens_that_count'] / seconds:.0f}",
            f"{sum(loss) / len(loss):.3f}",
            f"{ratio:.2f}" if ratio else "",
        )
    console.print(table)


def plot_epoch(result: dict[str, Any], file: Path) -> None:
    """Tokens in the loss per second of the three: a bar for the epoch, a dot for each slice."""
    matplotlib.use("agg")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for i, (name, seconds) in enumerate(result["seconds"].items()):
        rates = result["counted_tokens_per_s"][name]
        _bar(axis, i, result["tokens_that_count"] / seconds, rates, ours=i == 0)
    axis.set_xticks(range(len(result["seconds"])), list(result["seconds"]))
    axis.set_title("tokens in the loss per second")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


_RATIOS = ("tokens_per_s", "time_to_reward", "cpu_time")


def show_answers(result: dict[str, Any], console: Console) -> None:
    """Print a comparison of learning from rewards as a table, medians of the rounds."""
    table = Table(title="learning from rewards, medians of the rounds")
    reward = result["reward"]
    for column in ("", "tokens/s", "seconds", f"seconds to {reward}", "last reward", "tokens/s ÷"):
        table.add_column(column)
    for column in (f"time to {reward} ÷", "CPU time ÷"):
        table.add_column(column)
    for name, side in result["sides"].items():
        reached = side["seconds_to_reward"]
        ratio = result["ratio"].get(name, {})
        last = [sum(rewards[-3:]) / len(rewards[-3:]) for rewards in side["rewards"]]
        table.add_row(
            name,
            f"{median(side['tokens_per_s']):.0f}",
            f"{median(side['seconds']):.1f}",
            f"{reached:.1f}" if reached else "never",
            f"{median(last):.2f}",
            *(f"{ratio[name]:.2f}" if ratio.get(name) else "" for name in _RATIOS),
        )
    console.print(table)
    gaps = ", ".join(f"{name} {value:.1e}" for name, value in result["first_step"].items())
    console.print(f"TRL's first step, computed here, differs by: {gaps}", highlight=False)
