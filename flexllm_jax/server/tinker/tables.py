"""What the Tinker API keeps in the server's database: it outlives both processes.

A training request is written, with its bytes, before its promise is answered, and stays until a
snapshot of its model holds what it did and its result was fetched. Folders of weights belong to the
rows that name them: one that no row names is removed.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import JSON, BigInteger, LargeBinary, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from flexllm_jax.server.database import Base


class SessionRow(Base):
    """A client. `ended`: why it ended, as it said; "silent": it said nothing for too long."""

    __tablename__ = "tinker_sessions"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str | None] = mapped_column(Text)  # name of the key; None: nobody's
    created_at: Mapped[float] = mapped_column(default=time.time)
    display_name: Mapped[str | None] = mapped_column(Text)
    user_metadata: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    ended: Mapped[str | None] = mapped_column(Text)


class ModelRow(Base):
    """A model being trained (a training run). It is the state in `snapshot_path`, or what it
    started as, and then the requests after `snapshot_seq`.

    `start_path`: folder of the state or adapter that it started from, with its optimizer's state if
    `start_optimizer`. `corrupted`: why it cannot go on.
    """

    __tablename__ = "tinker_models"
    id: Mapped[str] = mapped_column(String(100), primary_key=True)
    session_id: Mapped[str] = mapped_column(String(64), index=True)
    owner: Mapped[str | None] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(Text)
    rank: Mapped[int | None]  # None: that of what it starts from, until it is there
    seed: Mapped[int] = mapped_column(default=0)
    train_mlp: Mapped[bool] = mapped_column(default=True)
    train_attn: Mapped[bool] = mapped_column(default=True)
    train_unembed: Mapped[bool] = mapped_column(default=True)
    user_metadata: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(default=time.time)
    last_request_at: Mapped[float] = mapped_column(default=time.time)
    start_path: Mapped[str | None] = mapped_column(Text)
    start_optimizer: Mapped[bool] = mapped_column(default=False)
    snapshot_path: Mapped[str | None] = mapped_column(Text)
    snapshot_seq: Mapped[int] = mapped_column(default=0)
    corrupted: Mapped[str | None] = mapped_column(Text)


class RequestRow(Base):
    """A training request of a model; number 0 is the one that made it. `result`: what its future
    answers, of `content_type`; None: it is not done."""

    __tablename__ = "tinker_requests"
    model_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    seq_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(32))
    body: Mapped[bytes | None] = mapped_column(LargeBinary)  # None: a snapshot holds what it did
    created_at: Mapped[float] = mapped_column(default=time.time)
    result: Mapped[bytes | None] = mapped_column(LargeBinary)
    content_type: Mapped[str | None] = mapped_column(Text)
    failed: Mapped[bool] = mapped_column(default=False)
    done_at: Mapped[float | None]
    fetched_at: Mapped[float | None]


class SamplerRow(Base):
    """A sampling session: frozen weights to sample from. `engine_name` and `folder` are those of an
    adapter; both None: the base model. `model_path`: where a client said they are."""

    __tablename__ = "tinker_samplers"
    id: Mapped[str] = mapped_column(String(100), primary_key=True)
    session_id: Mapped[str] = mapped_column(String(64), index=True)
    owner: Mapped[str | None] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(Text)
    model_path: Mapped[str | None] = mapped_column(Text)
    engine_name: Mapped[str | None] = mapped_column(Text)
    folder: Mapped[str | None] = mapped_column(Text)
    ephemeral: Mapped[bool] = mapped_column(default=False)  # it has no name
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)  # of what only it has
    created_at: Mapped[float] = mapped_column(default=time.time)
    used_at: Mapped[float] = mapped_column(default=time.time)
    clones: Mapped[int] = mapped_column(default=0)


class CheckpointRow(Base):
    """Weights with a name. `kind`: weights, sampler_weights or external_weights, as in its path."""

    __tablename__ = "tinker_checkpoints"
    run_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    owner: Mapped[str | None] = mapped_column(Text)
    base_model: Mapped[str] = mapped_column(Text)
    rank: Mapped[int]
    train_mlp: Mapped[bool] = mapped_column(default=True)
    train_attn: Mapped[bool] = mapped_column(default=True)
    train_unembed: Mapped[bool] = mapped_column(default=True)
    engine_name: Mapped[str] = mapped_column(Text)
    folder: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[float] = mapped_column(default=time.time)
    expires_at: Mapped[float | None]
    public: Mapped[bool] = mapped_column(default=False)
    user_metadata: Mapped[dict[str, Any] | None] = mapped_column(JSON)

    @property
    def path(self) -> str:
        """What clients call it."""
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"


class UsageRow(Base):
    """Tokens that a key has used of a base model's."""

    __tablename__ = "tinker_usage"
    owner: Mapped[str] = mapped_column(String(100), primary_key=True)  # "": nobody's
    model: Mapped[str] = mapped_column(String(200), primary_key=True)
    training: Mapped[int] = mapped_column(BigInteger, default=0)
    prefill: Mapped[int] = mapped_column(BigInteger, default=0)
    sampled: Mapped[int] = mapped_column(BigInteger, default=0)
