"""One model in an engine: its requests in the order of their numbers, whatever order they came in.

A number that has not come yet holds up those after it, of this model alone. When the engine ends,
the model is made again in another, from its newest snapshot: requests after it that were done are
computed again, and their stored results stay; the others follow. So a client sees the same numbers
as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import update
from sqlalchemy.orm import Session

from flexllm_jax.server.engines.client import (
    EngineClient,
    EngineRefused,
    EngineUnavailable,
)
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.training_client import TrainingFailed
from flexllm_jax.server.engines.training_messages import (
    LoadState,
    OptimStep,
    SaveAdapter,
    SaveState,
)
from flexllm_jax.server.tinker.calls import (
    JSON,
    Answer,
    Preparation,
    Prepared,
    failure,
    saved_bytes,
)
from flexllm_jax.server.tinker.journal import Journal
from flexllm_jax.server.tinker.requests import (
    CREATE,
    CREATE_FROM,
    FORWARD_BACKWARD,
    NAMING,
    Pending,
    computes_again,
    write_result,
    write_snapshot,
)
from flexllm_jax.server.tinker.store import Store
from flexllm_jax.server.tinker.tables import ModelRow, RequestRow

log = logging.getLogger(__name__)

_SENT_BYTES = 64 * 2**20  # that an engine has of a model, at most: unless one has more
_AGAIN_S = 0.5
_MADE = ("rank", "train_mlp", "train_attn", "train_unembed")


@dataclass(frozen=True)
class Surroundings:
    """What all models share. `note` is told of a request that is done: its kind, the category of
    its failure, the tokens it trained on; `given_back` of its bytes."""

    engines: Engines
    journal: Journal
    store: Store
    preparation: Preparation
    snapshot_every: int
    note: Callable[[ModelRow, str, str | None, int], None]
    given_back: Callable[[str | None, int], None]


class Run:
    """A model whose requests are carried out. `done`: numbers after the snapshot that are done, and
    whether they are to be computed again."""

    def __init__(self, around: Surroundings, row: ModelRow, done: dict[int, bool]):
        self.row, self._around = row, around
        self.done, self.pending = done, dict[int, Pending]()
        self.member: EngineClient | None = None  # where it is
        self._life = 0  # counts the engines it was in
        self._cursor = row.snapshot_seq + 1  # the number to be sent next
        self._clean = True  # no gradient is begun at the cursor
        self._steps = 0  # optimizer steps sent since the newest snapshot was asked for
        self._sent: dict[int, int] = {}  # bytes of requests that the engine has
        self._changing = asyncio.Lock()  # of the snapshot that it is made from
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._carry_out())

    # -- from outside -----------------------------------------------------------------------------

    def knows(self, seq: int) -> bool:
        """Whether a request of this number came before."""
        return seq in self.pending or seq in self.done or seq <= self.row.snapshot_seq

    @property
    def next_missing(self) -> int:
        """The first number that has not come."""
        seq = self._cursor
        while self.knows(seq):
            seq += 1
        return seq

    def add(self, pending: Pending) -> None:
        """Take in a request."""
        self.pending[pending.seq] = pending
        self.row.last_request_at = time.time()
        self._wake.set()

    def wake(self) -> None:
        """An engine may be there now."""
        self._wake.set()

    def lost(self, member: EngineClient) -> None:
        """An engine has ended."""
        if self.member is member:
            self.member = None
            self._life += 1
            self._sent.clear()
        self._wake.set()

    @property
    def state(self) -> str:
        """Where it is, in a word."""
        if self.row.corrupted is not None:
            return "failed"
        return "waiting" if self.member is None else "on_engine"

    @property
    def idle(self) -> bool:
        """Whether nothing can be done for it now."""
        return self._cursor not in self.pending and not self._sent and 0 not in self.pending

    async def close(self) -> None:
        """Leave the engine; what it was is on disk."""
        if self.member is not None and self._steps and self._clean:
            with contextlib.suppress(EngineUnavailable):
                await self._try(self._snapshot(self._cursor - 1))
        await self.stop()
        if self.member is not None:
            member = self.member
            member.training.models.discard(self.row.id)
            with contextlib.suppress(EngineUnavailable):  # else it is gone with the engine
                await member.call("delete_training_model", member.patience_s, model=self.row.id)

    async def stop(self) -> None:
        """Do nothing more."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- the order --------------------------------------------------------------------------------

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self) -> None:
        while True:
            self._wake.clear()
            try:
                if self.pending and self.row.corrupted is None and self.member is None:
                    await self._load()
                while await self._send_next():
                    pass
            except EngineUnavailable:
                await asyncio.sleep(_AGAIN_S)
                continue
            except Exception:
                log.exception("model %s stands still for a moment", self.row.id)
                await asyncio.sleep(10 * _AGAIN_S)
                continue
            await self._wake.wait()

    async def _load(self) -> None:
        """Make the model in an engine. EngineUnavailable: there is none now."""
        row = self.row
        async with self._changing:
            member = self._around.engines.least_trained()
            member.training.models.add(row.id)
            try:
                made = await self._make(member)
            except (EngineRefused, RuntimeError) as error:
                member.training.models.discard(row.id)
                category = "user" if isinstance(error, EngineRefused) else "server"
                await self._corrupt(str(error), category)
                return
            if member.state != "ready":
                raise EngineUnavailable("the engine process has ended")
            self.member, self._life = member, self._life + 1
            self._cursor, self._clean, self._steps = row.snapshot_seq + 1, True, 0
            self._sent.clear()
        if 0 in self.pending:
            values = {name: made[name] for name in _MADE}
            told = {"model_id": row.id, "type": CREATE}
            if self.pending[0].kind == CREATE_FROM:
                path = msgspec.json.decode(self.pending[0].body)["path"]
                told = {"model_id": row.id, "path": path, "type": "load_weights"}

            def write(session: Session, _: int) -> None:
                session.execute(update(ModelRow).where(ModelRow.id == row.id).values(**values))

            for name, value in values.items():
                setattr(row, name, value)
            await self._finish(self.pending[0], Answer(msgspec.json.encode(told), write=write))

    async def _make(self, member: EngineClient) -> dict[str, Any]:
        row = self.row
        path = row.snapshot_path or row.start_path
        if path is not None:
            optimizer = row.snapshot_path is not None or row.start_optimizer
            named = {"model": row.id, "path": path, "optimizer": optimizer}
            return await member.call("create_training_model_from", **named)
        named = {"model": row.id, "rank": row.rank, "seed": row.seed}
        flags = {name: getattr(row, name) for name in _MADE if name != "rank"}
        return await member.call("create_training_model", **named, **flags)

    async def _send_next(self) -> bool:
        """Send the next request to the engine, if it is there and there is room for it."""
        if self.row.corrupted is not None:
            for pending in list(self.pending.values()):
                start = "the model cannot be used: " if pending.seq else ""
                await self._fail(pending, start + self.row.corrupted, "user")
            return False
        if self.member is None or sum(self._sent.values()) > _SENT_BYTES:
            return False
        seq, life = self._cursor, self._life
        pending = self.pending.get(seq)
        if pending is None and seq not in self.done:
            return False
        if pending is None and not self.done[seq]:
            self._cursor += 1
            return True
        kind, body = (pending.kind, pending.body) if pending else await self._read(seq)
        if pending is not None:
            await pending.written
            if kind in NAMING:  # a name that is written now counts, and what is loaded is there
                for other in [p for p in self.pending.values() if p.seq < seq]:
                    if other.kind in NAMING:
                        await other.done.wait()
        try:
            prepared = await self._around.preparation.prepare(kind, self.row, body)
        except ValueError as error:
            self._cursor += 1
            if pending is not None:
                await self._fail(pending, str(error), "user")
            else:
                log.error("model %s: request %d cannot be done again: %s", self.row.id, seq, error)
            return True
        if self._life != life or self.member is None:
            return True
        result = self.member.training.train(self.row.id, [prepared.call])[0]
        self._cursor += 1
        self._sent[seq] = len(body)
        self._start(self._await(seq, life, pending, prepared, result))
        if isinstance(prepared.call, OptimStep):
            self._clean = True
            self._steps += 1
        elif isinstance(prepared.call, LoadState):  # what was loaded may not be there next time
            self._clean, self._steps = True, self._around.snapshot_every
        elif not isinstance(prepared.call, SaveState) and kind == FORWARD_BACKWARD:
            self._clean = False
        if self._clean and self._steps >= self._around.snapshot_every:
            self._start(self._try(self._snapshot(seq)))
        return True

    async def _read(self, seq: int) -> tuple[str, bytes]:
        key = (self.row.id, seq)
        row = await self._around.journal.read(lambda s: s.get(RequestRow, key))
        assert row is not None and row.body is not None, f"request {key} is gone"
        return row.kind, row.body

    async def _await(
        self,
        seq: int,
        life: int,
        pending: Pending | None,
        prepared: Prepared,
        future: asyncio.Future,
    ) -> None:
        """Wait for the result of a call, and write it down."""
        member = self.member
        try:
            result = await future
            if isinstance(prepared.call, SaveAdapter) and prepared.call.name and member is not None:
                member.training.samplers.add(prepared.call.name)
            if pending is not None:
                await self._finish(pending, prepared.answer(result), saved_bytes(result))
        except EngineUnavailable:
            if self._life == life and self.member is not None:
                self.lost(self.member)
            return
        except TrainingFailed as error:
            if pending is not None:
                await self._fail(pending, str(error), error.category)
            else:
                log.error(
                    "model %s: request %d failed when done again: %s", *(self.row.id, seq, error)
                )
        finally:
            if prepared.folder is not None:
                self._around.store.in_use.discard(prepared.folder)
            if self._life == life:
                self._sent.pop(seq, None)
            self._wake.set()

    # -- what is written down ---------------------------------------------------------------------

    async def _finish(self, pending: Pending, answer: Answer, size_bytes: int = 0) -> None:
        def write(session: Session) -> None:
            done = (self.row.id, pending.seq, answer.result, answer.content_type)
            write_result(session, *done, failed=False)
            answer.write(session, size_bytes)

        await pending.written
        await self._around.journal.until_written(write)
        answer.after()
        self._close(pending, True)
        self._around.note(self.row, pending.kind, None, answer.tokens)

    async def _fail(self, pending: Pending, message: str, category: str) -> None:
        result = failure(message, category)
        await pending.written
        await self._around.journal.until_written(
            lambda s: write_result(s, self.row.id, pending.seq, result, JSON, failed=True)
        )
        self._close(pending, False)  # it has changed nothing
        self._around.note(self.row, pending.kind, category, 0)

    def _close(self, pending: Pending, again: bool) -> None:
        if self.pending.pop(pending.seq, None) is not None:
            self._around.given_back(self.row.owner, len(pending.body))
        if pending.seq > self.row.snapshot_seq:
            self.done[pending.seq] = again and computes_again(pending.kind, pending.body)
        pending.done.set()

    async def _corrupt(self, message: str, category: str) -> None:
        """The model cannot be made."""
        self.row.corrupted = message
        if 0 in self.pending:
            await self._fail(self.pending[0], message, category)
        await self._around.journal.until_written(
            lambda s: s.execute(
                update(ModelRow).where(ModelRow.id == self.row.id).values(corrupted=message)
            )
        )
        log.warning("model %s cannot be made: %s", self.row.id, message)

    # -- snapshots --------------------------------------------------------------------------------

    async def _try(self, snapshot: Awaitable[None]) -> None:
        try:
            await snapshot
        except (EngineUnavailable, TrainingFailed) as error:
            log.warning("model %s: no snapshot was made: %s", self.row.id, error)

    def _snapshot(self, seq: int) -> Awaitable[None]:
        """Ask for the state as it is after request `seq`, the last one that was sent; what is
        returned waits for it, and keeps it."""
        assert self.member is not None
        folder = self._around.store.new_folder()
        self._steps = 0
        saved = self.member.training.train(self.row.id, [SaveState(folder)])[0]
        return self._keep(seq, folder, self._life, saved)

    async def _keep(self, seq: int, folder: str, life: int, saved: asyncio.Future) -> None:
        try:
            await saved
            for pending in [p for p in self.pending.values() if p.seq <= seq]:
                await pending.done.wait()
            async with self._changing:
                if self._life != life:  # the model was made again of an earlier snapshot
                    return
                await self._around.journal.until_written(
                    lambda s: write_snapshot(s, self.row.id, folder, seq)
                )
                self.row.snapshot_path, self.row.snapshot_seq = folder, seq
                self.done = {s: again for s, again in self.done.items() if s > seq}
        finally:
            self._around.store.in_use.discard(folder)
