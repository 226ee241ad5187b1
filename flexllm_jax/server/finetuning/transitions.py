"""How the row of a job changes: created, started, moved by a user, failed, its engine lost.

All functions run inside of a transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from flexllm_jax.server.database import JobRow, now
from flexllm_jax.server.finetuning.files import UNFINISHED
from flexllm_jax.server.finetuning.records import find_job, losses_of, tell, tell_rows
from flexllm_jax.server.finetuning.validation import ValidatedJob
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.shares import fair_room

ENDED = ("succeeded", "failed", "cancelled")
_VALIDATIONS = 3  # that may begin and come to no end, before the files are to blame
_ENGINE_LOSSES = 3  # engines that may end while a job gets no further, before it is to blame


def insert(session: Session, job: JobRow, limit: int, client: Client) -> None:
    """Take a job in; ApiError 429 when `limit` are not done, or more of one of several keys than it
    leaves to the others."""
    check_queue(session, limit)
    if not client.sees_all:
        query = select(func.count()).where(JobRow.status.in_(UNFINISHED))
        free = limit - (session.scalar(query) or 0)
        own = session.scalar(query.where(JobRow.owner == client.owner)) or 0
        if fair_room(free, own) < 1:
            message = f"key {client.name!r} has {own} jobs that are not done, and {free} are left "
            message += "for all keys: wait for one of its own"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=60)
    session.add(job)
    session.flush()
    tell(session, job.id, f"Created fine-tuning job: {job.id}")
    tell(session, job.id, f"Validating training file: {job.training_file}")


def check_queue(session: Session, limit: int) -> None:
    """ApiError 429 when `limit` jobs are not done."""
    query = select(func.count()).where(JobRow.status.in_(UNFINISHED))
    if (session.scalar(query) or 0) >= limit:
        message = f"there are {limit} jobs that are not done: wait for one"
        raise ApiError(429, message, retry_after_s=60)


def begin_validation(session: Session, job_id: str) -> JobRow | None:
    """The job whose files are to be read; None when it need not be, or has ended the server too
    often."""
    row = find_job(session, job_id)
    if row is None or row.status != "validating_files":
        return None
    begun = row.validations or 0
    if begun >= _VALIDATIONS:
        text = f"the server ended {begun} times while the job's files were read"
        fail(session, job_id, "invalid_training_file", text, "training_file")
        return None
    row.validations = begun + 1
    return row


def give_up_validation(session: Session, job_id: str) -> None:
    """The server stops while a job's files are read, which is not their fault."""
    if (row := find_job(session, job_id)) is not None and row.validations:
        row.validations -= 1


def queue(session: Session, job_id: str, validated: ValidatedJob) -> None:
    """A job's files are read; it waits for an engine."""
    row = find_job(session, job_id)
    if row is None or row.status != "validating_files":
        return
    for kind, dataset in validated.datasets.items():
        tell_rows(session, job_id, kind, dataset)
    row.config, row.hyperparameters = validated.config, validated.hyperparameters
    row.questions = validated.questions
    row.status = "queued"
    tell(session, job_id, "Files validated, moving job to queued state")


@dataclass(frozen=True)
class ToStart:
    """What an engine is given: a job's configuration, and how many first losses are known."""

    config: dict[str, Any]
    losses_known: int


def start(session: Session, job_id: str, given_to: str | None) -> ToStart | None:
    """A job is given to an engine, told by its name if there are several; None: it is not to run
    any more."""
    job = find_job(session, job_id)
    if job is None or job.status not in ("queued", "running") or job.config is None:
        return None
    if job.status == "queued":
        job.status = "running"
        tell(session, job_id, "Fine-tuning job started")
    if given_to is not None:
        tell(session, job_id, f"Given to engine {given_to}")
    losses, known = losses_of(session, job_id), 0
    while known + 1 in losses:
        known += 1
    return ToStart(job.config, known)


def move(session: Session, job_id: str, allowed: tuple[str, ...], status: str, text: str) -> None:
    """A user moves a job; ApiError 404, or 400 for one that is in no `allowed` status."""
    job = find_job(session, job_id)
    if job is None:
        raise ApiError(404, f"no such fine-tuning job: {job_id!r}")
    if job.status not in allowed:
        raise ApiError(400, f"job {job_id} is {job.status}; this is for {', '.join(allowed)} jobs")
    job.status = status
    if status in ENDED:
        job.finished_at = now()
    tell(session, job_id, text)


def revive(session: Session, job_id: str, limit: int) -> None:
    """Queue a failed job that has a checkpoint; ApiError 400 or 429."""
    check_queue(session, limit)
    move(session, job_id, ("failed",), "queued", "The job was resumed.")
    job = find_job(session, job_id)
    assert job is not None
    job.error, job.finished_at = None, None
    job.engine_losses, job.lost_at_step = 0, None


def fail(session: Session, job_id: str, code: str, message: str, param: str | None = None) -> None:
    """A job cannot go on."""
    job = find_job(session, job_id)
    if job is None or job.status in ENDED:
        return
    job.status, job.finished_at = "failed", now()
    job.error = {"code": code, "message": message, "param": param}
    tell(session, job_id, f"The job failed: {message}", level="error")


def note_lost(session: Session, lost: list[str]) -> None:
    """The engine of these jobs has ended. One that gets no further, again and again, is held to be
    the reason, and fails."""
    for job in session.scalars(
        select(JobRow).where(JobRow.id.in_(lost), JobRow.status == "running")
    ):
        reached = max(losses_of(session, job.id), default=0)
        further = reached > (job.lost_at_step or 0)
        job.engine_losses = 0 if further else job.engine_losses + 1
        job.lost_at_step = reached
        tell(session, job.id, "The engine ended; going on from the last checkpoint", "warn")
        if job.engine_losses >= _ENGINE_LOSSES:
            text = f"the engine ended {job.engine_losses} times while this job got no further"
            fail(session, job.id, "server_error", f"{text} than step {reached}")
