"""Writes down what engines say of jobs, whatever the database does meanwhile.

Of each job the newest report is kept until it is written; it has all facts that are not
acknowledged, so an older one is never needed. What is written is acknowledged, once the transaction
is on disk; an engine tells the rest again. A report that cannot be written is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from flexllm_jax.server.database import Database, DatabaseUnavailable
from flexllm_jax.server.engines.client import EngineClient
from flexllm_jax.server.engines.protocol import JobReport
from flexllm_jax.server.engines.registry import ServedAdapter
from flexllm_jax.server.finetuning.records import JobRecords

log = logging.getLogger(__name__)

_AGAIN_S = 0.5  # between attempts
_LATE_S = 2.0  # a delay that is told


class ReportWriter:
    """`written` is called with every report that is on disk, and the adapters it brought."""

    def __init__(
        self,
        database: Database,
        records: JobRecords,
        written: Callable[[JobReport, list[ServedAdapter]], Awaitable[None]],
    ):
        self._database, self._records, self._on_written = database, records, written
        self._pending: dict[str, tuple[EngineClient, JobReport]] = {}
        self._failing: dict[str, tuple[float, str]] = {}  # since when, and why
        self._bugs: set[str] = set()  # that are logged
        self._wake = asyncio.Event()
        self._progress = asyncio.Condition()

    def take(self, engine: EngineClient, report: JobReport) -> None:
        """Called with every report; those without facts have nothing to write."""
        if report.facts:
            self._pending[report.name] = engine, report
            self._wake.set()

    async def settled(self, engine: EngineClient) -> None:
        """Wait until all that an engine said is written."""
        async with self._progress:
            await self._progress.wait_for(
                lambda: all(who is not engine for who, _ in self._pending.values())
            )

    async def all_settled(self, timeout_s: float) -> bool:
        """Wait until all is written; whether it was within `timeout_s`."""
        end = time.monotonic() + timeout_s
        while self._pending and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self._pending

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            if not self._pending:
                self._wake.clear()
                if self._database.trouble is None:
                    await self._wake.wait()
                else:  # what was to be written may have been a client's
                    await asyncio.sleep(_AGAIN_S)
                    await self._database.probe()
            for name, (engine, report) in list(self._pending.items()):
                await self._write(name, engine, report)
            async with self._progress:
                self._progress.notify_all()
            if self._failing:
                await asyncio.sleep(_AGAIN_S)

    async def _write(self, name: str, engine: EngineClient, report: JobReport) -> None:
        since, reason = self._failing.get(name, (None, ""))
        late_s = 0.0 if since is None else time.monotonic() - since
        late = f"for {late_s:.0f} s: {reason}" if late_s > _LATE_S else None
        try:
            note = partial(self._records.note, report=report, late=late)
            adapters = await self._database.run(note)
        except (DatabaseUnavailable, OSError) as error:
            reason = " ".join(str(error).split())
            self._database.note_trouble(reason)
            self._failing[name] = since or time.monotonic(), reason
            return
        except Exception as error:  # a bug: what it is about is told again, and logged once
            if repr(error) not in self._bugs:
                self._bugs.add(repr(error))
                log.exception("the report of %s could not be written down", name)
            adapters = None
        self._failing.pop(name, None)
        if self._pending.get(name, (None, None))[1] is report:
            del self._pending[name]
        if adapters is not None:
            engine.acknowledge(name, report.run, report.facts[-1].number)
            await self._on_written(report, adapters)
