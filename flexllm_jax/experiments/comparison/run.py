"""The parts of an experiment, run one after the other: each prints its tables, draws its plots and
returns its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from flexllm_jax.config.cli import message_console
from flexllm_jax.experiments.comparison.engine_runs import oracle_row, run_engine, simulated_twin
from flexllm_jax.experiments.comparison.experiment import (
    BenchmarkConfig,
    EngineExperiment,
    SimulatedExperiment,
)
from flexllm_jax.experiments.memory import report as memory_report
from flexllm_jax.experiments.memory.activations import Compiler, MemorySection, measure
from flexllm_jax.experiments.simulation.calibration import (
    PaperRowsSection,
    calibrate,
    predict_rows,
)
from flexllm_jax.experiments.simulation.report import (
    comparison_table,
    figures,
    plot_series,
    plot_sweep,
)
from flexllm_jax.experiments.simulation.simulate import Simulation, simulate

Row = dict[str, Any]


def compare_with_paper(spec: PaperRowsSection, console: Console) -> Row:
    """Calibrate on some of the paper's measurements, and predict the others."""
    message_console().print(f"calibrating on {spec.model} of {spec.file}")
    found = calibrate(spec)
    rows = predict_rows(spec, found)
    console.print(f"found: {json.dumps({k: round(v, 5) for k, v in found.items()})}")
    for row in rows:
        console.print(
            f"{row['model']:<12} {row['rate']:>3g} req/s   TPOT {row['tpot_mean_ms']:5.1f}"
            f" (paper {row['paper_tpot_mean_ms']:5.1f}, {row['tpot_mean_error']:+.0%})   finetuning"
            f" {row['finetune_tokens_per_s']:5.0f} tok/s (paper"
            f" {row['paper_finetune_tokens_per_s']:5.0f}, {row['finetune_error']:+.0%})"
        )
    return {"efficiency": found, "rows": rows}


def run_simulations(
    config: BenchmarkConfig, experiment: SimulatedExperiment, console: Console
) -> list[Row]:
    """Every system at every load of every panel."""
    cases = list(experiment.cases())
    rows, series = [], {}
    bar = Console(stderr=True)
    for case in track(cases, "simulating", console=bar, disable=not bar.is_terminal):
        made = simulate(case.config)
        rows.append({"panel": case.panel, "system": case.system, "x": case.rate})
        rows[-1] |= figures(made.report)
        series[case.panel, case.system, case.rate] = made
    _show(rows, "in simulation", console)
    if experiment.series_bin_s:
        _write_series(config.output_dir, experiment.series_bin_s, series, rows)
    if len(experiment.rates) > 1:
        plot_sweep(rows, config.output_dir / "simulation.png", f"{config.title}: simulation")
    for line in experiment.conclusions(rows):
        console.print(line)
    return rows


def _write_series(out: Path, bin_s: float, runs: dict[tuple, Simulation], rows: list[Row]) -> None:
    """Plot runs over time, and keep the points with their rows."""
    for panel in dict.fromkeys(row["panel"] for row in rows):
        chosen = {system: run for (of, system, _), run in runs.items() if of == panel}
        plot_series(chosen, out / f"series_{panel.replace(' ', '_').lower()}.png", bin_s)
    for row, run in zip(rows, runs.values(), strict=True):
        row["series"] = {k: v.round(3).tolist() for k, v in run.series(bin_s).items()}


def run_engines(
    config: BenchmarkConfig, experiment: EngineExperiment, console: Console
) -> list[Row]:
    """Every system at every load on the real engine, each beside its simulation."""
    rows: list[Row] = []
    for case in experiment.cases(config.output_dir):
        message_console().print(f"engine: {case.system} at {case.rate:.3g} requests/s")
        measured = run_engine(case)
        row = {"panel": "engine", "system": case.system, "x": case.rate, **measured.figures}
        row["latency_model"] = measured.latency_errors
        rows.append(row)
        if experiment.simulate and not case.share:
            twin = simulated_twin(case, measured)
            rows.append({"panel": "simulator", "system": case.system, "x": case.rate, **twin})
        if experiment.oracle and case.system == experiment.systems_in_order[0]:
            oracle = oracle_row(case, measured)
            rows.append({"panel": "oracle", "system": case.system, "x": case.rate, **oracle})
    _show(rows, "on the engine", console)
    for line in experiment.conclusions(rows):
        console.print(line)
    if len(experiment.rates) > 1:
        shown = [row for row in rows if row["panel"] != "oracle"]
        plot_sweep(shown, config.output_dir / "engine.png", f"{config.title}: engine")
    return rows


def run_memory(config: BenchmarkConfig, section: MemorySection, console: Console) -> Row:
    """Every case's programs compiled and counted."""
    compiler = Compiler.of(section.target)
    rows: list[Row] = []
    told: list[str] = []
    for case in section.cases:
        measured: list[Row] = []
        for row in measure(section, case, compiler):
            measured.append(row)
            if "parts" not in row:
                what = f"{row['model']}, {row['tokens']:,} tokens, {row['bypass']}, {row['stage']}"
                console.print(f"{what}: {row['bytes'] / 1e9:.2f} GB")
        rows += measured
        told += memory_report.conclusions(case, measured)
    stages = [row for row in rows if "parts" not in row]
    title = f"{config.title}, GB ({compiler.name})"
    console.print(memory_report.memory_table(stages, f"{title}; the paper's in brackets"))
    for row in rows:
        if "parts" in row:
            console.print(memory_report.parts_table(row))
    for line in told:
        console.print(line)
    memory_report.plot_memory(stages, config.output_dir / "memory.png", title)
    return {"counted": compiler.name, "rows": rows}


def _show(rows: list[Row], where: str, console: Console) -> None:
    """A table for each panel."""
    for title, lines in _grouped(rows):
        console.print(comparison_table(lines, f"{title}, {where}"))


def _grouped(rows: list[Row]) -> Iterator[tuple[str, list[tuple[str, Row]]]]:
    """The rows of each panel, labelled by system and load."""
    for panel in dict.fromkeys(row["panel"] for row in rows):
        lines = [
            (f"{row['system']} at {row['x']:.3g}/s", row) for row in rows if row["panel"] == panel
        ]
        yield panel, lines
