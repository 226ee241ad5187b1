"""Files that come in parts: the parts lie in a folder of their own until they are put together.

A part counts in the storage like a file, and is on disk before its answer is sent. The file, its
row, and the end of the upload are one transaction: after a kill there is the one or the other.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from fastapi import Request
from sqlalchemy import BigInteger, ForeignKey, String, Text, delete, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column
from starlette.datastructures import UploadFile

from flexllm_jax.server.database import Base, File, now
from flexllm_jax.server.finetuning.files import FileStore, pieces, remove_unknown
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.forms import form_with_file
from flexllm_jax.server.http.shares import fair_room

LIFETIME_S = 3600
_TOLD_S = 24 * 3600  # so long after its time is over it is told what became of an upload
_MOST = 1000  # uploads that are pending
_MOST_PARTS = 1000  # of an upload
_PART_BYTES = 64 * 2**20


class UploadRow(Base):
    """A file that comes in parts. `lifetime_s`: of the file."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(String(16), index=True)
    created_at: Mapped[int]
    expires_at: Mapped[int] = mapped_column(index=True)
    lifetime_s: Mapped[int | None]
    file_id: Mapped[str | None] = mapped_column(String(64))
    owner: Mapped[str | None] = mapped_column(Text)


class PartRow(Base):
    """Some bytes of a file. They lie under the id."""

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[int]


