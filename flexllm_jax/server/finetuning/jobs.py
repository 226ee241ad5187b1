"""Finetuning jobs from creation to a served adapter, whatever happens to either process.

The database says what a job is; an engine only runs those it is given, and of several the one with
the fewest jobs gets the next. A job whose engine is lost is given to another one, or to the next
that starts, which goes on from its newest checkpoint. Statuses: validating_files, queued, running,
paused, succeeded, failed, cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from flexllm_jax.config import Config
from flexllm_jax.server.engines.client import EngineClient, EngineRefused, EngineUnavailable
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.protocol import JobReport, Stats
from flexllm_jax.server.engines.registry import ModelRegistry
from flexllm_jax.server.finetuning.database import Database, JobRow, now
from flexllm_jax.server.finetuning.files import UNFINISHED, FileStore
from flexllm_jax.server.finetuning.records import (
    JobRecords,
    find_job,
    finished_adapters,
    tell,
    tell_rows,
)
from flexllm_jax.server.finetuning.schema import CreateJob, random_seed
from flexllm_jax.server.finetuning.validation import FileValidation, UnusableFiles
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.metrics import ServerMetrics

log = logging.getLogger(__name__)

ENDED = ("succeeded", "failed", "cancelled")
_ENGINE_LOSSES = 3  # engines that may end while a job runs, before it is held to be the reason


class JobManager:
    """All jobs of a server. Call `start` once in the loop."""

    def __init__(
        self,
        config: Config,
        database: Database,
        files: FileStore,
        engines: Engines,
        models: ModelRegistry,
        metrics: ServerMetrics,
        tokenizer: Any,
    ):
        self._config, self._database, self._files = config, database, files
        self._engines, self._models, self._metrics = engines, models, metrics
        self._validation = FileValidation(config, database, files, models, tokenizer)
        self._tasks: set[asyncio.Task] = set()
        self._reports: asyncio.Queue[JobReport] = asyncio.Queue()
        self._known: dict[str, JobReport] = {}  # what its engine last said of a job
        self._in_engine: dict[str, EngineClient] = {}  # which engine a job was given to
        self._records = JobRecords(config, models, files)
        self._scheduling = asyncio.Lock()
        self.closing = False
        self.version = 0  # counts events
        self.changed = asyncio.Condition()  # notified after every event
        engines.on_ready.append(lambda _: self._spawn(self._schedule()))
        engines.on_lost.append(lambda engine: self._spawn(self._engine_lost(engine)))
        engines.on_stats.append(self._take)
        database.run_now(self._serve_finished)

    # -- the way in -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Go on with what an earlier process left."""
        self._spawn(self._follow())
        for job_id in await self._ids("validating_files"):
            self._spawn(self._validate(job_id))
        await self._count()

    async def close(self) -> None:
        """After the engine's end: write down the last it said."""
        await self._reports.join()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._validation.close()
        self._database.close()

    async def create(self, body: CreateJob, client: Client) -> JobRow:
        """Take a job in; its files are validated next. ApiError 400, 404 or 429."""
        body.check(self._config)
        self._models.resolve(body.model, client)
        await self._files.find(body.training_file, client, "training_file")
        if body.validation_file is not None:
            await self._files.find(body.validation_file, client, "validation_file")
        job = JobRow(
            id=f"ftjob-{uuid.uuid4().hex[:24]}",
            status="validating_files",
            model=body.model,
            request={
                **body.model_dump(),
                "seed": body.seed if body.seed is not None else random_seed(),
            },
            hyperparameters=body.chosen.model_dump(),
            training_file=body.training_file,
            validation_file=body.validation_file,
            owner=client.owner,
        )
        limit = self._config.server.max_queued_jobs

        def insert(session: Session) -> bool:
            query = select(func.count()).where(JobRow.status.in_(UNFINISHED))
            if (session.scalar(query) or 0) >= limit:
                return False
            session.add(job)
            session.flush()
            tell(session, job.id, f"Created fine-tuning job: {job.id}")
            tell(session, job.id, f"Validating training file: {job.training_file}")
            return True

        if not await self._database.run(insert):
            message = f"there are {limit} jobs that are not done: wait for one"
            raise ApiError(429, message, retry_after_s=60)
        self._spawn(self._validate(job.id))
        return job

    async def find(self, job_id: str, client: Client | None = None) -> JobRow:
        """A job by its id; ApiError 404 where it is not the client's, too."""
        job = await self._database.run(lambda s: find_job(s, job_id))
        if job is None or (client is not None and not client.may_see(job.owner)):
            raise ApiError(404, f"no such fine-tuning job: {job_id!r}")
        return job

    def report_of(self, job_id: str) -> JobReport | None:
        """What the engine last said of a job, if it has it."""
        return self._known.get(job_id) if job_id in self._in_engine else None

    async def cancel(self, job_id: str) -> JobRow:
        """Stop a job for good."""
        await self._move(job_id, UNFINISHED, "cancelled", "The job was cancelled.")
        await self._ask("cancel_job", job_id)
        self._spawn(self._schedule())
        return await self.find(job_id)

    async def pause(self, job_id: str) -> JobRow:
        """Let a job wait, from the engine's next step on."""
        await self._move(job_id, ("queued", "running"), "paused", "The job was paused.")
        await self._ask("pause_job", job_id)
        self._spawn(self._schedule())
        return await self.find(job_id)

    async def resume(self, job_id: str) -> JobRow:
        """Let a paused job go on."""
        in_engine = job_id in self._in_engine
        status = "running" if in_engine else "queued"
        await self._move(job_id, ("paused",), status, "The job was resumed.")
        await self._ask("resume_job", job_id)
        self._spawn(self._schedule())
        return await self.find(job_id)

    async def _move(self, job_id: str, allowed: tuple[str, ...], status: str, text: str) -> None:
        def move(session: Session) -> str:
            job = find_job(session, job_id)
            if job is None:
                raise ApiError(404, f"no such fine-tuning job: {job_id!r}")
            if job.status not in allowed:
                raise ApiError(
                    400, f"job {job_id} is {job.status}; this is for {', '.join(allowed)} jobs"
                )
            job.status = status
            if status in ENDED:
                job.finished_at = now()
            tell(session, job_id, text)
            return job.status

        await self._database.run(move)
        await self._told()

    async def _ask(self, method: str, job_id: str) -> None:
        """What the engine is told of a job; without an engine the database alone says it."""
        engine = self._in_engine.get(job_id)
        if engine is None:
            return
        try:
            await engine.call(method, name=job_id)
        except (EngineUnavailable, EngineRefused) as error:
            # It is not in the engine, or not yet: `_start` looks at the status when it is.
            log.info("%s of %s: %s", method, job_id, error)

    # -- validation -------------------------------------------------------------------------------

    async def _validate(self, job_id: str) -> None:
        """Read a job's files; then queue it, or fail it."""
        job = await self.find(job_id)
        try:
            validated = await self._validation.read(job)
        except UnusableFiles as error:
            await self._fail(job_id, error.code, str(error), error.param)
            return

        def queue(session: Session) -> None:
            row = find_job(session, job_id)
            if row is None or row.status != "validating_files":
                return
            for kind, dataset in validated.datasets.items():
                tell_rows(session, job_id, kind, dataset)
            row.config, row.hyperparameters = validated.config, validated.hyperparameters
            row.status = "queued"
            tell(session, job_id, "Files validated, moving job to queued state")

        await self._database.run(queue)
        await self._told()
        await self._schedule()

    # -- the queue --------------------------------------------------------------------------------

    async def _schedule(self) -> None:
        """Give the engines as many jobs as may run: first those whose engine was lost."""
        async with self._scheduling:
            while not self.closing:
                running = await self._ids("running")
                given = [self._in_engine.get(job_id) for job_id in running]
                loads = [(given.count(engine), engine) for engine in self._engines.usable()]
                count, engine = min(loads, key=lambda load: load[0], default=(0, None))
                if engine is None or count >= self._config.server.max_running_jobs:
                    return
                lost = [job_id for job_id in running if job_id not in self._in_engine]
                waiting = lost or await self._ids("queued")
                if not waiting or not await self._start(waiting[0], engine):
                    return

    async def _start(self, job_id: str, engine: EngineClient) -> bool:
        """Give a job to an engine; False when it cannot take one now."""

        def mark(session: Session) -> dict[str, Any] | None:
            job = find_job(session, job_id)
            if job is None or job.status not in ("queued", "running"):
                return None
            if job.status == "queued":
                job.status = "running"
                tell(session, job_id, "Fine-tuning job started")
            if job.config is not None and len(self._engines.members) > 1:
                tell(session, job_id, f"Given to engine {engine.name}")
            return job.config

        config = await self._database.run(mark)
        await self._told()
        if config is None:
            return True
        self._in_engine[job_id] = engine
        try:
            await engine.call("start_job", config=config)
        except EngineUnavailable:
            self._in_engine.pop(job_id, None)
            return False  # `_engine_lost` and the next engine schedule again
        except EngineRefused as error:
            self._in_engine.pop(job_id, None)
            if "no free slot" in str(error):  # all adapters are in use at this moment
                asyncio.get_running_loop().call_later(1, lambda: self._spawn(self._schedule()))
                return False
            await self._fail(job_id, "invalid_request", str(error))
            return True
        except RuntimeError as error:
            self._in_engine.pop(job_id, None)
            await self._fail(job_id, "server_error", str(error))
            return True
        status = (await self.find(job_id)).status  # it may have changed meanwhile
        if status == "cancelled":
            await self._ask("cancel_job", job_id)
        elif status == "paused":
            await self._ask("pause_job", job_id)
        return True

    async def _fail(self, job_id: str, code: str, message: str, param: str | None = None) -> None:
        def fail(session: Session) -> None:
            job = find_job(session, job_id)
            if job is None or job.status in ENDED:
                return
            job.status, job.finished_at = "failed", now()
            job.error = {"code": code, "message": message, "param": param}
            tell(session, job_id, f"The job failed: {message}", level="error")

        await self._database.run(fail)
        await self._told()

    # -- the engines ------------------------------------------------------------------------------

    async def _engine_lost(self, engine: EngineClient) -> None:
        """Note which jobs ran: one that ends engines again and again is not given to another."""
        await self._reports.join()  # what the engine said before its end counts
        lost = [job_id for job_id, holder in self._in_engine.items() if holder is engine]
        for job_id in lost:
            del self._in_engine[job_id]
            self._known.pop(job_id, None)
            self._records.forget(job_id)

        def note(session: Session) -> None:
            query = select(JobRow).where(JobRow.id.in_(lost), JobRow.status == "running")
            for job in session.scalars(query):
                job.engine_losses += 1
                tell(session, job.id, "The engine ended; going on from the last checkpoint", "warn")
                if job.engine_losses >= _ENGINE_LOSSES:
                    text = f"the engine ended {job.engine_losses} times while this job ran"
                    job.status, job.finished_at = "failed", now()
                    job.error = {"code": "server_error", "message": text, "param": None}
                    tell(session, job.id, f"The job failed: {text}", level="error")

        await self._database.run(note)
        await self._told()
        await self._schedule()

    def _take(self, engine: EngineClient, stats: Stats) -> None:
        """Keep the reports that say something new, for `_follow`."""
        for report in stats.jobs:
            before = self._known.get(report.name)
            if before is None or report.losses or _summary(before) != _summary(report):
                self._known[report.name] = report
                self._reports.put_nowait(report)

    async def _follow(self) -> None:
        """Write down what the engine says of jobs, in order."""
        while True:
            report = await self._reports.get()
            try:
                note = partial(self._records.note, report=report)
                adapters = await self._database.run(note)
                for adapter in adapters:
                    self._models.adapters[adapter.name] = adapter
                if report.status in ENDED and report.name in self._in_engine:
                    del self._in_engine[report.name]
                    self._spawn(self._schedule())
                await self._told()
            except Exception:
                log.exception("the report of %s could not be written down", report.name)
            finally:
                self._reports.task_done()

    def _serve_finished(self, session: Session) -> None:
        """At the start: every adapter that jobs have made can be asked for."""
        for adapter in finished_adapters(session):
            if Path(adapter.path, "adapter_config.json").is_file():
                self._models.adapters[adapter.name] = adapter
            else:
                log.warning("adapter %s is gone from %s", adapter.name, adapter.path)

    # -- small things -----------------------------------------------------------------------------

    async def _ids(self, status: str) -> list[str]:
        """Jobs of a status, the oldest first."""
        query = select(JobRow.id).where(JobRow.status == status).order_by(JobRow.number)
        return await self._database.run(lambda s: list(s.scalars(query)))

    async def _told(self) -> None:
        await self._count()
        self.version += 1
        async with self.changed:
            self.changed.notify_all()

    async def _count(self) -> None:
        query = select(JobRow.status, func.count()).group_by(JobRow.status)
        rows = await self._database.run(lambda s: [(r[0], r[1]) for r in s.execute(query)])
        self._metrics.count_jobs(dict(rows))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a job's task failed", exc_info=error)


def _summary(report: JobReport) -> tuple:
    return report.status, report.step, len(report.messages), len(report.checkpoints)
