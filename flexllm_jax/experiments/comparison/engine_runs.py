"""One run of the real engine for an experiment, and what stands beside it in the simulator.

Its twin is the same requests and microbatches with the step times that were measured; the oracle
knows every step's time before it plans the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flexllm_jax.config import Config
from flexllm_jax.experiments.comparison.experiment import EngineCase
from flexllm_jax.experiments.simulation.report import figures
from flexllm_jax.finetune.create import create_job
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.launch.replay import ReplayRequest
from flexllm_jax.launch.report import make_report
from flexllm_jax.launch.run import Inputs, Run, prepare
from flexllm_jax.llm import LLM
from scheduler.config import SchedulerConfig
from scheduler.coserving import Scheduler
from scheduler.latency.model import LatencyModel, StepFeatures
from scheduler.policies import make_policy
from scheduler.request import Microbatch, Request
from scheduler.simulation.engine import PerfectModel, SimulatedEngine, report
from scheduler.simulation.supply import TrainingSupply

Row = dict[str, Any]
_OBSERVED = 20_000  # steps whose times are kept
_MICROBATCHES = 400  # of a job that its twin repeats


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


class RecordedSupply(TrainingSupply):
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
        made = []
        while len(made) < _MICROBATCHES and (item := job.next()):
            if isinstance(item, PackedMicrobatch):
                made.append(item.as_planned(len(made), job.name, job.weights_version))
        self._microbatches = made
        self._versions = 1 + max(m.weights_version for m in self._microbatches)
        self._given = 0

    def next(self) -> Microbatch:
        """The next microbatch."""
        around, index = divmod(self._given, len(self._microbatches))
        self._given += 1
        one = self._microbatches[index]
        version = one.weights_version + around * self._versions
        return replace(one, microbatch_id=self._given, job=self.job, weights_version=version)
