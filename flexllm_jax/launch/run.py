"""A run of the engine as the scripts do it: jobs, and a workload beside them, to their end.

`prepare` reads and checks every input before anything slow starts or anything is written; `Run`
then drives the replay and keeps what report and plot need.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from flexllm_jax.config import Config
from flexllm_jax.finetune.create import create_job
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.reinforcement.make import Play
from flexllm_jax.launch.replay import Replay, ReplayRequest, prepare_requests
from flexllm_jax.llm import LLM, JobHandle
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.text.tokenizer import load_tokenizer
from flexllm_jax.peft.hf.peft import load_adapter
from flexllm_jax.trackers import kinds as trackers

_POLL_S = 0.1
_SAMPLE_S = 0.5


@dataclass(frozen=True)
class Inputs:
    """What a configuration's files hold."""

    model: ModelConfig
    tokenizer: Any
    context: int  # longest prompt plus output
    jobs: list[FinetuneJob]
    requests: list[ReplayRequest]


def prepare(config: Config) -> Inputs:
    """Read what the configuration names: tokenizer, adapters, datasets, trace and prompts.

    Raises the error of whatever cannot be used. Weights are left for the engine.
    """
    config.require_inputs()
    trackers.require(config.trackers)
    path = config.model.path
    model = ModelConfig.from_hf(path)
    tokenizer = load_tokenizer(path)
    for adapter in config.adapters.preload:
        load_adapter(adapter.path, model, path)
    context = model.context_length(config.model.max_model_len)
    play = Play(graders=config.graders)
    jobs = [
        create_job(job, model, path, tokenizer, config.finetune, context, play)
        for job in config.finetune.jobs
    ]
    requests = (
        prepare_requests(config.workload, tokenizer, model.vocab_size) if config.workload else []
    )
    return Inputs(model, tokenizer, context, jobs, requests)


@dataclass(frozen=True)
class Sample:
    """What was done up to a moment, `at` seconds after the start."""

    at: float
    output_tokens: int
    finetune_tokens: int


def judged_by(job: JobHandle) -> str:
    """What tells how far a job is: its reward if it learns from one, whose loss says nothing of
    that; else its loss."""
    measured = [*job.metrics[-1:], *(found for _, found in job.validations[-1:])]
    return "reward" if any("reward" in found for found in measured) else "loss"


class Display(Protocol):
    """Shows a run while it goes on."""

    def update(self, run: Run) -> None:
        """Show how far the run is; called often."""


@dataclass
class Run:
    """Jobs and a replay on an engine, from start to end."""

    llm: LLM
    jobs: list[JobHandle]
    replay: Replay | None = None
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def start(cls, llm: LLM, inputs: Inputs) -> Run:
        """Start the jobs and the workload.

        A job whose adapter the workload asks for is served from its first version on.
        """
        workload = llm.config.workload
        jobs = [llm.start_job(job) for job in inputs.jobs]
        for job in jobs:
            asked_for = workload is not None and workload.adapter == job.name
            if asked_for and job.status == "running" and job.steps < job.total_steps:
                job.publish()
        run = cls(llm, jobs)
        if workload:
            run.replay = Replay(llm, inputs.requests, workload)
            run.replay.start()
        return run

    @property
    def wall_s(self) -> float:
        """Seconds since the start, or of the whole run."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def jobs_running(self) -> bool:
        """Whether a job has work left."""
        return any(job.status == "running" for job in self.jobs)

    def watch(
        self, display: Display, *, wait_for_jobs: bool = True, at_least_s: float = 0.0
    ) -> None:
        """Replay, and return when every request is answered and (`wait_for_jobs`) every job done,
        but not before the run is `at_least_s` seconds old.

        Raises RuntimeError when the engine fails.
        """
        sampled = 0.0
        while True:
            pause = self.replay.advance() if self.replay else _POLL_S
            if self.wall_s - sampled >= _SAMPLE_S:
                sampled = self.wall_s
                self._sample()
            display.update(self)
            answered = self.replay is None or self.replay.finished
            over = answered and self.wall_s >= at_least_s
            if over and not (wait_for_jobs and self.jobs_running):
                return
            if not self.llm.alive:
                raise RuntimeError("the engine has failed; the traceback above says how")
            time.sleep(min(pause, _POLL_S))

    def note_end(self) -> None:
        """The run is over; what the engine does from here on is not part of it."""
        if self.ended is None:
            self._sample()
            self.ended = time.monotonic()

    def close(self) -> None:
        """Close the engine, and note what became of everything."""
        self.note_end()
        self.llm.close()
        if self.replay:
            self.replay.collect()

    def _sample(self) -> None:
        self.samples.append(
            Sample(
                self.wall_s,
                self.replay.output_tokens if self.replay else 0,
                sum(job.tokens for job in self.jobs),
            )
        )
