"""What requests about batches are answered with, as /openapi.json declares it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from flexllm_jax.server.finetuning.answers import Page
from flexllm_jax.server.http.openapi import READS, WITH_BODY, WRITES, Answers


class BatchCounts(BaseModel):
    """Requests of a batch."""

    total: int
    completed: int
    failed: int


class Batch(BaseModel):
    """A batch; times are Unix seconds."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    completed_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None


class BatchPage(Page):
    """GET /v1/batches."""

    data: list[Batch]


_BATCH = "/v1/batches/{batch_id}"
ANSWERS: Answers = {
    ("post", "/v1/batches"): ([Batch], (*WITH_BODY, 429, *WRITES)),
    ("get", "/v1/batches"): ([BatchPage], (400, *READS)),
    ("get", _BATCH): ([Batch], (404, *READS)),
    ("post", f"{_BATCH}/cancel"): ([Batch], (404, 409, *WRITES)),
}
