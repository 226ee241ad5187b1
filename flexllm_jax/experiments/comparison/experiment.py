"""An experiment as its YAML file describes it: the systems, the loads, what is the same for all.

A system is a name and what it changes: `policy` first of all. In simulation a base configuration
(`SimulationConfig`) is run for every panel, load and system. On the engine a configuration file is
run for every load and system.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from flexllm_jax.config import Config, Section, build_config, load_config
from flexllm_jax.config.fields import Bool, Float
from flexllm_jax.experiments.comparison.targets import (
    TargetSection,
    check_targets,
    compare_with_simulated,
)
from flexllm_jax.experiments.memory.activations import MemorySection
from flexllm_jax.experiments.simulation.calibration import PaperRowsSection
from flexllm_jax.experiments.simulation.config import SimulationConfig
from flexllm_jax.launch.replay import prepare_requests
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.text.tokenizer import load_tokenizer

Row = dict[str, Any]


@dataclass(frozen=True)
class SimulatedCase:
    """One simulation of an experiment."""

    panel: str
    system: str
    rate: float
    config: SimulationConfig


class SimulatedExperiment(Section):
    """The simulated half."""

    base: dict[str, Any] = Field(description="Fields of a simulation, for all.")
    panels: dict[str, dict[str, Any]] = Field(description="Panel -> what it changes.")
    systems: dict[str, dict[str, Any]] = Field(description="System -> what it changes; ours first.")
    rates: tuple[Float, ...] = Field(min_length=1, description="Requests/s of the whole fleet.")
    series_bin_s: Float | None = Field(
        default=None, gt=0, description="Also plot rates over time, in bins of so many seconds."
    )
    targets: TargetSection = Field(default_factory=TargetSection, description="Targets.")

    def cases(self) -> Iterator[SimulatedCase]:
        """All combinations."""
        for panel, of_panel in self.panels.items():
            for system, of_system in self.systems.items():
                for rate in self.rates:
                    tree = _merge(_merge(_merge(self.base, of_panel), of_system), {"rate": rate})
                    config = build_config(tree, f"simulation of {system}", SimulationConfig)
                    yield SimulatedCase(panel, system, rate, config)

    def conclusions(self, rows: list[Row]) -> Iterator[str]:
        """What became of the targets, a line each."""
        ours = next(iter(self.systems))
        for panel in self.panels:
            yield from check_targets(
                self.targets, ours, [row for row in rows if row["panel"] == panel], panel
            )


class EngineExperiment(Section):
    """The half on the real engine."""

    config: Path = Field(description="A configuration of the engine.")
    set: tuple[str, ...] = Field(default=(), description="What is changed, field=value.")
    systems: dict[str, dict[str, Any]] = Field(
        description="System -> {policy, share}; ours first. share: of separate clusters, the part "
        "that finetunes; its policy is then inference_only."
    )
    rates: tuple[Float, ...] = Field(min_length=1, description="Requests/s; the trace is scaled.")
    seconds: Float = Field(default=30.0, gt=0, description="Length of the workload.")
    simulate: Bool = Field(default=True, description="Put the simulator beside each run.")
    oracle: Bool = Field(default=False, description="Put an oracle beside the first system.")
    targets: TargetSection = Field(default_factory=TargetSection, description="Targets.")

    @property
    def systems_in_order(self) -> list[str]:
        """Names of the systems, ours first."""
        return list(self.systems)

    def cases(self, out: Path) -> Iterator[EngineCase]:
        """All combinations; runs write to folders of `out`."""
        for system, of_system in self.systems.items():
            for rate in self.rates:
                yield EngineCase(
                    system,
                    rate,
                    of_system["policy"],
                    of_system.get("share", 0.0),
                    self,
                    out / f"{system}-{rate:g}".replace(" ", "_"),
                )

    def conclusions(self, rows: list[Row]) -> Iterator[str]:
        """What became of the targets, a line each."""
        ours = self.systems_in_order[0]
        real = [row for row in rows if row["panel"] == "engine"]
        yield from check_targets(self.targets, ours, real, "engine")
        for panel, target in (
            ("oracle", self.targets.of_oracle),
            ("simulator", self.targets.twin_error),
        ):
            for other in (row for row in rows if row["panel"] == panel and target is not None):
                (row,) = [r for r in real if (r["system"], r["x"]) == (other["system"], other["x"])]
                yield compare_with_simulated(row, other, panel, target or 0.0)


class BenchmarkConfig(Section):
    """The whole tree."""

    title: str = Field(description="Heading of tables and plots.")
    simulation: SimulatedExperiment | None = Field(default=None, description="In simulation.")
    engine: EngineExperiment | None = Field(default=None, description="On the real engine.")
    paper_rows: PaperRowsSection | None = Field(
        default=None, description="Calibrate the simulator on the paper's measurements."
    )
    memory: MemorySection | None = Field(default=None, description="Activation memory.")
    output_dir: Path = Field(default=Path("runs/benchmark"), description="Folder for results.")


@dataclass(frozen=True)
class EngineCase:
    """One run of the real engine."""

    system: str
    rate: float
    policy: str
    share: float
    experiment: EngineExperiment
    folder: Path

    def load(self, policy: str, rate: float, *, jobs: bool) -> Config:
        """The configuration of a run of `policy` at `rate` requests/s."""
        path, fixed = self.experiment.config, list(self.experiment.set)
        plain = load_config(path, fixed)
        workload = plain.workload
        if workload is None:
            raise ValueError(f"{path}: an experiment needs a workload")
        model = ModelConfig.from_hf(plain.model.path)
        tokenizer = load_tokenizer(plain.model.path)
        arrivals = prepare_requests(workload, tokenizer, model.vocab_size)
        span = (arrivals[-1].arrival_s - arrivals[0].arrival_s) / workload.time_scale
        scale = (len(arrivals) - 1) / span / rate
        most = max(1, round(rate * self.experiment.seconds))
        changed = [
            f"scheduler.policy={policy}",
            f"workload.time_scale={scale}",
            f"workload.max_requests={most}",
            f"output_dir={self.folder}",
        ]
        config = load_config(path, [*fixed, *changed])
        if not jobs:
            finetune = config.finetune.model_copy(update={"jobs": ()})
            config = config.model_copy(update={"finetune": finetune})
        return config


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`; sections are merged, all else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merge(below, value)
        merged[key] = value
    return merged
