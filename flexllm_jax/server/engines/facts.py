"""What has happened to the jobs of an engine, told until the HTTP process has written it down.

Whatever a job adds to its lists (metrics, validations, messages, checkpoints) and its end become
numbered facts. Reports carry those that are not acknowledged, so nothing is lost while the database
refuses, or between a step and its record. A run that goes on from a checkpoint tells again what the
checkpoint knows and the database lacks, before it says that it has started.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from typing import Any

from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.server.engines.protocol import Fact, JobReport

_AT_ONCE = 1000  # facts of a job in a report


class JobFacts:
    """The facts of one run of a job. `losses_known`: steps whose losses the database has."""

    def __init__(self, job: FinetuneJob, losses_known: int):
        self.job, self._run = job, uuid.uuid4().hex
        self.checkpoints: list[int] = []  # steps with an adapter on disk, in this run
        self._untold: deque[Fact] = deque()  # not acknowledged
        self._count = 0
        self._steps = min(losses_known, job.resumed_from)
        self._validations = self._messages = self._checkpoints = 0
        self._collect_metrics()
        self._add("started", step=job.resumed_from)
        self._ended = False
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """Whether the job has ended, and all is written down."""
        with self._lock:
            return self._ended and not self._untold

    def acknowledge(self, run: str, number: int) -> None:
        """Facts up to `number` are written down."""
        with self._lock:
            while run == self._run and self._untold and self._untold[0].number <= number:
                self._untold.popleft()

    def report(self) -> JobReport:
        """How the job is, with what is not acknowledged."""
        job = self.job
        # First: what is read after it is complete when it says that the job has ended.
        status = "paused" if job.running and job.paused else job.status.value
        with self._lock:
            self._collect(status)
            facts = [fact for _, fact in zip(range(_AT_ONCE), self._untold, strict=False)]
        return JobReport(
            name=job.name,
            run=self._run,
            status=status,
            step=job.step,
            total_steps=job.total_steps,
            forwarded=job.forwarded,
            backwarded=job.backwarded,
            tokens=job.earlier_tokens + job.tokens,
            tokens_per_s=job.tokens_per_s,
            metrics=job.metrics[-1] if job.metrics else {},
            eta_s=job.eta_s,
            resumed_from=job.resumed_from,
            facts=facts,
            answered=job.sampler.computed if job.sampler else 0,
        )

    def _collect(self, status: str) -> None:
        if self._ended:
            return
        self._collect_metrics()
        for step in self.checkpoints[self._checkpoints :]:
            self._checkpoints += 1
            self._add("checkpoint", step=step)
        for text in self.job.messages[self._messages :]:
            self._messages += 1
            self._add("message", text=text)
        if status not in ("running", "paused"):
            self._ended = True
            self._add("ended", text=self.job.reason, status=status)

    def _collect_metrics(self) -> None:
        steps = enumerate(self.job.metrics[self._steps :], self._steps + 1)
        measured = [("step", *own) for own in steps]
        self._steps += len(measured)
        validations = self.job.validations[self._validations :]
        self._validations += len(validations)
        measured += [("validation", *own) for own in validations]
        for kind, step, metrics in sorted(measured, key=lambda own: own[1]):  # as they happened
            self._add(kind, step=step, metrics=metrics)

    def _add(self, kind: Any, **what: Any) -> None:
        self._count += 1
        self._untold.append(Fact(self._count, kind, **what))


class FactBook:
    """The facts of all jobs of an engine. Jobs may be added in any thread."""

    def __init__(self, forgotten_after_s: float):
        self._forgotten_after_s = forgotten_after_s  # a job's end: viewers have seen it by then
        self._jobs: dict[str, JobFacts] = {}

    def begin(self, job: FinetuneJob, losses_known: int) -> None:
        """A run of a job has started."""
        self._jobs[job.name] = JobFacts(job, losses_known)

    def checkpoint(self, name: str, step: int) -> None:
        """The adapter of a checkpoint is on disk."""
        self._jobs[name].checkpoints.append(step)

    def acknowledge(self, name: str, run: str, number: int) -> None:
        """Facts of a run up to `number` are written down."""
        if name in self._jobs:
            self._jobs[name].acknowledge(run, number)

    def reports(self) -> list[JobReport]:
        """How all jobs are."""
        return [facts.report() for facts in list(self._jobs.values())]

    def forgettable(self) -> list[FinetuneJob]:
        """Jobs of which nobody needs to hear any more; they are forgotten here."""
        gone = []
        for name, facts in list(self._jobs.items()):
            ended = facts.job.finished_at
            if ended and time.monotonic() - ended > self._forgotten_after_s and facts.over:
                del self._jobs[name]
                gone.append(facts.job)
        return gone
