"""What the database says of jobs: events, and what the engine tells of their progress.

All functions run inside of a transaction.
"""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from flexllm_jax.config import Config
from flexllm_jax.finetune.data import Dataset
from flexllm_jax.finetune.reinforcement.prompts import PromptDataset
from flexllm_jax.server.database import CheckpointRow, EventRow, File, JobRow, now
from flexllm_jax.server.engines.protocol import Fact, JobReport
from flexllm_jax.server.engines.registry import ModelRegistry, ServedAdapter
from flexllm_jax.server.finetuning.files import FileStore

SHOWN_ROWS = 20  # of a file's bad ones, in events
_NEAR = 16  # events read at once
_TOLD = ("loss", "reward")  # at least one of them is measured
_PREFIX = {"step": "train_", "validation": "valid_"}  # of what facts measure, in events


class JobRecords:
    """Writes down what engines say of jobs, each fact once however often it is told."""

    def __init__(self, config: Config, models: ModelRegistry, files: FileStore):
        self._config, self._models, self._files = config, models, files

    def note(
        self, session: Session, report: JobReport, late: str | None = None
    ) -> list[ServedAdapter]:
        """In a transaction: what is new of a job. Returns the adapters that can be served now.
        `late`: why, and for how long, this could not be written."""
        job = find_job(session, report.name)
        if job is None or job.status in ("succeeded", "failed"):
            return []
        again, done = job.run is not None, 0
        if job.run == report.run:
            done = job.facts or 0
        facts = [fact for fact in report.facts if fact.number > done]
        if not facts:
            return []
        job.run, job.facts, job.total_steps = report.run, facts[-1].number, report.total_steps
        if late is not None:
            text = f"What happened to the job could not be written down {late}"
            tell(session, job.id, text, level="warn")
        # What an earlier run has told, and this one knows from its checkpoint.
        told: dict[str, set[int]] = {}
        for kind in {f.kind for f in facts if f.kind in _PREFIX and f.step <= report.resumed_from}:
            told[kind] = {
                step for name in _TOLD for step in values_of(session, job.id, _PREFIX[kind] + name)
            }
        adapters = []
        for fact in facts:
            match fact.kind:
                case "step" | "validation":
                    job.step = max(job.step, fact.step)
                    if fact.step > report.resumed_from or fact.step not in told[fact.kind]:
                        self._note_metrics(session, job, fact)
                case "started":
                    job.step = fact.step
                    if fact.step:
                        tell(session, job.id, f"Resumed from step {fact.step}")
                    elif again:
                        text = "Started again from step 0: there is no checkpoint to go on from"
                        tell(session, job.id, text, level="warn")
                    adapters += self.find_checkpoints(session, job)
                case "checkpoint":
                    adapters += self._note_checkpoint(session, job, fact.step)
                case "message":
                    tell_once(session, job.id, fact.text or "", level="warn")
                case "ended" if job.status != "cancelled":  # whatever became of it
                    adapters += self._note_end(session, job, fact, report)
        return adapters

    def find_checkpoints(self, session: Session, job: JobRow) -> list[ServedAdapter]:
        """Take in the checkpoints on disk that the database does not know: the process that was to
        tell of them was killed."""
        names = self._folder(job.id).glob("adapters/step-*/adapter_config.json")
        steps = sorted(int(n) for name in names if (n := name.parent.name[5:]).isdecimal())
        found = [self._note_checkpoint(session, job, step) for step in steps]
        return [adapter for adapters in found for adapter in adapters]

    def _note_metrics(self, session: Session, job: JobRow, fact: Fact) -> None:
        what = "training" if fact.kind == "step" else "validation"
        values = [f"{n}={fact.metrics[n]:.4f}" for n in _TOLD if n in fact.metrics]
        text = f"Step {fact.step}/{job.total_steps}: {what} {', '.join(values)}"
        measured = {_PREFIX[fact.kind] + name: value for name, value in fact.metrics.items()}
        data = {"step": fact.step, "total_steps": job.total_steps, **measured}
        tell(session, job.id, text, type="metrics", data=data)

    def _note_end(
        self, session: Session, job: JobRow, fact: Fact, report: JobReport
    ) -> list[ServedAdapter]:
        if fact.status == "succeeded":
            job.status, job.finished_at, job.trained_tokens = "succeeded", now(), report.tokens
            name, path = self._name(job), str(self._folder(job.id) / "adapter")
            job.fine_tuned_model, job.adapter_path = name, path
            job.result_files = [self._write_metrics(session, job)]
            tell(session, job.id, f"New fine-tuned model created: {name}")
            tell(session, job.id, "The job has successfully completed")
            return [ServedAdapter(name, job.id, path, owner=job.owner)]
        if fact.status == "failed":
            job.status, job.finished_at = "failed", now()
            job.error = {"code": "training_failed", "message": fact.text, "param": None}
            tell(session, job.id, f"The job failed: {fact.text}", level="error")
        return []

    def _note_checkpoint(self, session: Session, job: JobRow, step: int) -> list[ServedAdapter]:
        known = select(CheckpointRow).where(
            CheckpointRow.job_id == job.id, CheckpointRow.step == step
        )
        if session.scalars(known).first() is not None:
            return []
        name = f"{self._name(job)}:ckpt-step-{step}"
        path = str(self._folder(job.id) / "adapters" / f"step-{step}")
        metrics = {"step": step, "train_loss": None} | metrics_at(session, job.id, step)
        session.add(CheckpointRow(job_id=job.id, step=step, name=name, path=path, metrics=metrics))
        tell(session, job.id, f"Checkpoint created at step {step} with Snapshot ID: {name}")
        return [ServedAdapter(name, f"{job.id}.step-{step}", path, owner=job.owner)]

    def _write_metrics(self, session: Session, job: JobRow) -> str:
        """Keep what a job's steps measured as a CSV file; returns its id."""
        steps: dict[int, dict[str, float]] = {}
        for data in _metrics_events(session, job.id):
            steps.setdefault(data["step"], {}).update(_measured(data))
        names = list(dict.fromkeys(name for row in steps.values() for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": step, **steps[step]} for step in sorted(steps))
        # A name that is the job's: however often this is tried, there is one file.
        file_id = f"file-{uuid.uuid5(uuid.NAMESPACE_OID, job.id).hex}"
        data = text.getvalue().encode()
        self._files.path(file_id).write_bytes(data)
        file = File(id=file_id, filename="step_metrics.csv", purpose="fine-tune-results")
        file.bytes, file.owner = len(data), job.owner
        session.merge(file)
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
    return values_of(session, job_id, "train_loss")


def metrics_at(session: Session, job_id: str, step: int) -> dict[str, float]:
    """What a step and the validation after it measured, by name. Looked for from the newest event
    on, which is near: a long job has many events, and many checkpoints."""
    query = (
        select(EventRow.data)
        .where(EventRow.job_id == job_id, EventRow.type == "metrics")
        .order_by(EventRow.number.desc())
        .execution_options(yield_per=_NEAR)
    )
    found: dict[str, float] = {}
    for data in session.scalars(query):
        if data is None:
            continue
        if data["step"] == step:
            found = _measured(data) | found
        elif data["step"] < step and found:
            break
    return found


def _measured(data: dict[str, Any]) -> dict[str, float]:
    """The metrics in an event's data."""
    return {k: v for k, v in data.items() if k.startswith(tuple(_PREFIX.values()))}


def _metrics_events(session: Session, job_id: str) -> list[dict[str, Any]]:
    query = (
        select(EventRow.data)
        .where(EventRow.job_id == job_id, EventRow.type == "metrics")
        .order_by(EventRow.number)
    )
    return [data for data in session.scalars(query) if data]


def values_of(session: Session, job_id: str, name: str) -> dict[int, float]:
    """What the events of a job say of one value, by step; of a step taken twice, the last."""
    rows = _metrics_events(session, job_id)
    return {data["step"]: data[name] for data in rows if name in data}


def finished_adapters(session: Session) -> Iterator[ServedAdapter]:
    """Every adapter that jobs have made: of those that succeeded, and of checkpoints."""
    for job in session.scalars(select(JobRow).where(JobRow.status == "succeeded")):
        if job.deleted:
            continue
        assert job.fine_tuned_model and job.adapter_path
        yield ServedAdapter(
            job.fine_tuned_model,
            job.id,
            job.adapter_path,
            job.finished_at or now(),
            job.owner,
        )
    query = select(CheckpointRow, JobRow.owner).join(JobRow, JobRow.id == CheckpointRow.job_id)
    query = query.where(CheckpointRow.deleted.is_not(True))
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


def tell_once(session: Session, job_id: str, message: str, level: str = "info") -> None:
    """Add an event, unless it is there."""
    known = select(EventRow.number).where(EventRow.job_id == job_id, EventRow.message == message)
    if session.scalars(known).first() is None:
        tell(session, job_id, message, level=level)


def tell_rows(session: Session, job_id: str, kind: str, dataset: Dataset | PromptDataset) -> None:
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
