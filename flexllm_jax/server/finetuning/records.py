"""What the database says of jobs: events, and what the engine tells of their progress.

All functions run inside of a transaction.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from flexllm_jax.config import Config
from flexllm_jax.finetune.data import Dataset
from flexllm_jax.server.engines.protocol import JobReport
from flexllm_jax.server.engines.registry import ModelRegistry, ServedAdapter
from flexllm_jax.server.finetuning.database import CheckpointRow, EventRow, File, JobRow, now
from flexllm_jax.server.finetuning.files import FileStore, new_file_id

SHOWN_ROWS = 20  # of a file's bad ones, in events


class JobRecords:
    """Writes down what engines say of jobs. `forget` a job whose engine is lost: another one says
    again what it took over."""

    def __init__(self, config: Config, models: ModelRegistry, files: FileStore):
        self._config, self._models, self._files = config, models, files
        self._resumed: set[str] = set()  # jobs of which it is told that they went on
        self._validations: dict[str, int] = {}  # step of the last validation told, by job

    def forget(self, job_id: str) -> None:
        """Another engine tells of this job from here on."""
        self._resumed.discard(job_id)
        self._validations.pop(job_id, None)

    def note(self, session: Session, report: JobReport) -> list[ServedAdapter]:
        """In a transaction: what is new of a job. Returns the adapters that can be served now."""
        job = find_job(session, report.name)
        if job is None or job.status in ("succeeded", "failed"):
            return []
        if report.resumed_from and job.id not in self._resumed:
            self._resumed.add(job.id)
            tell(session, job.id, f"Resumed from step {report.resumed_from}")
        total = job.total_steps = report.total_steps
        validation = dict(report.validation_losses)
        for index, loss in enumerate(report.losses):
            step = report.losses_from + index + 1
            if step <= min(report.resumed_from, job.step):
                continue  # told by the engine that took it
            text = f"Step {step}/{total}: training loss={loss:.4f}"
            data = {"step": step, "total_steps": total, "train_loss": loss}
            tell(session, job.id, text, type="metrics", data=data)
        told = self._validations.get(job.id, report.resumed_from)
        for step, loss in report.validation_losses:
            if step > told:
                text = f"Step {step}/{total}: validation loss={loss:.4f}"
                data = {"step": step, "total_steps": total, "valid_loss": loss}
                tell(session, job.id, text, type="metrics", data=data)
                self._validations[job.id] = step
        job.step = report.step
        adapters = []
        for step in report.checkpoints:
            adapters += self._note_checkpoint(session, job, step, validation)
        for text in report.messages:
            known = select(EventRow.number).where(
                EventRow.job_id == job.id, EventRow.message == text
            )
            if session.scalars(known).first() is None:
                tell(session, job.id, text, level="warn")
        if job.status == "cancelled":  # whatever became of it; its checkpoints are there
            return adapters
        if report.status == "succeeded":
            job.status, job.finished_at, job.trained_tokens = "succeeded", now(), report.tokens
            name, path = self._name(job), str(self._folder(job.id) / "adapter")
            job.fine_tuned_model, job.adapter_path = name, path
            job.result_files = [self._write_losses(session, job)]
            adapters.append(ServedAdapter(name, job.id, path, owner=job.owner))
            tell(session, job.id, f"New fine-tuned model created: {name}")
            tell(session, job.id, "The job has successfully completed")
        elif report.status == "failed":
            job.status, job.finished_at = "failed", now()
            job.error = {"code": "training_failed", "message": report.reason, "param": None}
            tell(session, job.id, f"The job failed: {report.reason}", level="error")
        return adapters

    def _note_checkpoint(
        self, session: Session, job: JobRow, step: int, validation: dict[int, float]
    ) -> list[ServedAdapter]:
        known = select(CheckpointRow).where(
            CheckpointRow.job_id == job.id, CheckpointRow.step == step
        )
        if session.scalars(known).first() is not None:
            return []
        name = f"{self._name(job)}:ckpt-step-{step}"
        path = str(self._folder(job.id) / "adapters" / f"step-{step}")
        losses = losses_of(session, job.id)
        metrics = {"step": step, "train_loss": losses.get(step)}
        if step in validation:
            metrics["valid_loss"] = validation[step]
        session.add(CheckpointRow(job_id=job.id, step=step, name=name, path=path, metrics=metrics))
        tell(session, job.id, f"Checkpoint created at step {step} with Snapshot ID: {name}")
        return [ServedAdapter(name, f"{job.id}.step-{step}", path, owner=job.owner)]

    def _write_losses(self, session: Session, job: JobRow) -> str:
        """Keep a job's losses as a CSV file; returns its id."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", "train_loss"])
        writer.writerows(sorted(losses_of(session, job.id).items()))
        file_id, data = new_file_id(), text.getvalue().encode()
        self._files.path(file_id).write_bytes(data)
        file = File(id=file_id, filename="step_metrics.csv", purpose="fine-tune-results")
        file.bytes, file.owner = len(data), job.owner
        session.add(file)
        return file_id

    def _name(self, job: JobRow) -> str:
        """The finetuned model's name, as OpenAI makes them."""
        suffix = job.request.get("suffix") or ""
        short = job.id.removeprefix("ftjob-")
        return f"ft:{self._models.base}:{self._config.server.organization}:{suffix}:{short}"

    def _folder(self, job_id: str) -> Path:
        return self._config.output_dir / job_id


