"""What was measured of an engine under load (`serving`), beside what would have been predicted of
it without a GPU (`planning`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from flexllm_jax.config import load_config
from flexllm_jax.experiments.gpu.serving import requests_at
from flexllm_jax.experiments.planning.engine import CHIPS, plan_engine
from flexllm_jax.experiments.planning.load import (
    Job,
    finetuning_alone,
    simulate_load,
    split_arrivals,
    step_times,
)

_LOADS = ("finetune_tokens_per_s", "tpot_mean_ms", "ttft_mean_ms", "slo_attainment")
Row = tuple[str, float, float]


def predict(
    measured: dict[str, Any],
    config: Path,
    *,
    overrides: Sequence[str] = (),
    trace: Path | None = None,
    seconds: float = 30.0,
) -> list[Row]:
    """Name, prediction and measurement of every figure of a `serve.json`; the arguments are those
    that it was measured with."""
    given = load_config(config, overrides)
    chip = {spec.name: chip for chip, spec in CHIPS.items()}[measured["device"]]
    planned, alone = plan_engine(given, chip), measured["finetuning alone"]
    job = Job(alone["sequence"], cv=0.0, batch=alone.get("batch", 1))
    rows: list[Row] = []
    if base := measured.get("adapters/0"):
        times = step_times(planned, 1024 + base["steps"] // 2, rows=[64])
        rows.append(("decode_64_rows_ms", times["decode_64_rows_ms"], base["step_ms"]))
        prefill = times["prefill_tokens_per_s"], base["prefill_tokens_per_s"]
        rows.append(("prefill_tokens_per_s", *prefill))
    rows.append(
        (
            "finetuning alone: finetune_tokens_per_s",
            finetuning_alone(planned, job),
            alone["tokens_per_s"],
        )
    )
    for name, noted in measured.items():
        if not name.startswith("load/"):
            continue
        rate = float(name.removeprefix("load/"))
        arrivals, _ = split_arrivals(planned, requests_at(given, trace, rate, seconds))
        figures = simulate_load(planned, arrivals, 1, job, until=noted["wall_s"])
        rows += [
            (f"{rate:g} requests/s: {figure}", figures[figure], noted["measured"][figure])
            for figure in _LOADS
        ]
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Predicted beside measured."""
    made = Table("figure", "predicted", "measured", "predicted ÷ measured")
    for column in made.columns[1:]:
        column.justify = "right"
    for name, predicted, measured in rows:
        cells = (
            f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in (predicted, measured)
        )
        made.add_row(name, *cells, f"{predicted / measured:.2f}")
    return made


def plot(rows: Sequence[Row], paper: Sequence[dict[str, Any]], file: Path) -> None:
    """Finetuning tokens/s and TPOT by request rate. `paper`: the paper's rows for the same model,
    as `docs/results/paper_rows` has them."""
    matplotlib.use("agg")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    by_figure: dict[str, list[tuple[float, float, float]]] = {}
    for name, predicted, measured in rows:
        rate, _, what = name.partition(" requests/s: ")
        if what:
            by_figure.setdefault(what, []).append((float(rate), predicted, measured))
    axes = figure.subplots(1, 2)
    labels = ("finetuning tokens/s", "mean TPOT, ms")
    for axis, what, label in zip(
        axes, ("finetune_tokens_per_s", "tpot_mean_ms"), labels, strict=True
    ):
        rates, predicted, measured = zip(*by_figure[what], strict=True)
        axis.plot(rates, measured, "o-", color="#2f6fb0", label="measured")
        axis.plot(rates, predicted, "s--", color="#9aa5b1", label="predicted")
        rates, published = [row["rate"] for row in paper], [row[f"paper_{what}"] for row in paper]
        axis.plot(rates, published, "^:", color="#7a6a58", label="the paper, one A100")
        axis.set(xlabel="requests per second", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    alone = next((row for row in rows if row[0].startswith("finetuning alone")), None)
    if alone:
        axes[0].axhline(alone[2], color="#d9822b", linewidth=1)
        axes[0].annotate("measured, no requests", (6, alone[2]), va="bottom", color="#d9822b")
    for axis in axes:
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axes[1].legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=150)
