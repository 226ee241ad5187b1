"""Folders of weights, and the rows that name them: checkpoints, samplers without a name, snapshots.

Each save writes a folder of its own, so what is sampled from never changes. A folder that no row
names any more is removed: that is how checkpoints are deleted, overwritten and expire, and how
samplers end.
"""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from flexllm_jax.config import Config
from flexllm_jax.server.engines.registry import ModelRegistry, ServedAdapter
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.shares import fair_room
from flexllm_jax.server.tinker.journal import Journal
from flexllm_jax.server.tinker.protocol import paths
from flexllm_jax.server.tinker.protocol.paths import TinkerPath
from flexllm_jax.server.tinker.sessions import unknown
from flexllm_jax.server.tinker.tables import CheckpointRow, ModelRow, SamplerRow


class Store:
    """Checkpoints by their paths, and the folders of all weights."""

    def __init__(self, config: Config, journal: Journal, models: ModelRegistry, several: bool):
        self.folder = config.output_dir.absolute() / "tinker"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._limit = config.server.tinker.max_checkpoint_bytes
        self._journal, self._models, self._several = journal, models, several
        self._served: set[str] = set()  # paths that are names of models in OpenAI's interfaces
        self.in_use: set[str] = set()  # folders being written

    def new_folder(self) -> str:
        """For weights that are about to be written; in use until `written`."""
        folder = str(self.folder / uuid.uuid4().hex)
        self.in_use.add(folder)
        return folder

    # -- in transactions --------------------------------------------------------------------------

    def check_room(self, session: Session, owner: str | None) -> None:
        """ValueError when no more may be saved."""
        held: dict[str | None, int] = {}
        for table in (CheckpointRow, SamplerRow):
            sums = select(table.owner, func.sum(table.size_bytes)).group_by(table.owner)
            for key, size in session.execute(sums):
                held[key] = held.get(key, 0) + int(size or 0)
        free = self._limit - sum(held.values())
        room = fair_room(free, held.get(owner, 0)) if self._several else free
        if room <= 0:
            raise ValueError(
                f"checkpoints and samplers have {held.get(owner, 0)} bytes, as many as they may "
                f"(server.tinker.max_checkpoint_bytes: {self._limit} for all): delete some"
            )

    def find_now(self, session: Session, path: TinkerPath, owner: str | None) -> CheckpointRow:
        """A checkpoint that `owner` may use; ValueError."""
        row = session.get(CheckpointRow, tuple(path))
        if row is None or _expired(row) or not (row.public or self._is_of(row.owner, owner)):
            raise ValueError(f"path: there is no checkpoint {str(path)!r}")
        return row

    def _is_of(self, owner: str | None, asking: str | None) -> bool:
        return not self._several or owner is None or owner == asking

    # -- for requests -----------------------------------------------------------------------------

    async def resolve(self, text: str, client: Client) -> CheckpointRow:
        """The checkpoint at a path, or the adapter of that name; ValueError."""
        path = paths.parse(text)
        if path.run_id == paths.SERVED:
            try:
                adapter = self._models.resolve(path.name, client)
            except ApiError as error:
                raise ValueError(f"path: {error.message}") from None
            if adapter is None:
                raise ValueError(f"path: {path.name!r} is the base model, and no adapter")
            return CheckpointRow(
                **path._asdict(),
                owner=adapter.owner,
                base_model=self._models.base,
                engine_name=adapter.engine_name,
                folder=adapter.path,
                created_at=float(adapter.created),
            )
        row = await self._journal.read(lambda s: s.get(CheckpointRow, tuple(path)))
        if row is None or _expired(row) or not (row.public or client.may_see(row.owner)):
            raise ValueError(f"path: there is no checkpoint {text!r}")
        return row

    async def own(self, client: Client, path: TinkerPath) -> CheckpointRow:
        """A checkpoint that a client may change; ApiError 404."""
        row = await self._journal.read(lambda s: s.get(CheckpointRow, tuple(path)))
        if row is None or _expired(row) or not client.may_see(row.owner):
            raise unknown("checkpoint", str(path))
        return row

    async def delete(self, client: Client, path: TinkerPath) -> None:
        """Forget a checkpoint; samplers that have it go on."""
        await self.own(client, path)
        await self._journal.write(lambda s: _delete(s, path))
        self.withdraw(str(path))

    async def change(self, client: Client, path: TinkerPath, **values: Any) -> None:
        """Change fields of a checkpoint."""
        await self.own(client, path)
        where = [CheckpointRow.run_id == path.run_id, CheckpointRow.kind == path.kind]
        query = update(CheckpointRow).where(*where, CheckpointRow.name == path.name)
        await self._journal.write(lambda s: s.execute(query.values(**values)))

    async def list(
        self, client: Client, run_id: str | None, limit: int | None, offset: int
    ) -> tuple[list[CheckpointRow], int]:
        """Checkpoints, the newest first, and how many there are."""
        alive = [client.visible(CheckpointRow.owner)]
        alive.append(CheckpointRow.expires_at.is_(None) | (CheckpointRow.expires_at > time.time()))
        if run_id is not None:
            alive.append(CheckpointRow.run_id == run_id)
        query = select(CheckpointRow).where(*alive).order_by(CheckpointRow.created_at.desc())
        count = select(func.count()).select_from(CheckpointRow).where(*alive)

        def read(session: Session) -> tuple[list[CheckpointRow], int]:
            rows = list(session.scalars(query.limit(limit).offset(offset)))
            return rows, session.scalar(count) or 0

        return await self._journal.read(read)

    # -- what is served under a path in OpenAI's interfaces ---------------------------------------

    def serve(self, row: CheckpointRow) -> None:
        """A path is the name of a model, too."""
        adapter = ServedAdapter(
            row.path, row.engine_name, row.folder, int(row.created_at), row.owner
        )
        self._models.adapters[row.path] = adapter
        self._served.add(row.path)

    def withdraw(self, path: str) -> None:
        """It is not any more."""
        if path in self._served:
            self._served.discard(path)
            self._models.adapters.pop(path, None)

    def restore(self, rows: Iterable[CheckpointRow]) -> None:
        """At the start: serve all there are."""
        for row in rows:
            if row.kind != paths.EXTERNAL and not _expired(row):
                self.serve(row)

    # -- from time to time ------------------------------------------------------------------------

    async def sweep(self, sampler_idle_s: float) -> list[str]:
        """Remove what has expired, samplers nobody used for long, and folders that no row names;
        returns these folders, which are the engines' names of what was sampled from."""

        def forget(session: Session) -> list[CheckpointRow]:
            now = time.time()
            expired = list(
                session.scalars(select(CheckpointRow).where(CheckpointRow.expires_at <= now))
            )
            idle = list(
                session.scalars(
                    select(SamplerRow).where(
                        SamplerRow.ephemeral, SamplerRow.used_at < now - sampler_idle_s
                    )
                )
            )
            for row in (*expired, *idle):
                session.delete(row)
            return expired

        expired = await self._journal.write(forget)
        for row in expired:
            self.withdraw(row.path)
        there = await asyncio.to_thread(lambda: {str(p) for p in self.folder.iterdir()})
        busy = set(self.in_use)  # before the rows are read: a folder is in one or the other
        named = await self._journal.read(_named_folders)
        known = busy | named | self.in_use
        # What is half-written has the name that it will have, and a suffix.
        unnamed = sorted(f for f in there if str(Path(f).with_suffix("")) not in known)
        for folder in unnamed:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return unnamed


def _named_folders(session: Session) -> set[str]:
    columns = (
        CheckpointRow.folder,
        SamplerRow.folder,
        ModelRow.snapshot_path,
        ModelRow.start_path,
    )
    return {folder for column in columns for folder in session.scalars(select(column)) if folder}


def _expired(row: CheckpointRow) -> bool:
    return row.expires_at is not None and row.expires_at <= time.time()


def _delete(session: Session, path: TinkerPath) -> None:
    row = session.get(CheckpointRow, tuple(path))
    if row is not None:
        session.delete(row)


def adapter_of(row: CheckpointRow | SamplerRow) -> ServedAdapter | None:
    """What the engines sample from; None: the base model."""
    if row.engine_name is None or row.folder is None:
        return None
    return ServedAdapter(row.engine_name, row.engine_name, row.folder, owner=row.owner)


def folder_files(folder: Path) -> list[Path]:
    """The files that others can read: an adapter in PEFT's format."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [folder / name for name in names if (folder / name).is_file()]
