"""Samplers: frozen weights under an id, the samples asked of them, and what their futures answer.

Samples are in memory alone. A future of one that this process does not know was that of another,
which was killed: it answers 410, and the client samples anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from flexllm_jax.config import TinkerSection
from flexllm_jax.server.engines.client import EngineUnavailable
from flexllm_jax.server.http.access import Admission, Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.shares import Shares
from flexllm_jax.server.tinker.calls import JSON, failure
from flexllm_jax.server.tinker.journal import Journal
from flexllm_jax.server.tinker.protocol import schema, wire
from flexllm_jax.server.tinker.sampling import Asked, SampleFailed, Sampler
from flexllm_jax.server.tinker.sessions import Sessions, unknown
from flexllm_jax.server.tinker.store import Store, adapter_of
from flexllm_jax.server.tinker.tables import SamplerRow, SessionRow

CLONE = 10**9  # numbers of requests that a copy of a client has
_UNFETCHED_S = 86_400.0
_USED_S = 30.0  # how exactly the last use of a sampler is known


@dataclass
class SampleFuture:
    """A sample that was asked for. `result`: what it answers; `gone`: its engine has ended."""

    id: str
    owner: str | None
    sequence_ids: list[str]
    created_at: float = field(default_factory=time.monotonic)
    result: bytes | None = None
    content_type: str = wire.PROTOBUF
    failed: bool = False
    gone: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)
    fetched_at: float | None = None
    task: asyncio.Task[None] | None = None


@dataclass
class _Finished:
    """Futures of a client, in the order in which they were done; `first`: the number of the first
    that is kept."""

    ids: list[str] = field(default_factory=list)
    first: int = 1
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Samplers:
    """The samplers of all sessions."""

    def __init__(
        self,
        section: TinkerSection,
        base_names: list[str],
        sessions: Sessions,
        journal: Journal,
        store: Store,
        sampler: Sampler,
        admission: Admission,
        waiting: Shares,
        several: bool,
        used: Any,
    ):
        self._section, self._base_names = section, base_names
        self._sessions, self._journal, self._store = sessions, journal, store
        self._sampler, self._admission, self._waiting = sampler, admission, waiting
        self._several, self._used = several, used
        self._rows: dict[str, SamplerRow] = {}  # those that were used not long ago
        self.futures: dict[str, SampleFuture] = {}
        self._finished: defaultdict[tuple[str, int], _Finished] = defaultdict(_Finished)
        self._counts: dict[str | None, int] = {}  # samplers of each key
        sessions.on_end.append(self._session_ended)

    # -- samplers ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """At the start: count what there is."""
        rows = await self._journal.read(lambda s: list(s.scalars(select(SamplerRow.owner))))
        for owner in rows:
            self._counts[owner] = self._counts.get(owner, 0) + 1

    def count(self, client: Client | None) -> int:
        """How many there are that a client may see; None: all."""
        mine = (n for owner, n in self._counts.items() if client is None or client.may_see(owner))
        return sum(mine)

    async def create(self, client: Client, body: schema.CreateSampler) -> str:
        """The id of a sampler of a path's weights, or of the base model's. ApiError 400, 404."""
        await self._sessions.find(client, body.session_id)
        sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
        if await self._row(sampler_id) is not None:
            return sampler_id  # it was asked for before
        engine_name = folder = None
        base = body.base_model
        if body.model_path is not None:
            try:
                found = await self._store.resolve(body.model_path, client)
            except ValueError as error:
                raise ApiError(404, str(error)) from None
            engine_name, folder = found.engine_name, found.folder
            base = base or found.base_model
        elif base is None:
            raise ApiError(400, "base_model: is missing; give it, or model_path")
        elif base.partition(":")[0] not in self._base_names:
            raise unknown_base(base, self._base_names)
        self.may_add(client.owner)
        row = SamplerRow(
            id=sampler_id,
            session_id=body.session_id,
            owner=client.owner,
            base_model=base,
            model_path=body.model_path,
            engine_name=engine_name,
            folder=folder,
            ephemeral=False,
            size_bytes=0,
            created_at=time.time(),
            used_at=time.time(),
            clones=0,
        )
        await self._journal.write(lambda s: s.merge(row))
        self._rows[sampler_id] = row
        return sampler_id

    def may_add(self, owner: str | None) -> None:
        """Count another sampler. ApiError 429 when there are as many as there may be."""
        shares = Shares(self._section.max_samplers, self._several)
        for key, count in self._counts.items():
            shares.add(key, count)
        if not shares.take(Client("", owner=owner), 1):
            raise ApiError(
                429,
                f"there are as many samplers as there may be (server.tinker.max_samplers: "
                f"{self._section.max_samplers} for all): let a session end",
                retry_after_s=10,
            )
        self._counts[owner] = self._counts.get(owner, 0) + 1

    async def find(self, client: Client, sampler_id: str) -> SamplerRow:
        """A sampler that a client may use; ApiError 404."""
        row = await self._row(sampler_id)
        if row is None or not client.may_see(row.owner):
            raise unknown("sampler", sampler_id)
        return row

    async def _row(self, sampler_id: str) -> SamplerRow | None:
        row = self._rows.get(sampler_id)
        if row is None:
            row = await self._journal.read(lambda s: s.get(SamplerRow, sampler_id))
            if row is not None:
                self._rows[sampler_id] = row
        return row

    async def join(self, client: Client, sampler_id: str) -> int:
        """A number for a copy of a client, that no other has."""
        await self.find(client, sampler_id)

        def count(session: Session) -> int:
            row = session.get(SamplerRow, sampler_id)
            if row is None:
                raise unknown("sampler", sampler_id)
            row.clones += 1
            return row.clones

        return await self._journal.write(count)

    # -- samples ----------------------------------------------------------------------------------

    async def submit(self, client: Client, body: schema.Sample, room: Any) -> SampleFuture:
        """The promise of a sample. ApiError 404, 410, 429: it was not taken."""
        if body.sampling_session_id is None or body.seq_id is None:
            raise ApiError(400, "sampling_session_id, seq_id: are missing; make a sampler first")
        row = await self.find(client, body.sampling_session_id)
        await self._sessions.find(client, row.session_id)
        future_id = f"{row.id}:{body.seq_id}"
        if (known := self.futures.get(future_id)) is not None:
            return known
        ids = [f"{future_id}:{index}" for index in range(max(0, min(body.num_samples, 4096)))]
        future = SampleFuture(future_id, client.owner, ids)
        try:
            asked = room(body)
        except ValueError as error:
            self._fail(future, str(error), "user")
        else:
            if self._waiting.room(client) <= 0:
                raise ApiError(
                    429,
                    "results of samples wait to be fetched, as many as there may be "
                    "(server.tinker.max_waiting_bytes): try again",
                    retry_after_s=1,
                )
            prompt = asked.samples * len(asked.prompt)
            try:
                admitted = self._admission.admit(client, asked.samples, prompt, asked.tokens)
            except ApiError as error:
                if error.status != 400:
                    raise
                self._fail(future, error.message, "user")
            else:
                future.task = asyncio.create_task(self._run(future, row, asked, admitted))
        self.futures[future_id] = future
        if future.done.is_set():
            self._tell(future)
        return future

    async def _run(self, future: SampleFuture, row: SamplerRow, asked: Asked, admitted) -> None:
        sampled = 0
        try:
            if time.time() - row.used_at > _USED_S:
                row.used_at = time.time()
                used = update(SamplerRow).where(SamplerRow.id == row.id)
                await self._journal.write(lambda s: s.execute(used.values(used_at=row.used_at)))
            outcome = await self._sampler.run(asked, adapter_of(row), admitted.started)
            future.result, sampled = outcome.response, outcome.sampled_tokens
            self._used(row.owner, row.base_model, len(asked.prompt), sampled)
        except SampleFailed as error:
            if not error.invalid and not error.busy and "has ended" in str(error):
                future.gone = True
            self._fail(future, str(error), "user" if error.invalid else "server")
        except EngineUnavailable as error:
            future.gone = True
            self._fail(future, str(error), "server")
        except asyncio.CancelledError:
            self._fail(future, "the sample was cancelled", "user")
            raise
        except ApiError as error:
            self._fail(future, error.message, "server")
        finally:
            admitted.close(sampled)
            self._waiting.add(future.owner, len(future.result or b""))
            future.task = None
            self._tell(future)

    def _fail(self, future: SampleFuture, message: str, category: str) -> None:
        future.result, future.content_type = failure(message, category), JSON
        future.failed = True
        if future.task is None:
            self._waiting.add(future.owner, len(future.result))
        future.done.set()

    def _tell(self, future: SampleFuture) -> None:
        future.done.set()
        sampler_id, _, seq = future.id.rpartition(":")
        finished = self._finished[sampler_id, int(seq) // CLONE]
        finished.ids.append(future.id)
        finished.changed.set()
        finished.changed = asyncio.Event()

    async def result(self, client: Client, future_id: str, wait_s: float) -> SampleFuture | None:
        """A future that is done; None: not yet. ApiError 404: there is none; 410: it was another
        process's, or its engine has ended: sample anew."""
        future = self.futures.get(future_id)
        if future is None:
            await self.find(client, future_id.rpartition(":")[0])
            raise ApiError(410, f"sample {future_id!r} is gone: the server was started again")
        if not client.may_see(future.owner):
            raise unknown("future", future_id)
        try:
            await asyncio.wait_for(future.done.wait(), wait_s)
        except TimeoutError:
            return None
        if future.gone:
            self._forget(future_id)
            raise ApiError(410, f"sample {future_id!r} is gone: its engine has ended")
        future.fetched_at = future.fetched_at or time.monotonic()
        return future

    async def finished(
        self, client: Client, body: schema.RetrieveMany, wait_s: float
    ) -> tuple[list[SampleFuture], int]:
        """Futures of a sampler that were done after a cursor, and the new cursor."""
        sampler_id = body.target.sampling_session_id
        row = await self.find(client, sampler_id)
        await self._sessions.find(client, row.session_id)
        for future_id in body.retrieved_request_ids:
            if future_id.startswith(sampler_id + ":"):
                self._forget(future_id)
        finished = self._finished[sampler_id, body.target.cloned_sampler_id]
        seen = max(0, body.prev_cursor - finished.first + 1)
        del finished.ids[:seen]
        finished.first += seen
        if not finished.ids and wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(finished.changed.wait(), wait_s)
        told = [self.futures[i] for i in finished.ids if i in self.futures]
        return told, finished.first + len(finished.ids) - 1

    def cancel(self, client: Client, future_id: str) -> None:
        """Nobody waits for it any more."""
        future = self.futures.get(future_id)
        if future is not None and client.may_see(future.owner) and future.task is not None:
            future.task.cancel()

    def _forget(self, future_id: str) -> None:
        future = self.futures.get(future_id)
        if future is not None and future.done.is_set():
            del self.futures[future_id]
            self._waiting.add(future.owner, -len(future.result or b""))

    # -- from time to time ------------------------------------------------------------------------

    def _session_ended(self, session_id: str) -> None:
        for future in list(self.futures.values()):
            if future.id.startswith(session_id + ":") and future.task is not None:
                future.task.cancel()
        for sampler_id in [i for i in self._rows if i.startswith(session_id + ":")]:
            self._counts[self._rows.pop(sampler_id).owner] -= 1  # its row goes with the next sweep

    async def sweep(self) -> None:
        """Forget results, and samplers of sessions that have ended."""
        now = time.monotonic()
        for future in list(self.futures.values()):
            fetched = future.fetched_at
            if (fetched is not None and fetched < now - self._section.result_s) or (
                future.created_at < now - _UNFETCHED_S
            ):
                self._forget(future.id)
        for key in [k for k in self._finished if not self._sessions.is_active(k[0].split(":")[0])]:
            del self._finished[key]

        def remaining(session: Session) -> list[tuple[str | None, str]]:
            ended = select(SessionRow.id).where(SessionRow.ended.is_not(None))
            session.execute(delete(SamplerRow).where(SamplerRow.session_id.in_(ended)))
            return [(r[0], r[1]) for r in session.execute(select(SamplerRow.owner, SamplerRow.id))]

        rows = await self._journal.write(remaining)
        known = {sampler_id for _, sampler_id in rows}
        self._rows = {i: row for i, row in self._rows.items() if i in known}
        self._counts = {}
        for owner, _ in rows:
            self._counts[owner] = self._counts.get(owner, 0) + 1


def unknown_base(name: str, known: list[str]) -> ApiError:
    """The error for a base model that is not served."""
    shown = name if len(name) <= 200 else name[:197] + "..."
    return ApiError(
        400,
        f"base_model: got {shown!r}; this server has {', '.join(known)} "
        f"(names come from server.tinker.model_names)",
    )
