"""What outlives the process: files, jobs, their events and checkpoints, in any SQLAlchemy database.

All access is from one thread, in transactions; the asyncio loop only waits for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import DDL, JSON, ForeignKey, String, Text, create_engine, event, inspect
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from flexllm_jax.config import ConfigError

Result = TypeVar("Result")


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
    engine_losses: Mapped[int] = mapped_column(default=0)  # engines that ended while it ran
    created_at: Mapped[int] = mapped_column(default=now)
    finished_at: Mapped[int | None]
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")

    def run_now(self, function: Callable[[Session], Result]) -> Result:
        """Run `function` in a transaction, here."""
        with self._sessions.begin() as session:
            return function(session)

    async def run(self, function: Callable[[Session], Result]) -> Result:
        """Run `function` in a transaction, in the database's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.run_now, function)

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
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
