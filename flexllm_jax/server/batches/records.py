"""What the database says of batches. All functions run inside of a transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from flexllm_jax.server.database import BatchRow, now

ENDED = ("failed", "completed", "expired", "cancelled")
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def move(session: Session, batch_id: str, status: str, **fields: Any) -> BatchRow:
    """A batch has another status from now on."""
    row = session.scalars(select(BatchRow).where(BatchRow.id == batch_id)).one()
    row.status, row.times = status, {**row.times, f"{status}_at": now()}
    for name, value in fields.items():
        setattr(row, name, value)
    return row


def begin_cancel(session: Session, batch_id: str) -> BatchRow:
    """A batch is to be cancelled; one that has ended stays as it is."""
    row = session.scalars(select(BatchRow).where(BatchRow.id == batch_id)).one()
    if row.status in (*ENDED, "cancelling"):
        return row
    return move(session, batch_id, "cancelling")


def unfinished(session: Session) -> list[str]:
    """Batches to go on with, the oldest first."""
    query = select(BatchRow.id).where(BatchRow.status.not_in(ENDED)).order_by(BatchRow.number)
    return list(session.scalars(query))


def describe(row: BatchRow) -> dict[str, Any]:
    """A batch as OpenAI shows it."""
    ended = row.status in ENDED
    return {
        "id": row.id,
        "object": "batch",
        "endpoint": row.endpoint,
        "errors": {"object": "list", "data": row.errors} if row.errors else None,
        "input_file_id": row.input_file_id,
        "completion_window": row.completion_window,
        "status": row.status,
        "output_file_id": row.output_file_id if ended else None,
        "error_file_id": row.error_file_id if ended else None,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        **{f"{name}_at": row.times.get(f"{name}_at") for name in _TIMES},
        "request_counts": {"total": row.total, "completed": row.completed, "failed": row.failed},
        "metadata": row.labels,
    }
