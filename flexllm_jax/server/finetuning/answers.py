"""What requests about files and finetuning jobs are answered with, as /openapi.json declares it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from flexllm_jax.server.http.openapi import BYTES, EVENTS, READS, WITH_BODY, WRITES, Answers

JobStatus = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]


class File(BaseModel):
    """An uploaded or made file; times are Unix seconds."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class Deleted(BaseModel):
    """DELETE of a file."""

    id: str
    object: Literal["file"]
    deleted: bool


class Page(BaseModel):
    """A part of a list; the next one is asked for with `after=last_id`."""

    object: Literal["list"]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FilePage(Page):
    """GET /v1/files."""

    data: list[File]


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class Job(BaseModel):
    """A finetuning job; times are Unix seconds."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: JobStatus
    error: JobError | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: dict[str, Any]
    metadata: dict[str, str] | None
    integrations: list[dict[str, Any]]


class JobPage(Page):
    """GET /v1/fine_tuning/jobs."""

    data: list[Job]


class JobEvent(BaseModel):
    """What happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class JobEventPage(Page):
    """GET /v1/fine_tuning/jobs/{job_id}/events."""

    data: list[JobEvent]


class JobCheckpoint(BaseModel):
    """A checkpoint of a job, which can be served."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float | None]
    step_number: int


class JobCheckpointPage(Page):
    """GET /v1/fine_tuning/jobs/{job_id}/checkpoints."""

    data: list[JobCheckpoint]


_JOBS, _JOB = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}"
ANSWERS: Answers = {
    ("post", "/v1/files"): ([File], (*WITH_BODY, *WRITES)),
    ("get", "/v1/files"): ([FilePage], (400, *READS)),
    ("get", "/v1/files/{file_id}"): ([File], (404, *READS)),
    ("delete", "/v1/files/{file_id}"): ([Deleted], (404, 409, *WRITES)),
    ("get", "/v1/files/{file_id}/content"): ([{"application/octet-stream": BYTES}], (404, *READS)),
    ("post", _JOBS): ([Job], (*WITH_BODY, 404, 429, *WRITES)),
    ("get", _JOBS): ([JobPage], (400, *READS)),
    ("get", _JOB): ([Job], (404, *READS)),
    ("post", f"{_JOB}/cancel"): ([Job], (400, 404, *WRITES)),
    ("post", f"{_JOB}/pause"): ([Job], (400, 404, *WRITES)),
    ("post", f"{_JOB}/resume"): ([Job], (400, 404, 429, *WRITES)),
    ("get", f"{_JOB}/events"): ([JobEventPage, EVENTS], (400, 404, *READS)),
    ("get", f"{_JOB}/checkpoints"): ([JobCheckpointPage], (400, 404, *READS)),
}