def losses_of(session: Session, job_id: str) -> dict[int, float]:
    """Training loss by step; of a step taken twice, the last."""
    query = (
        select(EventRow.data)
        .where(EventRow.job_id == job_id, EventRow.type == "metrics")
        .order_by(EventRow.number)
    )
    rows = [data for data in session.scalars(query) if data and "train_loss" in data]
    return {data["step"]: data["train_loss"] for data in rows}


def finished_adapters(session: Session) -> Iterator[ServedAdapter]:
    """Every adapter that jobs have made: of those that succeeded, and of checkpoints."""
    for job in session.scalars(select(JobRow).where(JobRow.status == "succeeded")):
        assert job.fine_tuned_model and job.adapter_path
        yield ServedAdapter(
            job.fine_tuned_model,
            job.id,
            job.adapter_path,
            job.finished_at or now(),
            job.owner,
        )
    query = select(CheckpointRow, JobRow.owner).join(JobRow, JobRow.id == CheckpointRow.job_id)
    for row, owner in session.execute(query.order_by(CheckpointRow.number)):
        name = f"{row.job_id}.step-{row.step}"
        yield ServedAdapter(row.name, name, row.path, row.created_at, owner)


def find_job(session: Session, job_id: str) -> JobRow | None:
    """A job by its id."""
    return session.scalars(select(JobRow).where(JobRow.id == job_id)).first()


def tell(
    session: Session,
    job_id: str,
    message: str,
    level: str = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
) -> None:
    """Add an event."""
    session.add(EventRow(job_id=job_id, message=message, level=level, type=type, data=data))


def tell_rows(session: Session, job_id: str, kind: str, dataset: Dataset) -> None:
    """Add events on what a file holds, and on the first rows that cannot be used."""
    tell(
        session,
        job_id,
        f"The {kind} file has {dataset.rows} {dataset.format} rows and {dataset.tokens} tokens "
        f"({dataset.trained_tokens} trained); {dataset.truncated} rows are truncated, "
        f"{len(dataset.skipped)} cannot be used",
    )
    if dataset.unread:
        tell(session, job_id, f"{kind} file: {dataset.describe_unread()}", level="warn")
    for row in dataset.skipped[:SHOWN_ROWS]:
        tell_row(session, job_id, kind, row.line, row.reason)


def tell_row(session: Session, job_id: str, kind: str, line: int, reason: str) -> None:
    """Add an event on a row that cannot be used."""
    text = f"{kind} file, line {line}: {reason}"
    data = {"line": line, "reason": reason, "file": kind}
    tell(session, job_id, text, level="warn", data=data)
