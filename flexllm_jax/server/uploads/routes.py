"""The routes under /v1/uploads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from flexllm_jax.server.database import File
from flexllm_jax.server.finetuning import answers
from flexllm_jax.server.finetuning.files import ExpiresAfter, describe
from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Known
from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.openapi import WITH_BODY, WRITES, Answers
from flexllm_jax.server.uploads.store import UploadRow, UploadStore, status_of


class CreateUpload(Body):
    """POST /v1/uploads."""

    bytes: Annotated[int, Field(ge=1)]
    filename: Annotated[str, Field(min_length=1, max_length=4096)]
    mime_type: Annotated[str, Field(max_length=255)]
    purpose: Literal["fine-tune", "batch"]
    expires_after: ExpiresAfter | None = None


class CompleteUpload(Body):
    """POST /v1/uploads/{upload_id}/complete."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=1000)]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None


def routes(store: UploadStore) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.post("/v1/uploads")
    async def create(body: CreateUpload, client: Known) -> Response:
        lifetime_s = body.expires_after.seconds if body.expires_after else None
        told = body.filename, body.purpose, body.bytes, lifetime_s
        return sse.json_response(_describe(await store.create(client, *told)))

    @router.post("/v1/uploads/{upload_id}/parts")
    async def add_part(upload_id: str, request: Request, client: Known) -> Response:
        part = await store.add_part(client, upload_id, request)
        told = {"id": part.id, "object": "upload.part", "created_at": part.created_at}
        return sse.json_response(told | {"upload_id": part.upload_id})

    @router.post("/v1/uploads/{upload_id}/complete")
    async def complete(upload_id: str, body: CompleteUpload, client: Known) -> Response:
        row, file = await store.complete(client, upload_id, body.part_ids, body.md5)
        return sse.json_response(_describe(row, file))

    @router.post("/v1/uploads/{upload_id}/cancel")
    async def cancel(upload_id: str, client: Known) -> Response:
        return sse.json_response(_describe(await store.cancel(client, upload_id)))

    return router


def _describe(row: UploadRow, file: File | None = None) -> dict[str, Any]:
    """An upload as OpenAI shows it."""
    return {
        "id": row.id,
        "object": "upload",
        "bytes": row.bytes,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": status_of(row),
        "file": describe(file) if file else None,
    }


class Upload(BaseModel):
    """A file that comes in parts; times are Unix seconds."""

    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: answers.File | None


class UploadPart(BaseModel):
    """A part of a file."""

    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


_UPLOAD = "/v1/uploads/{upload_id}"
ANSWERS: Answers = {
    ("post", "/v1/uploads"): ([Upload], (*WITH_BODY, *WRITES)),
    ("post", f"{_UPLOAD}/parts"): ([UploadPart], (404, *WITH_BODY, *WRITES)),
    ("post", f"{_UPLOAD}/complete"): ([Upload], (404, *WITH_BODY, *WRITES)),
    ("post", f"{_UPLOAD}/cancel"): ([Upload], (400, 404, *WRITES)),
}
