"""Trackers follow the jobs of a server.

They are told what the database says of a job's steps, which has each once whatever became of the
engines. A job is followed from its first start until every tracker knows how it ended, over
restarts of the server too. Clients may say where their runs at Weights & Biases go
(`integrations`); whether there are any, and whose account it is, is the operator's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from flexllm_jax.config import Config, Section
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.models.text.detokenizer import Detokenizer
from flexllm_jax.server.database import (
    Database,
    DatabaseUnavailable,
    EventRow,
    JobRow,
)
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.registry import ServedAdapter
from flexllm_jax.server.finetuning.records import find_job, tell_once
from flexllm_jax.server.finetuning.transitions import ENDED
from flexllm_jax.trackers.feed import Feed, Progress
from flexllm_jax.trackers.kinds import make
from flexllm_jax.trackers.tracker import Logged, Run, Sample

log = logging.getLogger(__name__)

_AT_ONCE = 1000  # events that are read
_HIDDEN = ("name", "dataset", "validation", "init_adapter", "resume")  # of a job's configuration
_COUNTS = ("step", "total_steps")  # of an event: no metrics

Samples = tuple[int, list[Sample]] | None


class ServerTracking:
    """The trackers of all jobs of a server. `told` is called when there are new events."""

    def __init__(
        self,
        config: Config,
        database: Database,
        engines: Engines,
        tokenizer: Any,
        told: Callable[[], None],
    ):
        self._config, self._database, self._engines = config, database, engines
        self._detokenizer, self._told = Detokenizer(tokenizer), told
        self._feeds: dict[str, list[Feed]] = {}
        self._answers: dict[str, asyncio.Task[Samples]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Go on with the jobs that an earlier process followed."""
        self._loop = asyncio.get_running_loop()
        query = select(JobRow).where(JobRow.tracked.is_(False))
        for job in await self._database.until_written(lambda s: list(s.scalars(query))):
            self._feed(job)

    async def follow(self, job_id: str) -> None:
        """Tell every tracker of a job that has been given to an engine, unless they are told."""
        if self._followed(job_id) or not list(self._config.trackers.chosen()):
            return
        job = await self._database.until_written(partial(_begin, job_id=job_id))
        if job is not None and not self._followed(job_id):
            self._feed(job)

    def _followed(self, job_id: str) -> bool:
        return any(not feed.over for feed in self._feeds.get(job_id, ()))

    async def close(self, timeout_s: float) -> None:
        """Tell what there is, as far as that goes in `timeout_s`."""
        by = time.monotonic() + timeout_s
        feeds = [feed for feeds in self._feeds.values() for feed in feeds]
        await asyncio.gather(*(asyncio.to_thread(feed.close, by) for feed in feeds))
        for task in self._answers.values():
            task.cancel()

    def _feed(self, job: JobRow) -> None:
        assert self._loop is not None
        given = job.request.get("integrations") or []
        asked = {one["type"]: one[one["type"]] for one in given}
        config = {
            "model": job.model,
            "training_file": job.training_file,
            "validation_file": job.validation_file,
            **{name: value for name, value in (job.config or {}).items() if name not in _HIDDEN},
            "metadata": job.request.get("metadata"),
        }
        folder, feeds = self._config.output_dir.absolute(), self._feeds.setdefault(job.id, [])
        feeds.clear()
        for kind, section in self._config.trackers.chosen():
            wanted = asked.get(kind, {})
            run = Run(
                job.id,
                wanted.get("name") or job.id,
                config,
                folder,
                tuple(wanted.get("tags") or ()),
            )
            tracker = make(kind, _directed(section, wanted))
            note = partial(self._note, job.id)
            found = partial(self._found, job.id, kind)
            read = _Reader(self, job.id)
            feeds.append(Feed(kind, tracker, run, read, note, found, partial(self._done, job.id)))

    # -- in the feeds' threads --------------------------------------------------------------------

    def run(self, function: Callable[[Session], Any]) -> Any:
        """Run `function` in a transaction. DatabaseUnavailable: it was not made."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self._database.run(function), self._loop).result()

    def samples(self, job: JobRow) -> Samples:
        """Answers of the adapter of a job that has succeeded, asked for once; None: there are none,
        or the server has them no more."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self._shared_answers(job), self._loop).result()

    def _note(self, job_id: str, text: str, reason: str) -> None:
        log.warning("job %s: %s: %s", job_id, text, reason)  # which may name what is not a client's
        self._tell(job_id, text, "warn")

    def _found(self, job_id: str, kind: str, where: str) -> None:
        log.info("job %s is tracked by %s: %s", job_id, kind, where)
        shown = where if where.startswith(("http://", "https://")) else f"run {job_id}"
        self._tell(job_id, f"Tracked by {kind}: {shown}", "info")

    def _tell(self, job_id: str, text: str, level: str) -> None:
        try:
            self.run(lambda s: tell_once(s, job_id, text, level))
        except (DatabaseUnavailable, RuntimeError) as error:
            log.warning("job %s: %r could not be written down: %s", job_id, text, error)
        else:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._told)

    def _done(self, job_id: str) -> None:
        """A tracker knows how a job ended; with the last of them it need not be followed again."""
        feeds = self._feeds.get(job_id, [])
        if len(feeds) < len(list(self._config.trackers.chosen())):
            return
        if not all(feed.complete for feed in feeds):
            return

        def note(session: Session) -> None:
            if (job := find_job(session, job_id)) is not None and job.status in ENDED:
                job.tracked = True

        try:
            self.run(note)
        except (DatabaseUnavailable, RuntimeError) as error:  # the next start follows it again
            log.warning("job %s: the end of its tracking is not written down: %s", job_id, error)

    # -- a look at outputs ------------------------------------------------------------------------

    async def _shared_answers(self, job: JobRow) -> Samples:
        if job.id not in self._answers:
            self._answers[job.id] = asyncio.create_task(self._answer(job))
        return await asyncio.shield(self._answers[job.id])

    async def _answer(self, job: JobRow) -> Samples:
        """What a job's adapter answers to the questions that were kept of its files."""
        assert job.fine_tuned_model and job.adapter_path
        questions = job.questions or []
        if not questions:
            return None
        adapter = ServedAdapter(job.fine_tuned_model, job.id, job.adapter_path, owner=job.owner)
        params = SamplingParams(max_tokens=self._config.trackers.sample_tokens)
        slo_class = self._config.scheduler.least_urgent
        prompts = [question["prompt"] for question in questions]
        answers: list[list[int]] = [[] for _ in prompts]
        try:
            generation = self._engines.generate(
                prompts, params, 1, adapter, slo_class, time.monotonic()
            )
            try:
                async for index, _, output in generation:
                    if output.error:
                        raise RuntimeError(output.error)
                    answers[index] += output.token_ids
            finally:
                generation.close()
        except RuntimeError as error:
            log.warning("job %s: no samples of its outputs: %s", job.id, error)
            return None
        decode, text = self._detokenizer.decode, self._detokenizer.output_text
        return job.step, [
            Sample(decode(q["prompt"]), decode(q["expected"]), text(q["prompt"], answer))
            for q, answer in zip(questions, answers, strict=True)
        ]


