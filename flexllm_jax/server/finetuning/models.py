"""Finetuned models that are deleted: those that jobs ended with, and those of their checkpoints.

The database says first that a model is deleted; its folder goes after that, at the next start if
this process is killed in between. The job stays, and what it resumes from.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from flexllm_jax.config.sections.graders import asked_models
from flexllm_jax.server.database import CheckpointRow, Database, JobRow
from flexllm_jax.server.engines.client import EngineUnavailable
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.registry import ModelRegistry, ServedAdapter
from flexllm_jax.server.finetuning.files import UNFINISHED
from flexllm_jax.server.finetuning.schema import CreateJob
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError


class FinetunedModels:
    """Deletes what jobs have made from the database, `models` and the engines."""

    def __init__(self, database: Database, models: ModelRegistry, engines: Engines):
        self._database, self._models, self._engines = database, models, engines
        for path in database.run_now(_deleted_paths):
            shutil.rmtree(path, ignore_errors=True)

    async def delete(self, name: str, client: Client) -> None:
        """Forget a finetuned model; requests that use it finish. ApiError 400 for another one, 404
        where there is none, 409 while a job needs it."""
        adapter = self._models.resolve(name, client)
        if adapter is None:
            raise ApiError(400, "the base model cannot be deleted", param="model")
        await self._database.run(lambda s: _note_deleted(s, adapter))
        self._models.adapters.pop(name, None)
        with contextlib.suppress(EngineUnavailable):  # one that starts later does not know it
            await self._engines.unload_adapter(adapter.engine_name)
        await asyncio.to_thread(shutil.rmtree, adapter.path, ignore_errors=True)


def _note_deleted(session: Session, adapter: ServedAdapter) -> None:
    job = select(JobRow).where(
        JobRow.fine_tuned_model == adapter.name, JobRow.status == "succeeded"
    )
    made = session.scalars(job).first()
    if made is None:
        checkpoint = select(CheckpointRow).where(CheckpointRow.name == adapter.name)
        made = session.scalars(checkpoint).first()
    if made is None:
        message = f"{adapter.name!r} was not finetuned here: only finetuned models can be deleted"
        raise ApiError(400, message, param="model")
    for other in session.scalars(select(JobRow).where(JobRow.status.in_(UNFINISHED))):
        rewards = CreateJob.model_validate(other.request).rewards
        graders = [part["model"] for _, part in asked_models(rewards.grader)] if rewards else []
        if other.init_adapter == adapter.path or adapter.name in graders:
            raise ApiError(409, f"job {other.id} still needs the model: cancel it first")
    made.deleted = True


def _deleted_paths(session: Session) -> list[Path]:
    """Folders of models that are deleted and are there."""
    ended = session.scalars(select(JobRow.adapter_path).where(JobRow.deleted.is_(True)))
    passed = session.scalars(select(CheckpointRow.path).where(CheckpointRow.deleted.is_(True)))
    return [Path(path) for path in (*ended, *passed) if path and Path(path).is_dir()]
