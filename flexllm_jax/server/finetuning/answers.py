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


class GraderValidation(BaseModel):
    """POST /v1/fine_tuning/alpha/graders/validate: the grader, as it was sent."""

    grader: dict[str, Any]


class GradeErrors(BaseModel):
    """What went wrong; `details` says of each what."""

    formula_parse_error: bool
    sample_parse_error: bool
    truncated_observation_error: bool
    unresponsive_reward_error: bool
    invalid_variable_error: bool
    other_error: bool
    python_grader_server_error: bool
    python_grader_server_error_type: str | None
    python_grader_runtime_error: bool
    python_grader_runtime_error_details: str | None
    model_grader_server_error: bool
    model_grader_server_error_details: str | None
    model_grader_refusal_error: bool
    model_grader_parse_error: bool
    details: dict[str, str]


class GradeMetadata(BaseModel):
    """How a reward came about."""

    name: str
    type: str
    errors: GradeErrors
    execution_time: float
    scores: dict[str, float | None]
    token_usage: int | None
    sampled_model_name: str | None


class GradeUsage(BaseModel):
    """Tokens of a model that graded."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    cached_tokens: int


class GraderRun(BaseModel):
    """POST /v1/fine_tuning/alpha/graders/run; a sample without a reward has 0, and an error."""

    reward: float
    metadata: GradeMetadata
    sub_rewards: dict[str, float | None]
    model_grader_token_usage_per_model: dict[str, GradeUsage]


_GRADERS = "/v1/fine_tuning/alpha/graders"


class JobSample(BaseModel):
    """An answer that a reinforcement job was trained on."""

    item: dict[str, Any]
    text: str
    reward: float
    error: str | None = None


class JobSamples(BaseModel):
    """GET /v1/fine_tuning/jobs/{job_id}/samples: of the last batch; none of other jobs."""

    object: Literal["list"]
    data: list[JobSample]


_JOBS, _JOB = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}"
ANSWERS: Answers = {
    ("post", "/v1/files"): ([File], (*WITH_BODY, *WRITES)),
    ("get", "/v1/files"): ([FilePage], (400, *READS)),
    ("get", "/v1/files/{file_id}"): ([File], (404, *READS)),
    ("delete", "/v1/files/{file_id}"): ([Deleted], (404, 409, *WRITES)),
    ("get", "/v1/files/{file_id}/content"): ([{"application/octet-stream": BYTES}], (404, *READS)),
    ("post", f"{_GRADERS}/validate"): ([GraderValidation], WITH_BODY),
    ("post", f"{_GRADERS}/run"): ([GraderRun], WITH_BODY),
    ("post", _JOBS): ([Job], (*WITH_BODY, 404, 429, *WRITES)),
    ("get", _JOBS): ([JobPage], (400, *READS)),
    ("get", _JOB): ([Job], (404, *READS)),
    ("post", f"{_JOB}/cancel"): ([Job], (400, 404, *WRITES)),
    ("post", f"{_JOB}/pause"): ([Job], (400, 404, *WRITES)),
    ("post", f"{_JOB}/resume"): ([Job], (400, 404, 429, *WRITES)),
    ("get", f"{_JOB}/events"): ([JobEventPage, EVENTS], (400, 404, *READS)),
    ("get", f"{_JOB}/samples"): ([JobSamples], (404, *READS)),
    ("get", f"{_JOB}/checkpoints"): ([JobCheckpointPage], (400, 404, *READS)),
}