class UploadStore:
    """The uploads of a server, beside its files."""

    def __init__(self, folder: Path, files: FileStore, *, several: bool):
        self._folder, self._files, self._several = folder, files, several
        self._database, self._started = files.database, time.time()
        folder.mkdir(parents=True, exist_ok=True)
        query = select(UploadRow.owner, func.sum(PartRow.bytes)).join_from(PartRow, UploadRow)
        query = query.group_by(UploadRow.owner)
        for owner, size in self._database.run_now(lambda s: list(s.execute(query))):
            files.storage.add(owner, size)
        files.also_tidied.append(self.tidy)

    async def find(self, client: Client, upload_id: str) -> UploadRow:
        """An upload; ApiError 404."""
        return await self._database.run(lambda s: _find(s, client, upload_id))

    async def create(
        self, client: Client, filename: str, purpose: str, size: int, lifetime_s: int | None
    ) -> UploadRow:
        """A new upload; ApiError 413 for what can never fit, 429 when there are too many."""
        limit = self._files.section.max_upload_bytes
        if size > limit:
            raise ApiError(413, f"bytes: got {size}; a file has at most {limit}", param="bytes")
        row = UploadRow(id=f"upload_{secrets.token_hex(16)}", filename=filename, purpose=purpose)
        row.bytes, row.status, row.lifetime_s, row.owner = size, "pending", lifetime_s, client.owner
        row.created_at, row.expires_at = now(), now() + LIFETIME_S

        def insert(session: Session) -> None:
            query = select(func.count()).where(
                UploadRow.status == "pending", UploadRow.expires_at > now()
            )
            room = _MOST - (session.scalar(query) or 0)
            if self._several:
                own = session.scalar(query.where(UploadRow.owner == client.owner)) or 0
                room = fair_room(room, own)
            if room < 1:
                message = "there are as many uploads as may be pending: complete or cancel one"
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=60)
            session.add(row)

        await self._database.run(insert)
        return row

    async def add_part(self, client: Client, upload_id: str, request: Request) -> PartRow:
        """Keep a part, which is the field `data` of a form. ApiError."""
        _pending(await self.find(client, upload_id))
        part = PartRow(id=f"part_{secrets.token_hex(16)}", upload_id=upload_id, created_at=now())
        path = self._folder / part.id

        def insert(session: Session) -> None:
            row = _pending(_find(session, client, upload_id))
            parts = _parts(session, upload_id)
            if len(parts) >= _MOST_PARTS:
                raise ApiError(400, f"an upload has at most {_MOST_PARTS} parts", param="data")
            if sum(p.bytes for p in parts) + part.bytes > row.bytes:
                message = f"data: the parts have more than the {row.bytes} bytes of the upload"
                raise ApiError(400, message, param="data")
            session.add(part)

        async with form_with_file(request, client, self._files.storage) as (form, keep):
            data = form.get("data")
            if not isinstance(data, UploadFile):
                raise ApiError(400, "data: is missing; send it as a form field", param="data")
            if (data.size or 0) > _PART_BYTES:
                message = f"data: a part has at most {_PART_BYTES} bytes: send it in two"
                raise ApiError(413, message, param="data")
            part.bytes = await self._files.write(path, pieces(data.file), "data")
            try:
                await self._database.run(insert)
            except ApiError:
                path.unlink(missing_ok=True)
                raise
            keep(part.bytes)
        return part

    async def complete(
        self, client: Client, upload_id: str, part_ids: list[str], md5: str | None
    ) -> tuple[UploadRow, File]:
        """Make the file of parts in this order. ApiError."""
        row = _pending(await self.find(client, upload_id))
        parts = await self._database.run(lambda s: {p.id: p for p in _parts(s, upload_id)})
        for name in part_ids:
            if name not in parts:
                message = f"part_ids: {name!r:.80} is no part of {upload_id}"
                raise ApiError(400, message, param="part_ids")
        if len({*part_ids}) < len(part_ids):
            raise ApiError(400, "part_ids: a part is named twice", param="part_ids")
        size = sum(parts[name].bytes for name in part_ids)
        if size != row.bytes:
            message = f"part_ids: these parts have {size} bytes, the upload has {row.bytes}"
            raise ApiError(400, message, param="part_ids")
        digest = hashlib.md5(usedforsecurity=False)

        def joined() -> Iterator[bytes]:
            for name in part_ids:
                with (self._folder / name).open("rb") as file:
                    for piece in pieces(file):
                        digest.update(piece)
                        yield piece

        gone: list[PartRow] = []

        def end(session: Session, file: File) -> None:
            if md5 is not None and digest.hexdigest() != md5.lower():
                message = f"md5: got {md5}, the file's is {digest.hexdigest()}"
                raise ApiError(400, message, param="md5")
            row = _pending(_find(session, client, upload_id))
            row.status, row.file_id = "completed", file.id
            gone.extend(_drop_parts(session, row))

        told = joined(), row.filename, row.purpose, row.owner, row.lifetime_s
        try:
            file = await self._files.save(*told, beside=end)
        except FileNotFoundError:  # it was cancelled meanwhile
            raise _not_pending(await self.find(client, upload_id)) from None
        # What the parts held is the file's from here on.
        self._remove(row.owner, gone, kept=file.bytes)
        return await self.find(client, upload_id), file

    async def cancel(self, client: Client, upload_id: str) -> UploadRow:
        """Forget the parts. ApiError."""

        def end(session: Session) -> tuple[UploadRow, list[PartRow]]:
            row = _pending(_find(session, client, upload_id))
            row.status = "cancelled"
            return row, _drop_parts(session, row)

        row, gone = await self._database.run(end)
        self._remove(row.owner, gone)
        return row

    async def tidy(self) -> None:
        """Forget the parts of what has expired, in time the uploads as well, and what a killed
        process left."""

        def expire(session: Session) -> list[tuple[str | None, list[PartRow]]]:
            over = UploadRow.expires_at <= now()
            query = select(UploadRow).where(UploadRow.status == "pending", over)
            gone = []
            for row in session.scalars(query):
                row.status = "expired"
                gone.append((row.owner, _drop_parts(session, row)))
            session.flush()
            session.execute(delete(UploadRow).where(UploadRow.expires_at <= now() - _TOLD_S))
            return gone

        for owner, parts in await self._database.until_written(expire):
            self._remove(owner, parts)
        known = await self._database.run(lambda s: set(s.scalars(select(PartRow.id))))
        await remove_unknown(self._folder, "part_*", known, self._started)

    def _remove(self, owner: str | None, parts: list[PartRow], kept: int = 0) -> None:
        for part in parts:
            (self._folder / part.id).unlink(missing_ok=True)
        self._files.storage.add(owner, kept - sum(part.bytes for part in parts))


def status_of(row: UploadRow) -> str:
    """What has become of an upload by now."""
    over = row.status == "pending" and row.expires_at <= now()
    return "expired" if over else row.status


def _find(session: Session, client: Client, upload_id: str) -> UploadRow:
    row = session.get(UploadRow, upload_id)
    if row is None or not client.may_see(row.owner):
        raise ApiError(404, f"no such upload: {upload_id!r:.80}")
    return row


def _pending(row: UploadRow) -> UploadRow:
    if status_of(row) != "pending":
        raise _not_pending(row)
    return row


def _not_pending(row: UploadRow) -> ApiError:
    return ApiError(400, f"the upload {row.id} is {status_of(row)}: create another")


def _parts(session: Session, upload_id: str) -> list[PartRow]:
    return list(session.scalars(select(PartRow).where(PartRow.upload_id == upload_id)))


def _drop_parts(session: Session, row: UploadRow) -> list[PartRow]:
    parts = _parts(session, row.id)
    for part in parts:
        session.delete(part)
    return parts
