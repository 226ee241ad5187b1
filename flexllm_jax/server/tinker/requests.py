"""Training requests as the database has them, and while they wait for their turn."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from flexllm_jax.server.tinker.protocol import wire
from flexllm_jax.server.tinker.tables import ModelRow, RequestRow

CREATE, CREATE_FROM = "create_model", "create_from"
FORWARD_BACKWARD, OPTIM_STEP, LOAD = "forward_backward", "optim_step", "load_weights"
# What reads names that others write: it waits for those before it.
NAMING = ("save_weights", "save_weights_external", "save_weights_for_sampler", LOAD)
_MOST_BYTES = 2**31  # of a body that was checked when it came


@dataclass
class Pending:
    """A request that is not done. `written`: it is in the database."""

    seq: int
    kind: str
    body: bytes
    written: asyncio.Future[None]
    done: asyncio.Event = field(default_factory=asyncio.Event)


def already_written() -> asyncio.Future[None]:
    """`Pending.written` of one that is in the database."""
    future = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def computes_again(kind: str, body: bytes) -> bool:
    """Whether a request that was done has changed the model."""
    if kind != FORWARD_BACKWARD:
        return kind in (OPTIM_STEP, LOAD)
    plain = wire.decompress(body, _MOST_BYTES) if body[:4] == wire.ZSTD_MAGIC else body
    return not wire.open_request(plain).forward_only


def write_result(
    session: Session, model_id: str, seq: int, result: bytes, content_type: str, failed: bool
) -> None:
    """A request is done."""
    session.execute(
        update(RequestRow)
        .where(RequestRow.model_id == model_id, RequestRow.seq_id == seq)
        .values(result=result, content_type=content_type, failed=failed, done_at=time.time())
    )


def write_snapshot(session: Session, model_id: str, folder: str, seq: int) -> None:
    """A folder holds what requests up to `seq` have done: their bytes are not needed any more."""
    values = {"snapshot_path": folder, "snapshot_seq": seq}
    session.execute(update(ModelRow).where(ModelRow.id == model_id).values(**values))
    held = update(RequestRow).where(RequestRow.model_id == model_id, RequestRow.seq_id <= seq)
    session.execute(held.values(body=None))


def load_model(
    session: Session, model_id: str
) -> tuple[ModelRow, dict[int, bool], list[RequestRow]] | None:
    """A model as the database has it: numbers that are done since its snapshot, and whether each is
    computed again; and the requests that are left."""
    row = session.get(ModelRow, model_id)
    if row is None:
        return None
    query = select(RequestRow).where(
        RequestRow.model_id == model_id,
        or_(RequestRow.seq_id > row.snapshot_seq, RequestRow.done_at.is_(None)),
    )
    done, left = dict[int, bool](), list[RequestRow]()
    for request in session.scalars(
        query.order_by(RequestRow.seq_id).execution_options(yield_per=8)
    ):
        if request.done_at is None:
            left.append(request)
            continue
        held = request.body is not None and not request.failed
        done[request.seq_id] = held and computes_again(request.kind, request.body or b"")
        session.expunge(request)  # its bytes are not held
    return row, done, left
