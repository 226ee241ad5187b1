"""Sessions: clients, as long as they show that they are there."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select

from flexllm_jax.config import TinkerSection
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.tinker.journal import Journal
from flexllm_jax.server.tinker.protocol.schema import CreateSession
from flexllm_jax.server.tinker.tables import ModelRow, SamplerRow, SessionRow


@dataclass
class Session:
    """A client that was heard of not long ago."""

    id: str
    owner: str | None
    ended: str | None = None
    seen_at: float = field(default_factory=time.monotonic)


class Sessions:
    """Those that are active are in memory, all of them in the database."""

    def __init__(self, section: TinkerSection, journal: Journal):
        self._section, self._journal = section, journal
        self.active: dict[str, Session] = {}
        self.on_end: list[Callable[[str], None]] = []  # called with the id of one that finished

    async def create(self, client: Client, body: CreateSession) -> str:
        """A new session; ApiError 429 when there are too many."""
        if len(self.active) >= self._section.max_sessions:
            raise ApiError(
                429,
                f"there are {len(self.active)} sessions (server.tinker.max_sessions): try again",
                retry_after_s=10,
            )
        session = Session(uuid.uuid4().hex, client.owner)
        row = SessionRow(
            id=session.id,
            owner=client.owner,
            display_name=body.display_name,
            user_metadata=body.user_metadata,
        )
        self.active[session.id] = session
        await self._journal.write(lambda s: s.add(row))
        return session.id

    async def find(self, client: Client, session_id: str) -> Session:
        """A session that a client may use, which shows that it is there. ApiError 404: there is
        none; 410: it has ended."""
        session = self.active.get(session_id)
        if session is None:
            row = await self._journal.read(lambda s: s.get(SessionRow, session_id))
            if row is None:
                raise unknown("session", session_id)
            session = Session(row.id, row.owner, row.ended)
        if not client.may_see(session.owner):
            raise unknown("session", session_id)
        if session.ended is not None:
            raise ApiError(410, f"session {session_id!r} has ended: {session.ended}")
        session.seen_at = time.monotonic()
        return self.active.setdefault(session_id, session)

    def is_active(self, session_id: str) -> bool:
        """Whether its client was heard of within the timeout."""
        return session_id in self.active

    def sweep(self) -> None:
        """Forget those that were not heard of for too long; they come back when they are."""
        oldest = time.monotonic() - self._section.session_timeout_s
        for session in [s for s in self.active.values() if s.seen_at < oldest]:
            del self.active[session.id]

    async def finish(self, client: Client, session_id: str, reason: str) -> None:
        """The client says that it is done; the first reason counts."""
        try:
            await self.find(client, session_id)
        except ApiError as error:
            if error.status == 410:
                return
            raise

        def write(session: Any) -> None:
            row = session.get(SessionRow, session_id)
            if row is not None and row.ended is None:
                row.ended = reason

        await self._journal.write(write)
        self.active.pop(session_id, None)
        for ended in self.on_end:
            ended(session_id)

    async def describe(self, client: Client, session_id: str) -> dict[str, Any]:
        """A session with what it has made."""

        def read(session: Any) -> dict[str, Any] | None:
            row = session.get(SessionRow, session_id)
            if row is None or not client.may_see(row.owner):
                return None
            models = select(ModelRow.id).where(ModelRow.session_id == session_id)
            samplers = select(SamplerRow.id).where(SamplerRow.session_id == session_id)
            return {
                "training_run_ids": list(session.scalars(models)),
                "sampler_ids": list(session.scalars(samplers)),
                "user_metadata": row.user_metadata,
                "display_name": row.display_name,
            }

        found = await self._journal.read(read)
        if found is None:
            raise unknown("session", session_id)
        return found

    async def list(self, client: Client, limit: int, offset: int) -> list[str]:
        """Ids, the newest first."""
        query = select(SessionRow.id).where(client.visible(SessionRow.owner))
        query = query.order_by(SessionRow.created_at.desc()).limit(limit).offset(offset)
        return await self._journal.read(lambda s: list(s.scalars(query)))


def unknown(what: str, name: str) -> ApiError:
    """The error for something that there is not, or is another's."""
    shown = name if len(name) <= 200 else name[:197] + "..."
    return ApiError(404, f"there is no {what} {shown!r}")