def _begin(session: Session, job_id: str) -> JobRow | None:
    """A job is followed from now on."""
    job = find_job(session, job_id)
    if job is not None:
        job.tracked = False
    return job


def _directed(section: Section, wanted: dict[str, Any]) -> Section:
    """A tracker's section with what a client says of it."""
    own = {name: wanted[name] for name in ("project", "entity") if wanted.get(name) is not None}
    return section.model_copy(update=own)


class _Reader:
    """What the events of a job say of its steps, read once."""

    def __init__(self, tracking: ServerTracking, job_id: str):
        self._tracking, self._job_id = tracking, job_id
        self._seen = 0
        self._metrics: dict[int, dict[str, float]] = {}
        self._validations: dict[int, dict[str, float]] = {}

    def __call__(self, logged: Logged) -> Progress:
        job: JobRow = self._tracking.run(self._read)
        ended = job.status if job.status in ENDED and self._all_read else None
        asked = ended == "succeeded" and logged.samples < job.step
        return Progress(
            [(step, m) for step, m in self._metrics.items() if step > logged.step],
            [(step, m) for step, m in self._validations.items() if step > logged.validation],
            self._tracking.samples(job) if asked else None,
            ended,
        )

    def _read(self, session: Session) -> JobRow:
        job = find_job(session, self._job_id)
        assert job is not None
        query = (
            select(EventRow)
            .where(
                EventRow.job_id == job.id,
                EventRow.type == "metrics",
                EventRow.number > self._seen,
            )
            .order_by(EventRow.number)
            .limit(_AT_ONCE)
        )
        rows = list(session.scalars(query))
        self._all_read = len(rows) < _AT_ONCE
        for row in rows:
            self._seen = row.number
            self._take(row.data or {})
        return job

    def _take(self, data: dict[str, Any]) -> None:
        """Names in events begin with `train_` or `valid_`, as OpenAI's; others are of a step."""
        for name, value in data.items():
            if name in _COUNTS:
                continue
            group = self._validations if name.startswith("valid_") else self._metrics
            short = name.removeprefix("valid_").removeprefix("train_")
            group.setdefault(data["step"], {})[short] = value
