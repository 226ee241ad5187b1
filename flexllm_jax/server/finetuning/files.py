"""OpenAI's files: uploads stream to disk, under names that the server makes up."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from flexllm_jax.config import ServerSection
from flexllm_jax.server.finetuning.database import Database, File, JobRow
from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Client, Known
from flexllm_jax.server.http.errors import ApiError

log = logging.getLogger(__name__)

PURPOSES = ("fine-tune",)
UNFINISHED = ("validating_files", "queued", "running", "paused")
_PIECE = 1 << 20
_AT_ONCE = 64  # uploads; others wait, unread


class FileStore:
    """The bytes in `folder`, the rest in the database."""

    def __init__(self, folder: Path, database: Database, section: ServerSection):
        self.folder, self.database, self.section = folder, database, section
        folder.mkdir(parents=True, exist_ok=True)
        self._started = time.time()
        self.uploads = asyncio.Semaphore(_AT_ONCE)

    async def remove_leftovers(self) -> None:
        """Remove what uploads left that a killed process had not finished: parts, and files that
        are not in the database. A database without any files may be the wrong one: then all
        stay."""
        known = await self.database.run(lambda s: set(s.scalars(select(File.id))))
        if not known:
            return

        def remove() -> None:
            for path in self.folder.glob("file-*"):
                if path.name not in known and path.stat().st_mtime < self._started - 1:
                    path.unlink(missing_ok=True)

        try:
            await asyncio.to_thread(remove)
        except OSError as error:
            log.warning("leftovers of uploads stay: %s", error)

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file lie; only for ids that are in the database."""
        return self.folder / file_id

    async def find(self, file_id: str, client: Client, param: str | None = None) -> File:
        """A file by its id; ApiError 404 where it is not the client's, too."""
        file = await self.database.run(lambda s: s.get(File, file_id))
        if file is None or not client.may_see(file.owner):
            raise ApiError(404 if param is None else 400, f"no such file: {file_id!r}", param=param)
        return file

    async def save(self, upload: UploadFile, purpose: str, owner: str | None) -> File:
        """Keep an upload; ApiError 413 when it or all files together become too large."""
        used = await self.database.run(lambda s: s.scalar(select(func.sum(File.bytes)))) or 0
        limit = min(self.section.max_upload_bytes, self.section.max_storage_bytes - used)
        file_id = new_file_id()
        part = self.folder / f"{file_id}.part"

        def copy() -> int:
            size = 0
            with part.open("wb") as out:
                while piece := upload.file.read(_PIECE):
                    size += len(piece)
                    if size > limit:
                        return size
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            return size

        try:
            size = await asyncio.to_thread(copy)
            if size > limit:
                raise ApiError(
                    413,
                    f"the file is larger than the {max(limit, 0)} bytes left for it: send a "
                    f"smaller one, or delete files",
                    param="file",
                )
            if not size:
                raise ApiError(400, "the file is empty", param="file")
            part.rename(self.path(file_id))
        finally:
            part.unlink(missing_ok=True)
        name = (upload.filename or "upload").encode("utf-8", "replace").decode()
        file = File(id=file_id, filename=name, purpose=purpose, bytes=size, owner=owner)
        await self.database.run(lambda s: s.add(file))
        return file


def new_file_id() -> str:
    """An id that no other file has."""
    return f"file-{uuid.uuid4().hex}"


def describe(file: File) -> dict[str, Any]:
    """A file as OpenAI shows it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def page(rows: list[Any], limit: int) -> dict[str, Any]:
    """A page of a list; `rows` has one more than `limit` when there are more."""
    shown = rows[:limit]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(rows) > limit,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


Limit = Annotated[int, Query(ge=1, le=10_000)]
After = Annotated[str | None, Query(max_length=200)]


def routes(store: FileStore) -> APIRouter:
    """The routes under /v1/files."""
    router = APIRouter()

    @router.post("/v1/files")
    async def upload(request: Request, client: Known) -> Response:
        async with store.uploads:
            try:
                parser = MultiPartParser(request.headers, request.stream(), max_files=1)
                form = await parser.parse()
            except (MultiPartException, KeyError) as error:
                reason = getattr(error, "message", "no boundary")
                raise ApiError(400, f"the body is not a multipart form: {reason}") from None
            try:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise ApiError(400, "file: is missing; send it as a form field", param="file")
                if purpose not in PURPOSES:
                    message = f"purpose: got {purpose!r}; must be one of {PURPOSES}"
                    raise ApiError(400, message, param="purpose")
                saved = await store.save(file, str(purpose), client.owner)
            finally:
                await form.close()
        return sse.json_response(describe(saved))

    @router.get("/v1/files")
    async def list_files(
        client: Known,
        after: After = None,
        limit: Limit = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Response:
        rising = order == "asc"
        time = File.created_at

        def read(session: Session) -> list[dict[str, Any]]:
            query = select(File).where(client.visible(File.owner))
            query = query.order_by(time.asc() if rising else time.desc(), File.id)
            if purpose is not None:
                query = query.where(File.purpose == purpose)
            if after is not None and (last := session.get(File, after)) is not None:
                beyond = time > last.created_at if rising else time < last.created_at
                beyond |= (time == last.created_at) & (File.id > last.id)
                query = query.where(beyond)
            return [describe(file) for file in session.scalars(query.limit(limit + 1))]

        return sse.json_response(page(await store.database.run(read), limit))

    @router.get("/v1/files/{file_id}")
    async def show(file_id: str, client: Known) -> Response:
        return sse.json_response(describe(await store.find(file_id, client)))

    @router.get("/v1/files/{file_id}/content")
    async def content(file_id: str, client: Known) -> Response:
        file = await store.find(file_id, client)
        return FileResponse(store.path(file.id), media_type="application/octet-stream")

    @router.delete("/v1/files/{file_id}")
    async def delete(file_id: str, client: Known) -> Response:
        file = await store.find(file_id, client)

        def forget(session: Session) -> str | None:
            used = (JobRow.training_file == file_id) | (JobRow.validation_file == file_id)
            query = select(JobRow.id).where(used, JobRow.status.in_(UNFINISHED))
            user = session.scalars(query).first()
            if user is None:
                session.delete(session.merge(file))
            return user

        if user := await store.database.run(forget):
            raise ApiError(409, f"job {user} still needs the file: cancel it first")
        store.path(file.id).unlink(missing_ok=True)
        return sse.json_response({"id": file.id, "object": "file", "deleted": True})

    return router
