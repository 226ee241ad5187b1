"""Adapters that were loaded over HTTP outlive the process, as those of jobs do."""

from __future__ import annotations

import logging
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from flexllm_jax.server.database import Database, LoadedAdapter
from flexllm_jax.server.engines.registry import LOADED, ModelRegistry, ServedAdapter

log = logging.getLogger(__name__)


class LoadedAdapters:
    """What of `models` was loaded from `allowed` folders, in the database."""

    def __init__(self, database: Database, models: ModelRegistry, allowed: tuple[Path, ...]):
        self._database, self._models, self._allowed = database, models, allowed

    async def keep(self, name: str, adapter: ServedAdapter | None) -> None:
        """Note what is loaded under a name from now on; None: nothing."""

        def write(session: Session) -> None:
            if adapter is not None:
                session.merge(
                    LoadedAdapter(
                        name=name,
                        path=adapter.path,
                        owner=adapter.owner,
                        created_at=adapter.created,
                    )
                )
            elif (row := session.get(LoadedAdapter, name)) is not None:
                session.delete(row)

        await self._database.run(write)

    def restore(self) -> None:
        """At the start: serve what an earlier process had loaded, where it still may be."""
        roots = [root.resolve() for root in self._allowed]
        for row in self._database.run_now(lambda s: list(s.scalars(select(LoadedAdapter)))):
            folder = Path(row.path).resolve()
            if row.name == self._models.base or row.name in self._models.adapters:
                log.warning("adapter %s is not loaded again: the name is another's", row.name)
            elif not any(folder.is_relative_to(root) for root in roots):
                log.warning(
                    "adapter %s is not loaded again: server.adapter_dirs does not allow %s",
                    row.name,
                    folder,
                )
            elif not (folder / "adapter_config.json").exists():
                log.warning("adapter %s is gone from %s", row.name, folder)
            else:
                self._models.adapters[row.name] = ServedAdapter(
                    row.name, LOADED + row.name, row.path, row.created_at, row.owner
                )
