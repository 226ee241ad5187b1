"""What an experiment's systems shall reach, and what became of it, a line each.

Ours is the experiment's first system. What is reached is judged at the load where it is worst.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from flexllm_jax.config import Section
from flexllm_jax.config.fields import Float

Row = dict[str, Any]


class TargetSection(Section):
    """What the first system shall reach; each is checked and told."""

    slo_attainment: Float | None = Field(default=None, description="At every load.")
    finetune_over: dict[str, Float] = Field(
        default={}, description="System -> finetuning tokens/s as a multiple of its, at every load."
    )
    kept: Float | None = Field(
        default=None, description="Finetuning at the highest load over that at the lowest."
    )
    of_oracle: Float | None = Field(default=None, description="Finetuning over the oracle's.")
    twin_error: Float | None = Field(
        default=None, description="Largest relative error of the simulator."
    )


def check_targets(targets: TargetSection, ours: str, rows: list[Row], panel: str) -> Iterator[str]:
    """A line for each target: what was reached, and at which load it is worst."""
    mine = {row["x"]: row for row in rows if row["system"] == ours}
    if targets.slo_attainment is not None:
        worst = min(mine.values(), key=lambda row: row["slo_attainment"])
        yield _verdict(
            f"{panel}: SLO attainment of {ours}, worst at {worst['x']:g}/s",
            worst["slo_attainment"],
            targets.slo_attainment,
        )
    for other, target in targets.finetune_over.items():
        ratios = {
            row["x"]: mine[row["x"]]["finetune_tokens_per_s"] / row["finetune_tokens_per_s"]
            for row in rows
            if row["system"] == other
        }
        load = min(ratios, key=lambda x: ratios[x])
        yield _verdict(
            f"{panel}: finetuning over {other}, worst at {load:g}/s", ratios[load], target
        )
    if targets.kept is not None:
        low, high = (mine[x]["finetune_tokens_per_s"] for x in (min(mine), max(mine)))
        yield _verdict(f"{panel}: finetuning kept at {max(mine):g}/s", high / low, targets.kept)


def compare_with_simulated(row: Row, other: Row, panel: str, target: float) -> str:
    """A run on the engine beside the oracle, or beside its twin in the simulator."""
    if panel == "oracle":
        share = row["finetune_tokens_per_s"] / other["finetune_tokens_per_s"]
        return _verdict(
            f"{row['system']} at {row['x']:g}/s: finetuning over oracle's", share, target
        )
    measures = ("finetune_tokens_per_s", "tpot_mean_ms", "tpot_p99_ms", "slo_attainment")
    errors = {m: other[m] / row[m] - 1 for m in measures if row[m] and other[m] is not None}
    text = ", ".join(f"{name} {error:+.1%}" for name, error in errors.items())
    met = "within" if max(map(abs, errors.values())) <= target else "NOT within"
    return f"{row['system']} at {row['x']:g}/s: simulator {met} {target:.0%}: {text}"


def _verdict(what: str, value: float, target: float) -> str:
    return f"{what}: {value:.3f}, target {target:g}: {'met' if value >= target else 'NOT met'}"
