"""What outlives the process: files, jobs, their events and checkpoints, loaded adapters, and what
other floors declare (responses), in any SQLAlchemy database.

All access is from one thread, in transactions; the asyncio loop only waits for them. A database
that refuses (locked, full, gone) is a `DatabaseUnavailable`, which requests are answered with; what
the server does by itself is tried `until_written`. `trouble` says why nothing can be written now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import DDL, JSON, ForeignKey, String, Text, create_engine, event, inspect
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from flexllm_jax.config import ConfigError
from flexllm_jax.server.http.errors import ApiError

log = logging.getLogger(__name__)

Result = TypeVar("Result")
_NO_ROOM = 1 << 20
_AGAIN_S = 0.5  # between attempts to write
_LOCKED_S = 3.0  # a writer waits so long for another program's lock


class DatabaseUnavailable(ApiError):
    """The database refuses at this moment: nothing was written."""


def now() -> int:
    """Unix time, seconds."""
    return int(time.time())


class Base(DeclarativeBase):
    """Tables of the server."""


class File(Base):
    """An uploaded file, or one that a job wrote. The bytes lie in a folder, under the id."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int]
    created_at: Mapped[int] = mapped_column(default=now)
    expires_at: Mapped[int | None]
    owner: Mapped[str | None] = mapped_column(Text)  # name of the key that made it; None: nobody


class JobRow(Base):
    """What the database says of a finetuning job. `config`: its FinetuneConfig, once its files are
    validated. `owner`: as a file's."""

    __tablename__ = "jobs"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    status: Mapped[str] = mapped_column(String(32), index=True)
    model: Mapped[str] = mapped_column(Text)
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    config: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    fine_tuned_model: Mapped[str | None] = mapped_column(Text)
    adapter_path: Mapped[str | None] = mapped_column(Text)
    result_files: Mapped[list[str]] = mapped_column(JSON, default=list)
    trained_tokens: Mapped[int | None]
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int] = mapped_column(default=0)
    # Engines that ended while it ran, since it last got further than `lost_at_step`.
    validations: Mapped[int | None] = mapped_column(default=0)  # begun, of its files
    engine_losses: Mapped[int] = mapped_column(default=0)
    lost_at_step: Mapped[int | None]
    init_adapter: Mapped[str | None] = mapped_column(Text)  # folder that `model` meant
    run: Mapped[str | None] = mapped_column(String(64))  # of whose facts `facts` are written down
    facts: Mapped[int | None]
    tracked: Mapped[bool | None]  # whether all trackers know how it ended; None: none knows of it
    questions: Mapped[list[dict[str, Any]] | None] = mapped_column(
        JSON
    )  # for a look at its outputs
    created_at: Mapped[int] = mapped_column(default=now)
    finished_at: Mapped[int | None]
    deleted: Mapped[bool | None]  # its fine_tuned_model is
    owner: Mapped[str | None] = mapped_column(Text)


class EventRow(Base):
    """Something that happened to a job."""

    __tablename__ = "events"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[int] = mapped_column(default=now)
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(String(16), default="message")
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class CheckpointRow(Base):
    """An adapter as it was after an optimizer step, in PEFT's format at `path`."""

    __tablename__ = "checkpoints"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    step: Mapped[int]
    name: Mapped[str] = mapped_column(Text)
    path: Mapped[str] = mapped_column(Text)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[int] = mapped_column(default=now)
    deleted: Mapped[bool | None]


class BatchRow(Base):
    """A file of requests, and how far they are answered. `times`: by status, since when."""

    __tablename__ = "batches"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    status: Mapped[str] = mapped_column(String(32), index=True)
    endpoint: Mapped[str] = mapped_column(Text)
    input_file_id: Mapped[str] = mapped_column(String(64))
    completion_window: Mapped[str] = mapped_column(String(16))
    output_file_id: Mapped[str | None] = mapped_column(String(64))
    error_file_id: Mapped[str | None] = mapped_column(String(64))
    output_expires_after: Mapped[int | None]
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON)
    labels: Mapped[dict[str, str] | None] = mapped_column(JSON)  # its `metadata`
    times: Mapped[dict[str, int]] = mapped_column(JSON, default=dict)
    total: Mapped[int] = mapped_column(default=0)
    completed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[int] = mapped_column(default=now)
    expires_at: Mapped[int]
    owner: Mapped[str | None] = mapped_column(Text)


