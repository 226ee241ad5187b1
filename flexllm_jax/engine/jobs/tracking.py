"""Trackers follow the jobs of an engine in this process.

What they are told is what a job keeps of its steps anyway (`FinetuneJob.metrics`, `validations`);
their threads read it, and the engine's knows nothing of them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from flexllm_jax.config import Config, FinetuneConfig
from flexllm_jax.engine.loop import EngineLoop, EngineStopped, NewRequest
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.finetune.calls.source import CallSource
from flexllm_jax.finetune.data.questions import questions
from flexllm_jax.finetune.job import FinetuneJob, JobStatus
from flexllm_jax.trackers.feed import Feed, Progress
from flexllm_jax.trackers.kinds import make
from flexllm_jax.trackers.tracker import Logged, Run, Sample

log = logging.getLogger(__name__)

_LAST_S = 10.0  # that trackers may take when all else has ended
_SAMPLES_S = 60.0  # and answers to questions


class JobTracking:
    """The trackers of all jobs of an engine."""

    def __init__(self, config: Config, loop: EngineLoop):
        self._config, self._loop = config, loop
        self._feeds: list[tuple[FinetuneJob, Feed]] = []
        self._late: list[Feed] = []

    def follow(self, job: FinetuneJob) -> None:
        """Tell every tracker of a job that has been started."""
        chosen = list(self._config.trackers.chosen())
        if not chosen:
            return
        self._feeds = [(job, feed) for job, feed in self._feeds if not feed.over]
        output = self._config.output_dir
        assert isinstance(job.config, FinetuneConfig)  # what is trained by calls has none
        config = {"model": str(self._config.model.path), **job.config.model_dump(mode="json")}
        run = Run(_run_id(output / job.name, job), job.name, config, output.absolute())
        answers = _Answers(self._config, self._loop, job)
        for name, section in chosen:
            found = partial(log.info, "job %s is tracked by %s: %s", job.name, name)
            read = partial(_read, job, answers)
            feed = Feed(name, make(name, section), run, read, partial(_note, job), found)
            self._feeds.append((job, feed))

    def settle(self) -> None:
        """Wait for what is to be told of jobs that have ended, while the engine still answers."""
        patience = _LAST_S + (_SAMPLES_S if self._config.trackers.samples else 0)
        by = time.monotonic() + patience
        ended = [feed for job, feed in self._feeds if job.ended.is_set()]
        for feed in ended:
            feed.join(by)
        self._late = [feed for feed in ended if not feed.over]

    def close(self) -> None:
        """After the engine's end: tell the rest, but wait no longer for who has not settled."""
        now = time.monotonic()
        for _, feed in self._feeds:
            feed.close(now if feed in self._late else now + _LAST_S)


def _note(job: FinetuneJob, text: str, reason: str) -> None:
    job.note(f"{text} ({reason})")


def _run_id(folder: Path, job: FinetuneJob) -> str:
    """That of the run that a job goes on with, or a new one; kept in the job's folder."""
    file = folder / "tracked.json"
    if job.resumed_from and file.exists():
        return json.loads(file.read_text())["run"]
    run = f"{job.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"run": run}))
    return run


def _read(job: FinetuneJob, answers: _Answers, logged: Logged) -> Progress:
    ended = job.ended.is_set()  # first: what is read after it is complete if it has
    metrics = job.metrics[logged.step :]
    return Progress(
        list(enumerate(metrics, logged.step + 1)),
        [(step, metrics) for step, metrics in job.validations if step > logged.validation],
        answers.get() if ended and logged.samples < job.step else None,
        job.status.value if ended else None,
    )


class _Answers:
    """A finished adapter's answers to the first validation rows, asked for once."""

    def __init__(self, config: Config, loop: EngineLoop, job: FinetuneJob):
        self._config, self._loop, self._job = config, loop, job
        self._lock = threading.Lock()
        self._samples: tuple[int, Sequence[Sample]] | None = None
        self._asked = False

    def get(self) -> tuple[int, Sequence[Sample]] | None:
        """With the step they were made after; None: there are none."""
        if not self._config.trackers.samples or self._job.status is not JobStatus.SUCCEEDED:
            return None
        with self._lock:
            if not self._asked:
                self._asked = True
                try:
                    self._samples = self._job.step, self._ask()
                except (EngineStopped, ValueError, RuntimeError) as error:
                    self._job.note(f"no samples of its outputs: {error}")
            return self._samples

    def _ask(self) -> list[Sample]:
        section, engine, source = self._config.trackers, self._loop.engine, self._job.source
        assert not isinstance(source, CallSource)
        rows = (source.validation or source.dataset).items
        most = engine.runner.sizes.max_model_len - section.sample_tokens
        asked = questions(rows, section.samples, most)
        params = SamplingParams(max_tokens=section.sample_tokens)
        slo_class, now = self._config.scheduler.least_urgent, time.monotonic()
        futures = self._loop.submit(
            [
                NewRequest(tuple(q.prompt), params, self._job.name, now, slo_class=slo_class)
                for q in asked
            ]
        )
        decode = engine.detokenizer.decode
        samples = []
        for question, future in zip(asked, futures, strict=True):
            state = future.result()
            if state.error:
                raise RuntimeError(state.error)
            answer = state.text(engine.detokenizer)
            samples.append(Sample(decode(question.prompt), decode(question.expected), answer))
        return samples
