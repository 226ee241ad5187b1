"""OpenAI's files: uploads stream to disk, under names that the server makes up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import Field, ValidationError
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session
from starlette.datastructures import FormData, UploadFile

from flexllm_jax.config import ServerSection
from flexllm_jax.server.database import BatchRow, Database, File, JobRow, now
from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Client, Known
from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.forms import form_with_file
from flexllm_jax.server.http.shares import Shares

log = logging.getLogger(__name__)

PURPOSES = ("fine-tune", "batch")
UNFINISHED = ("validating_files", "queued", "running", "paused")
UNFINISHED_BATCHES = ("validating", "in_progress", "finalizing", "cancelling")
_EXPIRED_EVERY_S = 30.0
_PIECE = 1 << 20
_COPIES_AT_ONCE = 4


class ExpiresAfter(Body):
    """When a file is deleted: so long after it was made, an hour to 30 days."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class FileStore:
    """The bytes in `folder`, the rest in the database."""

    def __init__(self, folder: Path, database: Database, section: ServerSection, several: bool):
        self.folder, self.database, self.section = folder, database, section
        folder.mkdir(parents=True, exist_ok=True)
        self._started = time.time()
        self.also_tidied: list[Callable[[], Awaitable[None]]] = []  # as often as files
        # Of what is kept, and of what is under way.
        self.storage = Shares(section.max_storage_bytes, several)
        query = select(File.owner, func.sum(File.bytes)).where(File.purpose.in_(PURPOSES))
        query = query.group_by(File.owner)
        for owner, size in database.run_now(lambda s: list(s.execute(query))):
            self.storage.add(owner, size)
        self._copying = ThreadPoolExecutor(_COPIES_AT_ONCE, thread_name_prefix="upload")

    async def remove_leftovers(self) -> None:
        """Remove what uploads left that a killed process had not finished: parts, and files that
        are not in the database. A database without any files may be the wrong one: then all
        stay."""
        known = await self.database.run(lambda s: set(s.scalars(select(File.id))))
        if not known:
            return

        await remove_unknown(self.folder, "file-*", known, self._started)

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file lie; only for ids that are in the database."""
        return self.folder / file_id

    async def find(self, file_id: str, client: Client, param: str | None = None) -> File:
        """A file by its id; ApiError 404 where it is not the client's, too."""
        file = await self.database.run(lambda s: s.get(File, file_id))
        expired = file is not None and file.expires_at is not None and file.expires_at <= now()
        if file is None or expired or not client.may_see(file.owner):
            raise ApiError(404 if param is None else 400, f"no such file: {file_id!r}", param=param)
        return file

    async def write(self, path: Path, pieces: Iterable[bytes], param: str) -> int:
        """Write a file that is there as a whole or not at all; its bytes. ApiError 413 when it is
        too large, 400 when it is empty; `param` is the field it came in."""
        limit, part = self.section.max_upload_bytes, path.with_suffix(".part")

        def copy() -> int:
            size = 0
            with part.open("wb") as out:
                for piece in pieces:
                    size += len(piece)
                    if size > limit:
                        return size
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            return size

        try:
            size = await asyncio.get_running_loop().run_in_executor(self._copying, copy)
            if size > limit:
                message = f"the file is larger than {limit} bytes: send a smaller one"
                raise ApiError(413, message, param=param)
            if not size:
                raise ApiError(400, "the file is empty", param=param)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
        return size

    async def save(
        self,
        pieces: Iterable[bytes],
        name: str | None,
        purpose: str,
        owner: str | None,
        lifetime_s: int | None = None,
        beside: Callable[[Session, File], None] | None = None,
    ) -> File:
        """Keep a file, for which room is held; what `beside` writes is written with it or, when it
        raises, neither is."""
        file_id = new_file_id()
        size = await self.write(self.path(file_id), pieces, "file")
        name = (name or "upload").encode("utf-8", "replace").decode()
        file = File(id=file_id, filename=name, purpose=purpose, bytes=size, owner=owner)
        file.expires_at = None if lifetime_s is None else now() + lifetime_s

        def insert(session: Session) -> None:
            if beside is not None:
                beside(session, file)
            session.add(file)

        try:
            await self.database.run(insert)
        except ApiError:
            self.path(file_id).unlink(missing_ok=True)
            raise
        return file

    async def delete(self, file: File) -> None:
        """Forget a file; ApiError 409 while something needs it."""

        def forget(session: Session) -> bool:
            used = (JobRow.training_file == file.id) | (JobRow.validation_file == file.id)
            jobs = select(JobRow.id).where(used, JobRow.status.in_(UNFINISHED))
            batches = select(BatchRow.id).where(BatchRow.input_file_id == file.id)
            batches = batches.where(BatchRow.status.in_(UNFINISHED_BATCHES))
            for kind, query in (("job", jobs), ("batch", batches)):
                if (user := session.scalars(query).first()) is not None:
                    raise ApiError(409, f"{kind} {user} still needs the file: cancel it first")
            row = session.get(File, file.id)  # another request may have deleted it meanwhile
            if row is not None:
                session.delete(row)
            return row is not None

        if await self.database.run(forget) and file.purpose in PURPOSES:
            self.storage.add(file.owner, -file.bytes)
        self.path(file.id).unlink(missing_ok=True)

    async def run(self) -> None:
        """Tidy up: now what a killed process left, and from time to time what has expired."""
        await self.remove_leftovers()
        while True:
            query = select(File).where(File.expires_at <= now())
            for file in await self.database.until_written(lambda s, q=query: list(s.scalars(q))):
                with contextlib.suppress(ApiError):  # something still needs it
                    await self.delete(file)
            for tidy in self.also_tidied:
                await tidy()
            await asyncio.sleep(_EXPIRED_EVERY_S)


