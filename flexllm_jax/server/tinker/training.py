"""Models that clients train: taking their requests, telling their results, and leaving the engines
when nobody is there."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import Any

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from flexllm_jax.config import TinkerSection
from flexllm_jax.server.engines.client import EngineClient
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.shares import Shares
from flexllm_jax.server.tinker.protocol.schema import CreateModel, LoadWeights
from flexllm_jax.server.tinker.requests import (
    CREATE,
    CREATE_FROM,
    Pending,
    already_written,
    load_model,
)
from flexllm_jax.server.tinker.runs import Run, Surroundings
from flexllm_jax.server.tinker.sessions import Sessions, unknown
from flexllm_jax.server.tinker.tables import ModelRow, RequestRow

_UNFETCHED_S = 86_400.0
_FEW = 1000  # rows removed at once


class Training:
    """The models of all sessions. Those that are in an engine, or should be, have a `Run`."""

    def __init__(
        self,
        section: TinkerSection,
        sessions: Sessions,
        around: Surroundings,
        waiting: Shares,
        several: bool,
    ):
        self._section, self._sessions, self._around = section, sessions, around
        self._journal = around.journal
        self._waiting = waiting
        self._several = several
        self.runs: dict[str, Run] = {}
        self._opening: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    # -- requests ---------------------------------------------------------------------------------

    async def create(self, client: Client, body: CreateModel, raw: bytes) -> dict[str, Any]:
        """The promise of a new model."""
        lora = body.lora_config
        return await self._new(
            client,
            CREATE,
            raw,
            new_model(
                client,
                body.session_id,
                body.model_seq_id,
                base_model=body.base_model,
                rank=lora.rank,
                seed=(lora.seed or 0) % 2**31,
                train_mlp=lora.train_mlp,
                train_attn=lora.train_attn,
                train_unembed=lora.train_unembed,
                user_metadata=body.user_metadata,
            ),
        )

    async def create_from(
        self,
        client: Client,
        session_id: str,
        seq: int,
        body: LoadWeights,
        raw: bytes,
        base_model: str,
        folder: str,
    ) -> dict[str, Any]:
        """The promise of a new model that starts as what is in a folder."""
        return await self._new(
            client,
            CREATE_FROM,
            raw,
            new_model(
                client,
                session_id,
                seq,
                base_model=base_model,
                user_metadata=body.user_metadata,
                start_path=folder,
                start_optimizer=body.optimizer,
            ),
        )

    async def refuse(
        self, client: Client, session_id: str, seq: int, base_model: str, reason: str
    ) -> dict[str, Any]:
        """The promise of a model that there will not be: its future says why."""
        what = {"base_model": base_model[:200], "corrupted": reason}
        row = new_model(client, session_id, seq, **what)
        return await self._new(client, CREATE, b"{}", row)

    async def _new(self, client: Client, kind: str, raw: bytes, row: ModelRow) -> dict[str, Any]:
        await self._sessions.find(client, row.session_id)
        promise = {"request_id": f"{row.id}:0", "model_id": row.id}
        async with self._opening[row.id]:
            if await self._open(row.id, client) is not None:
                return promise  # it was asked for before
            if row.corrupted is None:
                self._check_count(client)
            now = time.time()
            request = RequestRow(
                model_id=row.id, seq_id=0, kind=kind, body=raw, created_at=now, failed=False
            )

            def write(session: Session) -> None:
                session.add(row)
                session.add(request)

            await self._journal.write(write)
            run = self.runs[row.id] = Run(self._around, row, {})
            self._waiting.add(row.owner, len(raw))
            run.add(Pending(0, kind, raw, already_written()))
        return promise

    def _check_count(self, client: Client) -> None:
        """ApiError 429 when there may be no more models."""
        shares = Shares(self._section.max_models, self._several)
        for row in [run.row for run in self.runs.values()]:
            if self._sessions.is_active(row.session_id) and row.corrupted is None:
                shares.add(row.owner, 1)
        if not shares.take(client, 1):
            raise ApiError(
                429,
                f"there are as many models as there may be (server.tinker.max_models: "
                f"{self._section.max_models} for all): let a session end",
                retry_after_s=10,
            )

    async def submit(
        self, client: Client, kind: str, model_id: str, seq: int, raw: bytes
    ) -> dict[str, Any]:
        """The promise of a request of a model. ApiError 404, 410, 429: it was not taken."""
        async with self._opening[model_id]:
            run = await self._open(model_id, client)
            if run is None:
                raise unknown("model", model_id)
            await self._sessions.find(client, run.row.session_id)
            promise = {"request_id": f"{model_id}:{seq}", "model_id": model_id}
            if run.knows(seq):
                pending = run.pending.get(seq)
            else:
                # The number that all others wait for is never refused.
                taken = self._waiting.take(client, len(raw))
                if not taken and seq != run.next_missing:
                    raise ApiError(
                        429,
                        "training requests wait, as many as there may be "
                        "(server.tinker.max_waiting_bytes): try again",
                        retry_after_s=1,
                    )
                if not taken:
                    self._waiting.add(client.owner, len(raw))
                row = RequestRow(
                    model_id=model_id,
                    seq_id=seq,
                    kind=kind,
                    body=raw,
                    created_at=time.time(),
                    failed=False,
                )
                written = asyncio.ensure_future(self._journal.write(lambda s: s.add(row)))
                pending = Pending(seq, kind, raw, written)
                run.add(pending)
        if pending is not None:
            try:
                await asyncio.shield(pending.written)
            except ApiError:
                if run.pending.pop(seq, None) is not None:
                    self._waiting.add(run.row.owner, -len(raw))
                raise
        return promise

    # -- results ----------------------------------------------------------------------------------

    async def result(
        self, client: Client, model_id: str, seq: int, wait_s: float
    ) -> tuple[bytes, str] | None:
        """What a future answers, and its type; None: not yet. ApiError 404: there is none."""
        async with self._opening[model_id]:
            run = await self._open(model_id, client)
        if run is None:
            raise unknown("future", f"{model_id}:{seq}")
        session = self._sessions.active.get(run.row.session_id)
        if session is not None:
            session.seen_at = time.monotonic()
        if (pending := run.pending.get(seq)) is not None:
            try:
                await asyncio.wait_for(pending.done.wait(), wait_s)
            except TimeoutError:
                return None
        key = (model_id, seq)

        def read(session: Session) -> tuple[bytes, str] | None:
            row = session.get(RequestRow, key)
            if row is None or row.result is None:
                return None
            if row.fetched_at is None:
                row.fetched_at = time.time()
            return row.result, row.content_type or "application/json"

        found = await self._journal.write(read)
        if found is None:
            raise unknown("future", f"{model_id}:{seq}")
        return found

    # -- models -----------------------------------------------------------------------------------

    async def find(self, client: Client, model_id: str) -> ModelRow:
        """What is known of a model; ApiError 404."""
        run = self.runs.get(model_id)
        row = run.row if run else await self._journal.read(lambda s: s.get(ModelRow, model_id))
        if row is None or not client.may_see(row.owner):
            raise unknown("model", model_id)
        return row

    async def made(self, client: Client, model_id: str, wait_s: float) -> ModelRow:
        """The same of a model whose making may be under way."""
        row = await self.find(client, model_id)
        run = self.runs.get(model_id)
        if run is not None and (pending := run.pending.get(0)) is not None:
            try:
                await asyncio.wait_for(pending.done.wait(), wait_s)
            except TimeoutError:
                raise ApiError(503, "the model is being made: try again", retry_after_s=1) from None
        if row.corrupted is not None:
            raise ApiError(400, row.corrupted)
        return row

    async def _open(self, model_id: str, client: Client) -> Run | None:
        """The run of a model that a client may see; of one that had left the engines a new one."""
        run = self.runs.get(model_id)
        if run is None:
            loaded = await self._journal.read(lambda s: load_model(s, model_id))
            if loaded is None or not client.may_see(loaded[0].owner):
                return None
            run = self._restore(*loaded)
        return run if client.may_see(run.row.owner) else None

    def _restore(self, row: ModelRow, done: dict[int, bool], left: list[RequestRow]) -> Run:
        run = self.runs[row.id] = Run(self._around, row, done)
        for request in left:
            body = request.body or b""
            self._waiting.add(row.owner, len(body))
            run.add(Pending(request.seq_id, request.kind, body, already_written()))
        return run

    async def start(self) -> None:
        """At the start: models with requests that are not done go on."""
        query = select(RequestRow.model_id).where(RequestRow.done_at.is_(None)).distinct()
        for model_id in await self._journal.read(lambda s: list(s.scalars(query))):
            loaded = await self._journal.read(lambda s, m=model_id: load_model(s, m))
            if loaded is not None:
                self._restore(*loaded)

    def engine_ready(self, engine: EngineClient) -> None:
        """Models may be made there."""
        for run in self.runs.values():
            run.wake()

    def engine_lost(self, engine: EngineClient) -> None:
        """Its models are made again elsewhere."""
        for run in self.runs.values():
            run.lost(engine)

    async def sweep(self) -> None:
        """Models whose clients are silent leave the engines; results are forgotten."""
        for model_id, run in list(self.runs.items()):
            silent = not self._sessions.is_active(run.row.session_id)
            if (silent or run.row.corrupted is not None) and run.idle:
                async with self._opening[model_id]:
                    await run.close()
                    self.runs.pop(model_id, None)
        for model_id, lock in list(self._opening.items()):
            if model_id not in self.runs and not lock.locked():
                del self._opening[model_id]
        now = time.time()
        old = or_(
            RequestRow.fetched_at < now - self._section.result_s,
            RequestRow.done_at < now - _UNFETCHED_S,
        )
        keys = select(RequestRow.model_id, RequestRow.seq_id)
        keys = keys.where(RequestRow.body.is_(None), RequestRow.done_at.is_not(None), old)

        def forget(session: Session) -> None:
            for model_id, seq in session.execute(keys.limit(_FEW)).all():
                session.execute(
                    delete(RequestRow).where(
                        RequestRow.model_id == model_id, RequestRow.seq_id == seq
                    )
                )

        await self._journal.write(forget)

    async def close(self) -> None:
        """The server ends: models that can be kept are."""
        await asyncio.gather(*(run.close() for run in self.runs.values()))


def new_model(client: Client, session_id: str, seq: int, **what: Any) -> ModelRow:
    """The row of a model that a client asks for, under the id that it knows without being told."""
    made = {"seed": 0, "train_mlp": True, "train_attn": True, "train_unembed": True}
    made |= {"start_optimizer": False, "snapshot_seq": 0}
    now = time.time()
    return ModelRow(
        id=f"{session_id}:train:{seq}",
        session_id=session_id,
        owner=client.owner,
        created_at=now,
        last_request_at=now,
        **(made | what),
    )