class LoadedAdapter(Base):
    """An adapter that was loaded over HTTP."""

    __tablename__ = "loaded_adapters"
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    path: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(default=now)
    owner: Mapped[str | None] = mapped_column(Text)


class Heartbeat(Base):
    """Written when writing has failed, to see whether it is possible again."""

    __tablename__ = "heartbeats"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]


class Database:
    """The database at an SQLAlchemy URL; tables are made if they are missing, and so are columns
    that came later. ConfigError when it cannot be used."""

    def __init__(self, url: str):
        try:
            engine = create_engine(url)
            if make_url(url).get_backend_name() == "sqlite":
                event.listen(engine, "connect", _set_up_sqlite)
            Base.metadata.create_all(engine)
            _add_columns(engine)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"server.database: cannot be used: {reason}") from None
        self._engine = engine
        self._sessions = sessionmaker(engine, expire_on_commit=False)
        event.listen(self._sessions, "after_flush", _note_writing)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._file = engine.url.database if engine.dialect.name == "sqlite" else None
        self._inode = self._find_inode()
        self.trouble: str | None = None

    def run_now(self, function: Callable[[Session], Result]) -> Result:
        """Run `function` in a transaction, here. DatabaseUnavailable: it was not made."""
        if self._find_inode() != self._inode:
            raise self._refused(503, self._gone())
        try:
            with self._sessions() as session:
                with session.begin():
                    result = function(session)
                if session.info.get("writes"):
                    self._wrote()
                return result
        except (ProgrammingError, IntegrityError, DataError):
            raise  # a bug
        except DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            raise self._refused(507 if self._is_full(reason) else 503, reason) from None

    def _is_full(self, reason: str) -> bool:
        """Whether SQLite refuses because its disk is full; it does not always say so."""
        if not self._file:
            return False
        free = shutil.disk_usage(Path(self._file).absolute().parent).free
        return "full" in reason or ("I/O" in reason and free < _NO_ROOM)

    def problem(self) -> str | None:
        """Why nothing can be written, as far as is known; None: it can."""
        if self._find_inode() != self._inode:
            return f"the database refuses: {self._gone()}"
        return self.trouble

    def _gone(self) -> str:
        return f"{self._file} is gone or was replaced: restart the server"

    async def run(self, function: Callable[[Session], Result]) -> Result:
        """Run `function` in a transaction, in the database's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.run_now, function)

    async def probe(self) -> None:
        """Write something that means nothing, to learn whether that is possible again."""
        with contextlib.suppress(DatabaseUnavailable):
            await self.run(lambda s: s.merge(Heartbeat(id=1, at=time.time())))

    async def until_written(self, function: Callable[[Session], Result]) -> Result:
        """`run`, again and again until it is done: for what no client would ask again."""
        while True:
            try:
                return await self.run(function)
            except DatabaseUnavailable:
                await asyncio.sleep(_AGAIN_S)

    def _find_inode(self) -> int | None:
        """What tells the file that is open from another one of its name; None: there is none."""
        if not self._file or self._file == ":memory:":
            return None
        try:
            return os.stat(self._file).st_ino
        except OSError:
            return None

    def _refused(self, status: int, reason: str) -> DatabaseUnavailable:
        message = f"the database refuses: {reason}"
        if status == 507:
            message += "; free space on the disk"
        self.note_trouble(message)
        return DatabaseUnavailable(status, message, retry_after_s=5)

    def note_trouble(self, trouble: str) -> None:
        """Keep why nothing can be written; logged once."""
        if trouble != self.trouble:
            log.error("%s", trouble)
        self.trouble = trouble

    def _wrote(self) -> None:
        if self.trouble is not None:
            log.warning("the database can be written again")
        self.trouble = None

    def close(self) -> None:
        """Finish what is under way."""
        self._thread.shutdown(wait=True)
        self._engine.dispose()


def _add_columns(engine: Engine) -> None:
    """Add columns that an earlier version's tables lack; those that came later may all be null."""
    inspector = inspect(engine)
    for table in Base.metadata.sorted_tables:
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                kind = column.type.compile(engine.dialect)
                with engine.begin() as connection:
                    connection.execute(
                        DDL(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}")
                    )


def _set_up_sqlite(connection: Any, _: Any) -> None:
    """A transaction is on disk after power fails, too; readers never wait for a writer."""
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={_LOCKED_S * 1e3:.0f}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _note_writing(session: Session, _: Any) -> None:
    """A transaction that writes shows that the database can be written; one that reads does not."""
    session.info["writes"] = True