async def remove_unknown(folder: Path, pattern: str, known: Set[str], started: float) -> None:
    """Remove files that are not known and were there before this process `started`."""

    def remove() -> None:
        for path in folder.glob(pattern):
            if path.name not in known and path.stat().st_mtime < started - 1:
                path.unlink(missing_ok=True)

    try:
        await asyncio.to_thread(remove)
    except OSError as error:
        log.warning("leftovers of uploads stay: %s", error)


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """What a file holds, little by little."""
    while piece := file.read(_PIECE):
        yield piece


def new_file_id() -> str:
    """An id that no other file has; those of later files come later, also within a second."""
    return f"file-{time.time_ns():016x}{secrets.token_hex(8)}"


def describe(file: File) -> dict[str, Any]:
    """A file as OpenAI shows it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def newest(
    row: type[JobRow] | type[BatchRow], client: Client, after: str | None, limit: int
) -> Select[Any]:
    """Rows that a client may see, the newest first: those behind the one `after`, and one more than
    `limit`, for `page`."""
    query = select(row).where(client.visible(row.owner)).order_by(row.number.desc())
    if after is not None:
        query = query.where(
            row.number < select(row.number).where(row.id == after).scalar_subquery()
        )
    return query.limit(limit + 1)


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


def _lifetime(form: FormData) -> int | None:
    """Seconds after which a file expires, as a form says it; ApiError 400."""
    told: dict[str, Any] = {
        key[len("expires_after[") : -1]: value
        for key, value in form.items()
        if key.startswith("expires_after[")
    }
    if not told:
        return None
    seconds = told.get("seconds")
    if isinstance(seconds, str) and seconds.isdecimal():
        told["seconds"] = int(seconds)
    try:
        return ExpiresAfter.model_validate(told).seconds
    except ValidationError:
        message = "must be anchor=created_at and seconds from 3600 to 2592000"
        raise ApiError(400, f"expires_after: {message}", param="expires_after") from None


Limit = Annotated[int, Query(ge=1, le=10_000)]
After = Annotated[str | None, Query(max_length=200)]


def routes(store: FileStore) -> APIRouter:
    """The routes under /v1/files."""
    router = APIRouter()

    @router.post("/v1/files")
    async def upload(request: Request, client: Known) -> Response:
        async with form_with_file(request, client, store.storage) as (form, keep):
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "file: is missing; send it as a form field", param="file")
            if purpose not in PURPOSES:
                message = f"purpose: got {purpose!r}; must be one of {PURPOSES}"
                raise ApiError(400, message, param="purpose")
            told = pieces(file.file), file.filename, str(purpose), client.owner
            saved = await store.save(*told, _lifetime(form))
            keep(saved.bytes)
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
            order_by = (time.asc(), File.id.asc()) if rising else (time.desc(), File.id.desc())
            query = query.order_by(*order_by)
            if purpose is not None:
                query = query.where(File.purpose == purpose)
            if after is not None and (last := session.get(File, after)) is not None:
                same = time == last.created_at
                later = (time > last.created_at) | (same & (File.id > last.id))
                earlier = (time < last.created_at) | (same & (File.id < last.id))
                query = query.where(later if rising else earlier)
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
        await store.delete(file)
        return sse.json_response({"id": file.id, "object": "file", "deleted": True})

    return router
