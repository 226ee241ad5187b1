"""The simulator beside the paper: calibrated on some of its measurements, it predicts the others.

The rows are those of the published system's artifact (`mode` coserving, one line for each model and
rate: mean and p99 TPOT, finetuning tokens/s of a pipeline). The published policy is simulated on
the A100's data sheet; three numbers are free: the shares of its FLOP/s and of its bandwidth that
are reached, and the seconds every step takes besides.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from scipy.optimize import minimize

from flexllm_jax.config import Section, build_config
from flexllm_jax.experiments.simulation.config import SimulationConfig
from flexllm_jax.experiments.simulation.report import figures
from flexllm_jax.experiments.simulation.simulate import MODELS, simulate

Row = dict[str, Any]
_START = {"compute": 0.5, "memory": 0.7, "step_s": 3e-3}
_EVALUATIONS = 60


class PaperRowsSection(Section):
    """The paper's measurements and how to simulate them."""

    file: Path = Field(description="CSV of the artifact's results.")
    model: str = Field(default="llama-3.1-8b", description="Calibrate on this model's rows.")
    base: dict[str, Any] = Field(description="Fields of the simulations.")
    models: dict[str, dict[str, Any]] = Field(description="Model -> what it changes: tp, slo.")


def read_rows(spec: PaperRowsSection) -> list[Row]:
    """The rows of the published co-serving system."""
    with spec.file.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] == "coserving"]
    return [
        {
            "model": next(name for name in MODELS if row["model"].lower().startswith(name)),
            "rate": float(row["qps_per_pipeline"]),
            "paper_tpot_mean_ms": float(row["tpot_mean_ms"]),
            "paper_tpot_p99_ms": float(row["tpot_p99_ms"]),
            "paper_finetune_tokens_per_s": float(row["ft_tok_s"]),
        }
        for row in rows
    ]


def calibrate(spec: PaperRowsSection) -> dict[str, float]:
    """The efficiencies with the least squared logarithmic error on the calibrating rows."""
    rows = [row for row in read_rows(spec) if row["model"] == spec.model][::2]
    names = list(_START)

    def loss(logarithms: np.ndarray) -> float:
        found = dict(zip(names, np.exp(logarithms).tolist(), strict=True))
        if found["compute"] > 1 or found["memory"] > 1:
            return math.inf
        errors = []
        for row in rows:
            made = _simulate(spec, row, found)
            errors += [
                math.log(made["tpot_mean_ms"] / row["paper_tpot_mean_ms"]),
                0.5 * math.log(made["tpot_p99_ms"] / row["paper_tpot_p99_ms"]),
                math.log(made["finetune_tokens_per_s"] / row["paper_finetune_tokens_per_s"]),
            ]
        return float(np.square(errors).sum())

    start = np.log(list(_START.values()))
    options = {"maxfev": _EVALUATIONS, "xatol": 0.01, "fatol": 1e-4}
    best = minimize(loss, start, method="Nelder-Mead", options=options)
    return dict(zip(names, np.exp(best.x).tolist(), strict=True))


def predict_rows(spec: PaperRowsSection, found: dict[str, float]) -> list[Row]:
    """Every row with what the simulator makes of it, and the relative errors."""
    rows = read_rows(spec)
    for row in rows:
        made = _simulate(spec, row, found)
        row |= made
        row["tpot_mean_error"] = made["tpot_mean_ms"] / row["paper_tpot_mean_ms"] - 1
        paper = row["paper_finetune_tokens_per_s"]
        row["finetune_error"] = made["finetune_tokens_per_s"] / paper - 1
    return rows


def _simulate(spec: PaperRowsSection, row: Row, found: dict[str, float]) -> Row:
    changes = spec.models[row["model"]]
    tree = spec.base | changes | {"model": row["model"], "rate": row["rate"]}
    tree["efficiency"] = spec.base.get("efficiency", {}) | found
    return figures(simulate(build_config(tree, "paper_rows", SimulationConfig)).report)
