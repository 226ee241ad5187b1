"""Finetuning jobs from creation to a served adapter, whatever happens to either process.

The database says what a job is (`transitions`); an engine only runs those it is given, and of
several the one with the fewest jobs gets the next; what it says of them is written by `reports`. A
job whose engine is lost is given to another one, or to the next that starts, which goes on from its
newest checkpoint. Statuses: validating_files, queued, running, paused, succeeded, failed,
cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from flexllm_jax.config import Config
from flexllm_jax.config.sections.graders import asked_models
from flexllm_jax.server.database import Database, DatabaseUnavailable, JobRow
from flexllm_jax.server.engines.client import EngineClient, EngineRefused, EngineUnavailable
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.protocol import JobReport, Stats
from flexllm_jax.server.engines.registry import ModelRegistry, ServedAdapter
from flexllm_jax.server.finetuning import transitions
from flexllm_jax.server.finetuning.files import UNFINISHED, FileStore
from flexllm_jax.server.finetuning.records import JobRecords, find_job, finished_adapters, tell_once
from flexllm_jax.server.finetuning.reports import ReportWriter
from flexllm_jax.server.finetuning.schema import CreateJob, random_seed
from flexllm_jax.server.finetuning.tracking import ServerTracking
from flexllm_jax.server.finetuning.transitions import ToStart
from flexllm_jax.server.finetuning.validation import FileValidation, UnusableFiles
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.metrics import ServerMetrics

log = logging.getLogger(__name__)

_ANSWER_S = 10.0  # that an engine may take to pause, resume or cancel a job
_TRACKERS_S = 3.0  # that trackers may take at the end


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
        self._known: dict[str, JobReport] = {}  # what its engine last said of a job
        self._in_engine: dict[str, EngineClient] = {}  # which engine a job was given to
        self._losing: set[str] = set()  # jobs of an engine that has ended, until that is noted
        self._records = JobRecords(config, models, files)
        self._reports = ReportWriter(database, self._records, self._written)
        self._tracking = ServerTracking(
            config, database, engines, tokenizer, lambda: self._spawn(self._told())
        )
        self._scheduling = asyncio.Lock()
        self.closing = False
        self.version = 0  # counts events
        self.changed = asyncio.Condition()  # notified after every event
        engines.on_ready.append(lambda _: self._spawn(self._schedule()))
        engines.on_lost.append(self._take_lost)
        engines.on_stats.append(self._take)
        database.run_now(self._serve_finished)

    # -- the way in -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Go on with what an earlier process left."""
        await self._tracking.start()
        self._spawn(self._reports.run())
        self._spawn(self._tidy_up())
        for job_id in await self._ids("validating_files"):
            self._spawn(self._validate(job_id))
        await self._count()

    async def _tidy_up(self) -> None:
        """Find what is on disk and not in the database: checkpoints are taken in, files removed."""

        def find(session: Session) -> list[ServedAdapter]:
            jobs = session.scalars(select(JobRow).where(JobRow.config.is_not(None)))
            return [a for job in jobs for a in self._records.find_checkpoints(session, job)]

        for adapter in await self._database.until_written(find):
            self._models.adapters[adapter.name] = adapter
        await self._files.run()

    async def close(self, timeout_s: float) -> None:
        """After the engine's end: write down the last it said, if the database takes it within
        `timeout_s`; if not, the next engine tells it again."""
        if not await self._reports.all_settled(timeout_s):
            log.warning("the last of some jobs is not written; the next start tells it again")
        await self._tracking.close(_TRACKERS_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._validation.close()
        self._database.close()

    async def create(self, body: CreateJob, client: Client) -> JobRow:
        """Take a job in; its files are validated next. ApiError 400, 404 or 429."""
        body.check(self._config)
        adapter = self._models.resolve(body.model, client)
        for _, part in asked_models(body.rewards.grader) if body.rewards else ():
            self._models.resolve(part["model"], client)
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
            init_adapter=adapter.path if adapter else None,
        )
        limit = self._config.server.max_queued_jobs
        await self._database.run(lambda s: transitions.insert(s, job, limit, client))
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
        self._validation.stop(job_id)
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
        """Let a paused job go on, or one that has failed, from its newest checkpoint."""
        if (await self.find(job_id)).status == "failed":
            await self._revive(job_id)
        else:
            in_engine = job_id in self._in_engine
            status = "running" if in_engine else "queued"
            await self._move(job_id, ("paused",), status, "The job was resumed.")
            await self._ask("resume_job", job_id)
        self._spawn(self._schedule())
        return await self.find(job_id)

    async def _revive(self, job_id: str) -> None:
        folder = self._config.output_dir / job_id / "checkpoints"
        if not await asyncio.to_thread(_has_checkpoint, folder):
            raise ApiError(
                400, f"job {job_id} has failed and has no checkpoint to go on from: create another"
            )
        limit = self._config.server.max_queued_jobs
        await self._database.run(lambda s: transitions.revive(s, job_id, limit))
        await self._told()

    async def _move(self, job_id: str, allowed: tuple[str, ...], status: str, text: str) -> None:
        await self._database.run(lambda s: transitions.move(s, job_id, allowed, status, text))
        await self._told()

    async def _ask(self, method: str, job_id: str) -> None:
        """What the engine is told of a job; without an engine the database alone says it."""
        engine = self._in_engine.get(job_id)
        if engine is None:
            return
        try:
            await engine.call(method, _ANSWER_S, name=job_id)
        except (EngineUnavailable, EngineRefused) as error:
            # It is not in the engine, or not yet: `_start` looks at the status when it is.
            log.info("%s of %s: %s", method, job_id, error)

    # -- validation -------------------------------------------------------------------------------

    async def _validate(self, job_id: str) -> None:
        """Read a job's files; then queue it, or fail it."""
        job = await self._database.until_written(lambda s: find_job(s, job_id))
        if job is None:
            return
        async with self._validation.turns[job.owner]:
            begin = partial(transitions.begin_validation, job_id=job_id)
            job = await self._database.until_written(begin)
            if job is None:  # cancelled, or failed
                await self._told()
                return
            try:
                validated = await self._validation.read(job)
            except UnusableFiles as error:
                await self._fail(job_id, error.code, str(error), error.param)
                return
            except asyncio.CancelledError:  # the server stops
                with contextlib.suppress(DatabaseUnavailable):
                    self._database.run_now(partial(transitions.give_up_validation, job_id=job_id))
                raise
        await self._database.until_written(lambda s: transitions.queue(s, job_id, validated))
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
                    most = self._config.server.max_running_jobs
                    end = f"the end of one of the jobs that run: server.max_running_jobs={most}"
                    await self._tell_waiting(end if engine else "an engine that serves")
                    return
                lost = [job_id for job_id in running if job_id not in self._in_engine]
                waiting = lost or await self._ids("queued")
                if not waiting:
                    return
                await self._start(waiting[0], engine)

    async def _tell_waiting(self, reason: str, *job_ids: str) -> None:
        """Say once in the events of queued jobs, or of `job_ids`, what they wait for."""
        waiting = job_ids or await self._ids("queued")

        def tell(session: Session) -> None:
            for job_id in waiting:
                tell_once(session, job_id, f"Waiting for {reason}")

        if waiting:
            await self._database.until_written(tell)
            await self._told()

    async def _start(self, job_id: str, engine: EngineClient) -> None:
        """Give a job to an engine, which takes it when it has read its files."""
        told = engine.name if len(self._engines.members) > 1 else None
        begin = partial(transitions.start, job_id=job_id, given_to=told)
        given = await self._database.until_written(begin)
        if given is not None:
            self._in_engine[job_id] = engine
            self._spawn(self._begin(job_id, engine, given))
            await self._tracking.follow(job_id)
        await self._told()

    async def _begin(self, job_id: str, engine: EngineClient, given: ToStart) -> None:
        """Wait until the engine has a job, or refuses it."""
        try:
            await engine.call(
                "start_job",
                config=given.config,
                losses_known=given.losses_known,
                asked=self._asked(given.config),
            )
        except EngineUnavailable:
            if job_id not in self._losing:
                self._in_engine.pop(job_id, None)  # the next engine schedules again
            return
        except EngineRefused as error:
            self._in_engine.pop(job_id, None)
            if "no free slot" in str(error):  # all adapters are in use at this moment
                await self._tell_waiting(str(error), job_id)
                asyncio.get_running_loop().call_later(1, lambda: self._spawn(self._schedule()))
                return
            await self._fail(job_id, "invalid_request", str(error))
            return
        except RuntimeError as error:
            self._in_engine.pop(job_id, None)
            await self._fail(job_id, "server_error", str(error))
            return
        job = await self._database.until_written(lambda s: find_job(s, job_id))
        if job and job.status == "cancelled":  # meanwhile
            await self._ask("cancel_job", job_id)
        elif job and job.status == "paused":
            await self._ask("pause_job", job_id)

    def _asked(self, config: dict[str, Any]) -> dict[str, str]:
        """Folders of the adapters that a job's grader asks, by the engine's names."""
        paths = {own.engine_name: own.path for own in self._models.adapters.values()}
        parts = asked_models(config["method"].get("grader") or {})
        return {part["model"]: paths[part["model"]] for _, part in parts if part["model"] in paths}

    async def _fail(self, job_id: str, code: str, message: str, param: str | None = None) -> None:
        fail = partial(transitions.fail, job_id=job_id, code=code, message=message, param=param)
        await self._database.until_written(fail)
        await self._told()
        await self._schedule()

    # -- the engines ------------------------------------------------------------------------------

    def _take_lost(self, engine: EngineClient) -> None:
        """Called when an engine has ended unasked, before anybody whom it owed an answer."""
        lost = [job_id for job_id, holder in self._in_engine.items() if holder is engine]
        self._losing.update(lost)
        self._spawn(self._engine_lost(engine, lost))

    async def _engine_lost(self, engine: EngineClient, lost: list[str]) -> None:
        """Note which jobs ran; what the engine said of them before its end counts."""
        await self._reports.settled(engine)
        await self._database.until_written(lambda s: transitions.note_lost(s, lost))
        for job_id in lost:
            self._losing.discard(job_id)
            self._in_engine.pop(job_id, None)
            self._known.pop(job_id, None)
        await self._told()
        await self._schedule()

    def _take(self, engine: EngineClient, stats: Stats) -> None:
        for report in stats.jobs:
            self._known[report.name] = report
            self._reports.take(engine, report)

    async def _written(self, report: JobReport, adapters: list[ServedAdapter]) -> None:
        """What an engine said of a job is on disk."""
        for adapter in adapters:
            self._models.adapters[adapter.name] = adapter
        ended = any(fact.kind == "ended" for fact in report.facts)
        if ended and report.name in self._in_engine:
            del self._in_engine[report.name]
            self._spawn(self._schedule())
        await self._told()

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
        return await self._database.until_written(lambda s: list(s.scalars(query)))

    async def _told(self) -> None:
        await self._count()
        self.version += 1
        async with self.changed:
            self.changed.notify_all()

    async def _count(self) -> None:
        query = select(JobRow.status, func.count()).group_by(JobRow.status)
        with contextlib.suppress(DatabaseUnavailable):
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


def _has_checkpoint(folder: Path) -> bool:
    """Whether a whole one is in a job's folder (`finetune.checkpoint`): STEP, or STEP-ATTEMPT."""
    return any(path.name.split("-")[0].isdecimal() for path in folder.glob("*"))
