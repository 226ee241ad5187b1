"""Writing to the database for many requests at once: what comes while a transaction is being
written is written by the next one together, so a burst of promises costs few of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from flexllm_jax.server.database import Database, DatabaseUnavailable

Result = TypeVar("Result")
_AGAIN_S = 0.5


class Journal:
    """The database, with transactions that several share."""

    def __init__(self, database: Database):
        self._database = database
        self._waiting: list[tuple[Callable[[Session], Any], asyncio.Future]] = []
        self._writer: asyncio.Task[None] | None = None

    async def read(self, function: Callable[[Session], Result]) -> Result:
        """Run `function` in a transaction of its own, after all that was written before."""
        return await self._database.run(function)

    async def write(self, function: Callable[[Session], Result]) -> Result:
        """Run `function` in a transaction; when this returns, it is on disk. ApiError: the
        database refuses, and nothing was written."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((function, future))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return await asyncio.shield(future)

    async def until_written(self, function: Callable[[Session], Result]) -> Result:
        """`write`, again and again until it is done: for what no client would ask again."""
        while True:
            try:
                return await self.write(function)
            except DatabaseUnavailable:
                await asyncio.sleep(_AGAIN_S)

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []

            def run(session: Session, batch: list = batch) -> list[Any]:
                return [function(session) for function, _ in batch]

            try:
                results = await self._database.run(run)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
        self._writer = None
