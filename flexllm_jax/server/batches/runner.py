"""Batches from creation to their results, whatever happens to either process.

Each line is a request of the batch's owner in the class that waits longest, so that it runs in what
others leave. Its answer is on disk before it counts; a process that starts again asks only for what
is not there. What cannot be answered now (no engine, too many requests) is asked again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.types import ASGIApp

from flexllm_jax.config import Config
from flexllm_jax.server.batches import records
from flexllm_jax.server.batches.lines import (
    Line,
    ResultFile,
    check_lines,
    no_result,
    read_line,
    read_lines,
    result,
)
from flexllm_jax.server.database import BatchRow, Database, File, now
from flexllm_jax.server.finetuning.files import FileStore, new_file_id
from flexllm_jax.server.http.access import ApiKeys
from flexllm_jax.server.http.inner import ask

log = logging.getLogger(__name__)

_LATER = (429, 503, 507)  # statuses of what can be asked again
_LONGEST_WAIT_S = 10.0
_WRITTEN_EVERY_S = 0.5


class BatchRunner:
    """Runs the batches of a server. Call `start` once in the loop."""

    def __init__(self, config: Config, database: Database, files: FileStore, keys: ApiKeys):
        self._database, self._files, self._keys = database, files, keys
        self._folder = files.folder.parent / "batches"
        self._slo = config.scheduler.least_urgent
        at_once = config.server.batch_requests or max(1, config.scheduler.max_sequences // 2)
        self._slots, self._at_once = asyncio.Semaphore(at_once), at_once
        self._tasks: dict[str, asyncio.Task] = {}
        self._cancelled: dict[str, asyncio.Event] = {}

    async def start(self, app: ASGIApp) -> None:
        """Go on with what an earlier process left. `app` answers requests."""
        self._app = app
        for batch_id in await self._database.until_written(records.unfinished):
            self.begin(batch_id)

    def stop(self) -> None:
        """The server ends: the next start goes on."""
        for task in self._tasks.values():
            task.cancel()

    def begin(self, batch_id: str) -> None:
        """Run a batch that the database has."""
        self._cancelled[batch_id] = asyncio.Event()
        task = asyncio.create_task(self._run(batch_id))
        self._tasks[batch_id] = task
        task.add_done_callback(partial(self._done, batch_id))

    def _done(self, batch_id: str, task: asyncio.Task) -> None:
        del self._tasks[batch_id], self._cancelled[batch_id]
        if not task.cancelled() and (error := task.exception()):
            log.error("batch %s", batch_id, exc_info=error)

    async def cancel(self, batch_id: str) -> BatchRow:
        """Ask no more of a batch's requests; its results so far are kept."""
        row = await self._database.run(partial(records.begin_cancel, batch_id=batch_id))
        if (event := self._cancelled.get(batch_id)) is not None:
            event.set()
        return row

    async def _move(self, batch_id: str, status: str, **fields: Any) -> None:
        move = partial(records.move, batch_id=batch_id, status=status, **fields)
        await self._database.until_written(move)

    async def _run(self, batch_id: str) -> None:
        query = select(BatchRow).where(BatchRow.id == batch_id)
        row = await self._database.until_written(lambda s: s.scalars(query).one())
        path = self._files.path(row.input_file_id)
        if row.status == "validating":
            try:
                total, errors = await asyncio.to_thread(check_lines, path, row.endpoint)
            except OSError as error:
                errors, total = [_unreadable(error)], 0
            if errors:
                await self._move(batch_id, "failed", errors=errors)
                return
            if not self._cancelled[batch_id].is_set():
                await self._move(batch_id, "in_progress", total=total)
        elif row.status == "cancelling":
            self._cancelled[batch_id].set()
        folder = self._folder / batch_id
        outputs, failures = await asyncio.to_thread(
            lambda: (ResultFile(folder / "output.jsonl"), ResultFile(folder / "error.jsonl"))
        )
        status = await self._answer_all(row, path, outputs, failures)
        await self._finish(row, status, outputs, failures)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    # -- its requests -----------------------------------------------------------------------------

    async def _answer_all(
        self, row: BatchRow, path: Path, outputs: ResultFile, failures: ResultFile
    ) -> str:
        """Answer what is not answered; returns how the batch ends."""
        done = outputs.names | failures.names
        left = (
            line
            for _, text in read_lines(path)
            if (line := read_line(text, row.endpoint)).custom_id not in done
        )
        results: asyncio.Queue[tuple[Line, int, Any]] = asyncio.Queue()
        cancelled = self._cancelled[row.id]
        writer = asyncio.create_task(self._keep(row, results, outputs, failures))
        workers = [
            asyncio.create_task(self._work(row, left, results)) for _ in range(self._at_once)
        ]
        stop = asyncio.create_task(cancelled.wait())
        everything = asyncio.gather(*workers)
        try:
            patience = max(0.0, row.expires_at - time.time())
            await asyncio.wait(
                {stop, everything}, timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
            if everything.done():
                everything.result()
                status, reason = "completed", None
            elif cancelled.is_set():
                status, reason = "cancelled", None
            else:
                status, reason = "expired", "the batch's time was over"
        finally:
            for task in (stop, everything):
                task.cancel()
            await asyncio.gather(stop, *workers, return_exceptions=True)
            results.put_nowait((_END, 0, None))
            await writer
        if reason:
            await asyncio.to_thread(_note_unanswered, path, row.endpoint, outputs, failures, reason)
        return status

    async def _work(
        self, row: BatchRow, left: Iterator[Line], results: asyncio.Queue[tuple[Line, int, Any]]
    ) -> None:
        client = self._keys.of_owner(row.owner)
        for line in left:
            body = json.dumps({"slo": self._slo} | line.body).encode()
            wait_s = 0.5
            while True:
                async with self._slots:
                    reply = await ask(self._app, client, row.endpoint, body)
                if reply.status not in _LATER:
                    break
                told = reply.headers.get("retry-after", "")
                wait_s = min(_LONGEST_WAIT_S, float(told) if told.isdigit() else 2 * wait_s)
                await asyncio.sleep(wait_s)
            results.put_nowait((line, reply.status, json.loads(reply.body)))

    async def _keep(
        self,
        row: BatchRow,
        results: asyncio.Queue[tuple[Line, int, Any]],
        outputs: ResultFile,
        failures: ResultFile,
    ) -> None:
        """Write results down as they come, several at once, until the last."""
        ended = False
        while not ended:
            taken = [await results.get()]
            await asyncio.sleep(0 if taken[0][0] is _END else _WRITTEN_EVERY_S)
            while not results.empty():
                taken.append(results.get_nowait())
            ended = any(line is _END for line, _, _ in taken)
            kept = [each for each in taken if each[0] is not _END]
            good = [result(line.custom_id, s, body) for line, s, body in kept if s < 400]
            bad = [result(line.custom_id, s, body) for line, s, body in kept if s >= 400]
            await asyncio.to_thread(lambda g=good, b=bad: (outputs.write(g), failures.write(b)))
            counts = {"completed": len(outputs.names), "failed": len(failures.names)}
            await self._database.until_written(partial(_count, batch_id=row.id, counts=counts))

    async def _finish(
        self, row: BatchRow, status: str, outputs: ResultFile, failures: ResultFile
    ) -> None:
        """Make files of the results. They have their names before the database knows of them, and
        a start after a kill makes them again."""
        if status == "completed":
            await self._move(row.id, "finalizing")
        made: dict[str, File] = {}
        for kind, results in (("output", outputs), ("error", failures)):
            if not results.names:
                continue
            file = File(id=new_file_id(), filename=f"{row.id}_{kind}.jsonl", purpose="batch_output")
            file.bytes, file.owner = results.path.stat().st_size, row.owner
            if row.output_expires_after is not None:
                file.expires_at = now() + row.output_expires_after
            with suppress(FileExistsError):
                os.link(results.path, self._files.path(file.id))
            made[kind] = file

        def write(session: Session) -> None:
            for file in made.values():
                session.merge(file)
            ids = {f"{kind}_file_id": file.id for kind, file in made.items()}
            counts = {"completed": len(outputs.names), "failed": len(failures.names)}
            records.move(session, row.id, status, **ids, **counts)

        await self._database.until_written(write)


_END = Line("", {})


def _unreadable(error: OSError) -> dict[str, Any]:
    message = f"the input file cannot be read: {error.strerror}"
    return {"code": "invalid_input_file", "message": message, "line": None, "param": None}


def _count(session: Session, batch_id: str, counts: dict[str, int]) -> None:
    row = session.scalars(select(BatchRow).where(BatchRow.id == batch_id)).one()
    row.completed, row.failed = counts["completed"], counts["failed"]


def _note_unanswered(
    path: Path, endpoint: str, outputs: ResultFile, failures: ResultFile, reason: str
) -> None:
    done = outputs.names | failures.names
    names = (read_line(text, endpoint).custom_id for _, text in read_lines(path))
    left = (no_result(name, "batch_expired", reason) for name in names if name not in done)
    while some := list(islice(left, 1000)):
        failures.write(some)
