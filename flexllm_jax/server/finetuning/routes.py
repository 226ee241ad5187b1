"""The routes under /v1/fine_tuning/jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from flexllm_jax.config import Config
from flexllm_jax.server.database import CheckpointRow, Database, EventRow, JobRow
from flexllm_jax.server.finetuning.files import After, newest, page
from flexllm_jax.server.finetuning.jobs import JobManager
from flexllm_jax.server.finetuning.schema import CreateJob
from flexllm_jax.server.finetuning.transitions import ENDED
from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Known

_Limit = Annotated[int, Query(ge=1, le=1000)]
_READ_AT_ONCE = 1000  # events: the database's one thread is soon free for others


def describe_job(job: JobRow, organization: str) -> dict[str, Any]:
    """A job as OpenAI shows it."""
    request = job.request
    kind = (request.get("method") or {}).get("type", "supervised")
    told = (request.get("method") or {}).get(kind) or {}
    grader = {"grader": told["grader"]} if "grader" in told else {}
    method = {"type": kind, kind: grader | {"hyperparameters": job.hyperparameters}}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": organization,
        "status": job.status,
        "error": job.error,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens,
        "seed": request["seed"],
        "hyperparameters": job.hyperparameters,
        "method": method,
        "metadata": request.get("metadata"),
        "integrations": request.get("integrations") or [],
        "estimated_finish": None,
        "user_provided_suffix": request.get("suffix"),
    }


def describe_event(event: EventRow) -> dict[str, Any]:
    """An event as OpenAI shows it."""
    return {
        "id": f"ftevent-{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def describe_checkpoint(row: CheckpointRow) -> dict[str, Any]:
    """A checkpoint as OpenAI shows it."""
    return {
        "id": f"ftckpt-{row.number}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": row.created_at,
        "fine_tuned_model_checkpoint": row.name,
        "fine_tuning_job_id": row.job_id,
        "metrics": row.metrics,
        "step_number": row.step,
    }


def routes(config: Config, database: Database, jobs: JobManager) -> APIRouter:
    """The routes."""
    router, organization = APIRouter(), config.server.organization

    def show(job: JobRow) -> Response:
        return sse.json_response(describe_job(job, organization))

    @router.post("/v1/fine_tuning/jobs")
    async def create(body: CreateJob, client: Known) -> Response:
        return show(await jobs.create(body, client))

    @router.get("/v1/fine_tuning/jobs")
    async def list_jobs(client: Known, after: After = None, limit: _Limit = 20) -> Response:
        def read(session: Session) -> list[dict[str, Any]]:
            listed = session.scalars(newest(JobRow, client, after, limit))
            return [describe_job(job, organization) for job in listed]

        return sse.json_response(page(await database.run(read), limit))

    @router.get("/v1/fine_tuning/jobs/{job_id}")
    async def retrieve(job_id: str, client: Known) -> Response:
        return show(await jobs.find(job_id, client))

    @router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
    async def cancel(job_id: str, client: Known) -> Response:
        await jobs.find(job_id, client)
        return show(await jobs.cancel(job_id))

    @router.post("/v1/fine_tuning/jobs/{job_id}/pause")
    async def pause(job_id: str, client: Known) -> Response:
        await jobs.find(job_id, client)
        return show(await jobs.pause(job_id))

    @router.post("/v1/fine_tuning/jobs/{job_id}/resume")
    async def resume(job_id: str, client: Known) -> Response:
        await jobs.find(job_id, client)
        return show(await jobs.resume(job_id))

    @router.get("/v1/fine_tuning/jobs/{job_id}/events")
    async def events(
        job_id: str, client: Known, after: After = None, limit: _Limit = 20, stream: bool = False
    ) -> Response:
        await jobs.find(job_id, client)
        if stream:
            return sse.EventStream(_stream_events(database, jobs, job_id))

        def read(session: Session) -> list[dict[str, Any]]:
            query = select(EventRow).where(EventRow.job_id == job_id)
            query = query.order_by(EventRow.number.desc())
            if after is not None:
                query = query.where(EventRow.number < _number(after))
            return [describe_event(e) for e in session.scalars(query.limit(limit + 1))]

        return sse.json_response(page(await database.run(read), limit))

    @router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
    async def checkpoints(
        job_id: str, client: Known, after: After = None, limit: _Limit = 10
    ) -> Response:
        await jobs.find(job_id, client)

        def read(session: Session) -> list[dict[str, Any]]:
            query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
            query = query.where(CheckpointRow.deleted.is_not(True))
            query = query.order_by(CheckpointRow.step.desc())
            if after is not None:
                last = session.get(CheckpointRow, _number(after))
                query = query.where(CheckpointRow.step < (last.step if last else -1))
            return [describe_checkpoint(row) for row in session.scalars(query.limit(limit + 1))]

        return sse.json_response(page(await database.run(read), limit))

    @router.get("/v1/fine_tuning/jobs/{job_id}/samples")
    async def samples(job_id: str, client: Known) -> Response:
        await jobs.find(job_id, client)
        path = config.output_dir / job_id / "samples.json"
        return sse.json_response({"object": "list", "data": await asyncio.to_thread(_read, path)})

    return router


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _number(identifier: str) -> int:
    """The number in an event's or checkpoint's id; of none, -1."""
    text = identifier.rsplit("-", 1)[-1]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 18 else -1


async def _stream_events(
    database: Database, jobs: JobManager, job_id: str
) -> AsyncGenerator[bytes]:
    """All events of a job from its first to its last, as they come."""
    seen = 0

    def read(session: Session) -> tuple[list[EventRow], str]:
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.number > seen)
        status = session.scalars(select(JobRow.status).where(JobRow.id == job_id)).one()
        query = query.order_by(EventRow.number).limit(_READ_AT_ONCE)
        return list(session.scalars(query)), status

    while not jobs.closing:
        rows, status = await database.run(read)
        for row in rows:
            seen = row.number
            yield sse.event(describe_event(row))
        if len(rows) == _READ_AT_ONCE:
            continue  # there may be more
        if status in ENDED:
            break
        async with jobs.changed:
            try:
                await asyncio.wait_for(jobs.changed.wait(), 5)
            except TimeoutError:
                yield b": still there\n\n"
    yield sse.DONE
