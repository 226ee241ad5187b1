"""A job that learns from rewards on the real engine, and the same in the simulator.

The twin has the lengths of the job's prompts and answers, batch by batch, the same requests beside
it, and the step times that were measured. What it predicts is how long all of it takes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexllm_jax.config import Config, ConfigError
from flexllm_jax.engine.engine import Engine
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.finetune.reinforcement.episodes import Group
from flexllm_jax.launch.replay import ReplayRequest
from flexllm_jax.launch.run import Run, prepare
from flexllm_jax.llm import LLM
from scheduler.coserving import Scheduler
from scheduler.latency.model import LatencyModel
from scheduler.policies import make_policy
from scheduler.request import Request
from scheduler.simulation.engine import SimulatedEngine
from scheduler.simulation.rollouts import ROWS_LEFT, RolloutBatch, RolloutSupply

_OBSERVED = 100_000  # steps whose times are kept
_POLL_S = 0.05
_TICK_S = 0.005  # of the clock, between two looks whether the twin is done


@dataclass(frozen=True)
class Throughput:
    """Of a whole job: tokens sampled and trained, seconds, and steps of the engine."""

    sampled: int
    trained: int
    seconds: float
    steps: int

    @property
    def figures(self) -> dict[str, float]:
        """Per second."""
        return {
            "sampled_tokens_per_s": self.sampled / self.seconds,
            "trained_tokens_per_s": self.trained / self.seconds,
            "seconds": self.seconds,
            "engine_steps": self.steps,
        }


class RecordedRollouts:
    """What a job answers and trains: made before it is started, `stop` is called when it ends."""

    def __init__(self, engine: Engine, job: FinetuneJob):
        if job.reinforcement is None:
            raise ConfigError(f"job {job.name!r} does not learn from rewards")
        self._engine, self._job = engine, job
        self._method = job.reinforcement.method
        self.batches: list[RolloutBatch] = []
        job.reinforcement.on_batch = self._note
        engine.scheduler.latency.keep(_OBSERVED)
        engine.scheduler.latency.recent.clear()
        engine.host_seconds.clear()

    def stop(self) -> None:
        """What the engine does from here on is not the job's."""
        self._steps = [(f, s) for f, s, _ in list(self._engine.scheduler.latency.recent)]
        self._host_s = float(np.mean(self._engine.host_seconds))

    def _note(self, groups: Sequence[Group], packed: Sequence[PackedMicrobatch]) -> None:
        answers = tuple(
            (len(g.prompt.tokens), tuple(max(1, e.length) for e in g.episodes)) for g in groups
        )
        microbatches = tuple(own.as_planned(0, self._job.name, 0) for own in packed)
        self.batches.append(RolloutBatch(answers, microbatches * self._method.num_iterations))

    def _in(self, seconds: float, steps: int) -> Throughput:
        groups = [own for batch in self.batches for own in batch.groups]
        trained = sum(own.tokens for batch in self.batches for own in batch.microbatches)
        return Throughput(sum(sum(own) for _, own in groups), trained, seconds, steps)

    @property
    def measured(self) -> Throughput:
        """Of the job, which has ended."""
        seconds = self._job.step_times[-1] - self._job.started_at
        return self._in(seconds, len(self._steps))

    def _step_times(self) -> tuple[LatencyModel, float]:
        """A model of the measured steps, and the spread of the logarithm of their times about it.
        The sum of their times is kept: a fit of relative errors is of the fast ones."""
        model = LatencyModel.fit(self._steps)
        expected = np.array([model.predict(features) for features, _ in self._steps])
        seconds = np.array([seconds for _, seconds in self._steps])
        known = expected > 0
        spread = np.std(np.log(seconds[known] / expected[known]))
        return model.copy(scale=seconds.sum() / expected.sum()), float(spread)

    def predicted(self, requests: Sequence[ReplayRequest] = (), seed: int = 0) -> Throughput:
        """Of its twin, with these requests beside it."""
        engine, limits = self._engine, self._engine.scheduler.config
        truth, noise = self._step_times()
        rows = limits.max_sequences
        supply = RolloutSupply(
            self.batches,
            rows - max(1, rows // ROWS_LEFT),
            engine.slos[engine.config.scheduler.least_urgent],
            self._method.steps_ahead,
            limits.page_size,
            last=len(self.batches),
        )
        twin = SimulatedEngine(
            Scheduler(
                limits,
                engine.scheduler.latency.copy(),  # what it believed at its start
                make_policy(engine.config.scheduler.policy),
            ),
            truth,
            supply,
            noise=noise,
            host_s=self._host_s,
            seed=seed,
        )
        coming, clock = deque(enumerate(requests)), 0.0
        while supply.trained < len(self.batches):
            clock += _TICK_S
            while coming and coming[0][1].arrival_s <= clock:
                number, one = coming.popleft()
                twin.advance(one.arrival_s)
                twin.add(Request(str(number), one.prompt, one.output_tokens, one.arrival_s))
            twin.advance(clock)
        return self._in(clock, twin.steps)


def compare_rollouts(config: Config) -> dict[str, Any]:
    """Run a configuration's first job with its workload, and its twin: throughput of both, and
    predicted over measured. ConfigError where the job does not learn from rewards."""
    inputs = prepare(config)
    if not inputs.jobs or inputs.jobs[0].reinforcement is None:
        raise ConfigError("finetune.jobs: the first must have method: {type: reinforcement}")
    llm = LLM.from_config(config, progress=False)
    try:
        recorded = RecordedRollouts(llm.engine, inputs.jobs[0])
        run = Run.start(llm, inputs)
        while run.jobs_running:
            time.sleep(min(_POLL_S, run.replay.advance() if run.replay else _POLL_S))
        recorded.stop()
    finally:
        llm.close()
    if not recorded.batches or run.jobs[0].status != "succeeded":
        why = run.jobs[0].reason or "it had no steps left: set output_dir, or resume: false"
        raise ConfigError(f"job {run.jobs[0].name!r} was not measured: {why}")
    measured, predicted = recorded.measured, recorded.predicted(inputs.requests)
    return {
        "measured": measured.figures,
        "predicted": predicted.figures,
        "predicted_over_measured": measured.seconds / predicted.seconds,
        "steps": len(recorded.batches),
    }
