"""Experiments: systems compared at several loads, in simulation and on the real engine.

A system is a name and what it changes: `policy` first of all. In simulation a base configuration
(`SimulationConfig`) is run for every panel, load and system. On the engine a configuration file is
run for every load and system; beside each run stands its twin, the same requests and microbatches
in the simulator with the step times that were measured, and for the first system an oracle, which
knows every step's time before it plans the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from flexllm_jax.config import Config, Section, build_config, load_config
from flexllm_jax.config.fields import Bool, Float
from flexllm_jax.experiments.activation_memory import MemorySection
from flexllm_jax.experiments.calibration import PaperRowsSection
from flexllm_jax.experiments.simulation import SimulationConfig
from flexllm_jax.experiments.simulation_report import figures
from flexllm_jax.finetune.job import create_job
from flexllm_jax.launch.replay import ReplayRequest, prepare_requests
from flexllm_jax.launch.report import make_report
from flexllm_jax.launch.run import Inputs, Run, prepare
from flexllm_jax.llm import LLM
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.tokenizer import load_tokenizer
from scheduler.config import SchedulerConfig
from scheduler.coserving import Scheduler
from scheduler.latency import LatencyModel, StepFeatures
from scheduler.policies import make_policy
from scheduler.request import Microbatch, Request
from scheduler.simulator import PerfectModel, SimulatedEngine, report

Row = dict[str, Any]
_OBSERVED = 20_000  # steps whose times are kept
_MICROBATCHES = 400  # of a job that its twin repeats


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
                yield _beside(row, other, panel, target or 0.0)


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


@dataclass(frozen=True)
class Measured:
    """What a run of the engine gave, and what its twin needs."""

    figures: Row
    config: Config
    requests: list[ReplayRequest]
    limits: SchedulerConfig
    steps: list[tuple[StepFeatures, float]]
    host_s: float
    latency_errors: Row
    wall_s: float


def run_engine(case: EngineCase) -> Measured:
    """Run the engine: the workload with the jobs beside it, until the last answer.

    Separate clusters are two runs: inference on its part of the devices gets so many more requests
    each, finetuning alone counts for its part.
    """
    jobs = case.policy not in ("inference_only",)
    measured = _run(case.load(case.policy, case.rate / (1 - case.share), jobs=jobs))
    if case.share:
        alone = _run(case.load("finetuning_only", case.rate, jobs=True), without_requests=True)
        measured.figures["finetune_tokens_per_s"] = (
            case.share * alone.figures["finetune_tokens_per_s"]
        )
        measured.figures["output_tokens_per_s"] *= 1 - case.share
    return measured


def _run(config: Config, *, without_requests: bool = False) -> Measured:
    inputs = prepare(config)
    seconds = inputs.requests[-1].arrival_s
    if without_requests:
        config = config.model_copy(update={"workload": None})
        inputs = Inputs(inputs.model, inputs.tokenizer, inputs.context, inputs.jobs, [])
    llm = LLM.from_config(config, progress=False)
    latency = llm.engine.scheduler.latency
    latency.keep(_OBSERVED)
    try:
        run = Run.start(llm, inputs)
        at_least_s = seconds if without_requests else 0.0
        run.watch(_Silent(), wait_for_jobs=False, at_least_s=at_least_s)
        run.note_end()
    finally:
        run.close()
    made = make_report(run)
    tokens = sum(job.tokens for job in run.jobs)
    row = figures(made) | {"finetune_tokens_per_s": tokens / run.wall_s}
    host = np.mean(llm.engine.host_seconds) if llm.engine.host_seconds else 0.0
    return Measured(
        row,
        config,
        inputs.requests,
        llm.engine.scheduler.config,
        [(features, seconds) for features, seconds, _ in latency.recent],
        float(host),
        latency.errors(),
        run.wall_s,
    )


class _Silent:
    """Shows nothing."""

    def update(self, run: Run) -> None:
        """Nothing to show."""


def simulated_twin(case: EngineCase, measured: Measured) -> Row:
    """The same run in the simulator, with step times fitted to the measured ones."""
    truth, noise = fitted(measured.steps)
    return _simulate(case, measured, truth, truth.copy(), noise)


def oracle_row(case: EngineCase, measured: Measured) -> Row:
    """The same run by a scheduler that knows every step's time beforehand."""
    truth, noise = fitted(measured.steps)
    return _simulate(case, measured, truth, PerfectModel(truth.bases, truth.coefficients), noise)


def fitted(steps: list[tuple[StepFeatures, float]]) -> tuple[LatencyModel, float]:
    """A latency model of measured steps, and the spread of the logarithm of their times about it.

    A few steps that took several times as long as others of their kind (the machine was busy
    elsewhere) are left out of both.
    """
    model = LatencyModel.fit(steps)
    for _ in range(2):
        kept = [(f, s) for f, s in steps if s < 3 * model.predict(f)]
        model = LatencyModel.fit(kept)
    errors = np.log([s / model.predict(f) for f, s in kept if model.predict(f) > 0])
    return model, float(np.std(errors))


def _simulate(
    case: EngineCase,
    measured: Measured,
    truth: LatencyModel,
    believed: LatencyModel,
    noise: float,
) -> Row:
    supply = RecordedSupply(measured.config) if measured.config.finetune.jobs else None
    engine = SimulatedEngine(
        Scheduler(measured.limits, believed, make_policy(case.policy)),
        truth,
        supply,
        noise=noise,
        host_s=measured.host_s,
    )
    for index, request in enumerate(measured.requests):
        engine.advance(request.arrival_s)
        engine.add(Request(str(index), request.prompt, request.output_tokens, request.arrival_s))
    engine.finish(measured.requests[-1].arrival_s + 300.0)
    span_s = max(t.last_token_at or 0.0 for t in engine.timings)
    return figures(report([engine], measured.limits.slo, span_s))


class RecordedSupply:
    """The microbatches of a configuration's first job, in its order; over again at the end."""

    def __init__(self, config: Config) -> None:
        inputs = prepare(config)
        job = create_job(
            config.finetune.jobs[0],
            inputs.model,
            config.model.path,
            inputs.tokenizer,
            config.finetune,
            inputs.context,
        )
        self.job = job.name
        made = (job.next_microbatch(count()) for _ in range(_MICROBATCHES))
        self._microbatches = [packed.as_planned() for packed in made if packed]
        self._batches = 1 + max(m.batch for m in self._microbatches)
        self._given = 0

    def next(self) -> Microbatch:
        """The next microbatch."""
        around, index = divmod(self._given, len(self._microbatches))
        self._given += 1
        one = self._microbatches[index]
        return Microbatch(
            self._given, one.lengths, one.backward, self.job, one.batch + around * self._batches
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


def _beside(row: Row, other: Row, panel: str, target: float) -> str:
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


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`; sections are merged, all else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merge(below, value)
        merged[key] = value
    return merged
