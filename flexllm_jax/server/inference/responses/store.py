"""Responses that are kept, with what was asked, for a time: to be read again and gone on from."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import JSON, String, Text, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from flexllm_jax.server.database import Base, Database, now
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.responses.answer import new_id

_UNFINISHED = ("queued", "in_progress")


class ResponseRow(Base):
    """A response. `asked`: the items it was given, not those of the response it goes on from."""

    __tablename__ = "responses"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    previous_id: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    response: Mapped[dict[str, Any]] = mapped_column(JSON)
    asked: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    created_at: Mapped[int] = mapped_column(default=now)
    expires_at: Mapped[float] = mapped_column(index=True)
    owner: Mapped[str | None] = mapped_column(Text)


class ResponseStore:
    """The responses of a database, each for `ttl_s` seconds after it was written."""

    def __init__(self, database: Database, ttl_s: float):
        self._database, self._ttl_s = database, ttl_s

    async def begin(self) -> None:
        """At the start: those that an earlier process had not finished have failed."""

        def write(session: Session) -> None:
            query = select(ResponseRow).where(ResponseRow.status.in_(_UNFINISHED))
            for row in session.scalars(query):
                error = {"code": "server_error", "message": "the server was restarted"}
                row.status = "failed"
                row.response = {**row.response, "status": "failed", "error": error}

        await self._database.until_written(write)

    async def save(
        self, client: Client, response: dict[str, Any], asked: list[dict[str, Any]]
    ) -> None:
        """Keep a response, or what became of one, with the items it was given; and forget those
        whose time is over."""

        def write(session: Session) -> None:
            at = time.time()
            session.execute(delete(ResponseRow).where(ResponseRow.expires_at < at))
            session.merge(
                ResponseRow(
                    id=response["id"],
                    previous_id=response["previous_response_id"],
                    status=response["status"],
                    response=response,
                    asked=asked,
                    expires_at=at + self._ttl_s,
                    owner=client.owner,
                )
            )

        await self._database.run(write)

    async def get(self, client: Client, response_id: str) -> dict[str, Any]:
        """A response; ApiError 404."""
        return await self._database.run(lambda s: _find(s, client, response_id).response)

    async def delete(self, client: Client, response_id: str) -> None:
        """Forget a response; ApiError 404."""
        await self._database.run(lambda s: s.delete(_find(s, client, response_id)))

    async def conversation(
        self, client: Client, response_id: str | None, *, until: bool = False
    ) -> list[dict[str, Any]]:
        """All items up to a response's output, with `until` up to what it was asked. ApiError."""

        def read(session: Session) -> list[dict[str, Any]]:
            turns: list[list[dict[str, Any]]] = []
            at, last = response_id, until
            while at is not None:
                row = _find(session, client, at)
                if row.status in _UNFINISHED and not last:
                    message = f"previous_response_id: {at} has not ended; wait for it"
                    raise ApiError(400, message, param="previous_response_id")
                turns.append([*row.asked, *([] if last else row.response["output"])])
                at, last = row.previous_id, False
            return [item for turn in reversed(turns) for item in turn]

        return await self._database.run(read)


def with_id(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is listed: with an id, and of a message the contents as parts."""
    item = {"type": "message", "id": new_id("item"), "status": "completed", **item}
    if item["type"] == "message" and isinstance(item.get("content"), str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        item["content"] = [{"type": kind, "text": item["content"]}]
    return item


def _find(session: Session, client: Client, response_id: str) -> ResponseRow:
    row = session.get(ResponseRow, response_id)
    if row is None or row.expires_at < time.time() or not client.may_see(row.owner):
        raise ApiError(404, f"Response with id {response_id!r:.80} not found.", param="response_id")
    return row
