"""The routes under /v1/batches."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import Field
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from flexllm_jax.server.batches.records import ENDED, describe
from flexllm_jax.server.batches.runner import BatchRunner
from flexllm_jax.server.database import BatchRow, Database, now
from flexllm_jax.server.finetuning.files import After, ExpiresAfter, FileStore, newest, page
from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Client, Known
from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.shares import fair_room

_WINDOW_S = 24 * 3600
_MOST = 100  # batches that are not done
_Limit = Annotated[int, Query(ge=1, le=100)]
_Label = Annotated[str, Field(max_length=512)]


class CreateBatch(Body):
    """POST /v1/batches."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=64)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[str, _Label], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


def routes(database: Database, files: FileStore, runner: BatchRunner) -> APIRouter:
    """The routes."""
    router = APIRouter()

    async def find(batch_id: str, client: Client) -> BatchRow:
        query = select(BatchRow).where(BatchRow.id == batch_id)
        row = await database.run(lambda s: s.scalars(query).first())
        if row is None or not client.may_see(row.owner):
            raise ApiError(404, f"no such batch: {batch_id!r}")
        return row

    @router.post("/v1/batches")
    async def create(body: CreateBatch, client: Known) -> Response:
        file = await files.find(body.input_file_id, client, "input_file_id")
        if file.purpose != "batch":
            message = f"input_file_id: the file's purpose is {file.purpose}; must be batch"
            raise ApiError(400, message, param="input_file_id")
        expiry = body.output_expires_after
        row = BatchRow(
            id=f"batch_{secrets.token_hex(16)}",
            status="validating",
            endpoint=body.endpoint,
            input_file_id=file.id,
            completion_window=body.completion_window,
            labels=body.metadata,
            owner=client.owner,
            created_at=now(),
            expires_at=now() + _WINDOW_S,
            output_expires_after=expiry.seconds if expiry else None,
        )

        def insert(session: Session) -> None:
            query = select(func.count()).where(BatchRow.status.not_in(ENDED))
            free, held = _MOST - (session.scalar(query) or 0), 0
            if not client.sees_all:
                held = session.scalar(query.where(BatchRow.owner == client.owner)) or 0
            if (fair_room(free, held) if held else free) < 1:
                message = "there are as many batches as may be that are not done: wait for one"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=60)
            session.add(row)

        await database.run(insert)
        runner.begin(row.id)
        return sse.json_response(describe(row))

    @router.get("/v1/batches")
    async def list_batches(client: Known, after: After = None, limit: _Limit = 20) -> Response:
        def read(session: Session) -> list[dict[str, Any]]:
            return [describe(r) for r in session.scalars(newest(BatchRow, client, after, limit))]

        return sse.json_response(page(await database.run(read), limit))

    @router.get("/v1/batches/{batch_id}")
    async def retrieve(batch_id: str, client: Known) -> Response:
        return sse.json_response(describe(await find(batch_id, client)))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str, client: Known) -> Response:
        row = await find(batch_id, client)
        if row.status in ENDED:
            raise ApiError(409, f"batch {batch_id} is {row.status}, and is not cancelled any more")
        return sse.json_response(describe(await runner.cancel(batch_id)))

    return router
