"""What the server answers, as /openapi.json declares it: the shapes that OpenAI's clients read.

The answers themselves are built as plain data where they arise (a stream sends one a token); a test
holds every answer against these declarations.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]
JobStatus = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]


class ErrorDetails(BaseModel):
    """What went wrong, in one line; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The body of every status from 400 on."""

    error: ErrorDetails


class PromptTokensDetails(BaseModel):
    """Tokens that were in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Per token; None for the first of a prompt, which nothing predicts."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenLogprob(BaseModel):
    """A token, and the bytes it stands for."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenTokenLogprob(TokenLogprob):
    """A token of the output, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Per token."""

    content: list[ChosenTokenLogprob] | None


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None


class ChatChoice(BaseModel):
    """One output."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]


class ChatCompletion(BaseModel):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """A model that requests can name; `parent` is an adapter's base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """POST /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    """POST /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """GET /tokenizer_info."""

    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


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


class Health(BaseModel):
    """GET /health."""

    status: Literal["ok"]


class Version(BaseModel):
    """GET /version."""

    version: str
