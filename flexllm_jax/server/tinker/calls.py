"""A training request from its bytes to the engine's call, and from the engine's result to what the
future answers. What is wrong with a request is a ValueError, and the failure of its future."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
from pydantic import ValidationError
from sqlalchemy.orm import Session

from flexllm_jax.server.engines.training_messages import (
    ForwardBackward,
    LoadState,
    Logprobs,
    OptimStep,
    SaveAdapter,
    Saved,
    SaveState,
    Stepped,
    Tensor,
    TrainingCall,
    TrainingDatum,
)
from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.tinker.journal import Journal
from flexllm_jax.server.tinker.protocol import paths, schema, wire
from flexllm_jax.server.tinker.protocol.paths import TinkerPath
from flexllm_jax.server.tinker.store import Store
from flexllm_jax.server.tinker.tables import CheckpointRow, ModelRow, SamplerRow

JSON = "application/json"
OTHER_LOSSES = "cross_entropy, importance_sampling, ppo, cispo, dro, gspo"
_UNPUBLISHED = {
    "stable_reinforce": "its formula is not published",
    "custom": "losses of clients run in the client",
}
_REQUESTS = {
    paths.STATE: "save_weights",
    paths.SAMPLER: "save_weights_for_sampler",
    paths.EXTERNAL: "save_weights_external",
}
B = TypeVar("B", bound=Body)


def _nothing(session: Session, size_bytes: int) -> None:
    pass


@dataclass
class Answer:
    """What the future of a request answers when its call is done. `write` is part of the
    transaction that says so, given the bytes that were saved."""

    result: bytes
    content_type: str = JSON
    write: Callable[[Session, int], None] = _nothing
    after: Callable[[], None] = lambda: None
    tokens: int = 0


@dataclass
class Prepared:
    """A call, and what its result means. `folder` is being written."""

    call: TrainingCall
    answer: Callable[[Any], Answer]
    folder: str | None = None
    kind: str = field(default="")


def parse(model: type[B], body: bytes) -> B:
    """A JSON body; ValueError in one line that names the field."""
    try:
        return model.model_validate(msgspec.json.decode(body))
    except msgspec.DecodeError as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        given = repr(first.get("input"))
        given = given if len(given) <= 80 else given[:77] + "..."
        reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise ValueError(f"{where}: got {given}; {reason}") from None


def failure(message: str, category: str) -> bytes:
    """What a future that failed answers."""
    return msgspec.json.encode({"error": message, "category": category})


class Preparation:
    """Turns requests of models into calls of the engine. `result_of` writes the sampler that a save
    makes."""

    def __init__(self, store: Store, journal: Journal, body_limit: int, may_sample: Callable):
        self._store, self._journal, self._limit = store, journal, body_limit
        self._may_sample = may_sample

    async def prepare(self, kind: str, row: ModelRow, body: bytes) -> Prepared:
        """The call of a request; ValueError: it makes no sense, or cannot be done."""
        prepared = await getattr(self, f"_{kind}")(row, body)
        prepared.kind = kind
        return prepared

    async def _forward_backward(self, row: ModelRow, body: bytes) -> Prepared:
        if body[:4] == wire.ZSTD_MAGIC:
            body = wire.decompress(body, self._limit)
        call = wire.read_data(wire.open_request(body))
        if reason := _UNPUBLISHED.get(call.loss_fn):
            raise ValueError(
                f"loss_fn: {call.loss_fn} is not here, as {reason}; use one of {OTHER_LOSSES} "
                f"(recipes: give loss_fn=importance_sampling on the command line)"
            )

        def answer(result: Logprobs) -> Answer:
            logprobs = [np.frombuffer(t.data, t.dtype).reshape(t.shape) for t in result.logprobs]
            output = wire.loss_output({"logprobs": logprobs}, result.metrics)
            return Answer(output, wire.PROTOBUF, tokens=result.tokens)

        data = [
            TrainingDatum(
                datum.tokens.astype("<i4").tobytes(),
                {
                    name: Tensor(array.tobytes(), array.dtype.name, list(array.shape))  # type: ignore[arg-type]
                    for name, array in datum.inputs.items()
                },
            )
            for datum in call.data
        ]
        return Prepared(
            ForwardBackward(data, call.loss_fn, dict(call.config), call.forward_only), answer
        )

    async def _optim_step(self, row: ModelRow, body: bytes) -> Prepared:
        step = parse(schema.OptimStep, body)
        if step.optimizer_params is not None:
            raise ValueError(
                f"optimizer_params: got type {step.optimizer_params.get('type')!r}; the optimizer "
                f"here is adamw: send adam_params"
            )

        def answer(result: Stepped) -> Answer:
            return Answer(msgspec.json.encode({"metrics": result.metrics, "type": "optim_step"}))

        return Prepared(OptimStep(**step.adam_params.model_dump()), answer)

    async def _save_weights(self, row: ModelRow, body: bytes) -> Prepared:
        return await self._named(row, parse(schema.SaveWeights, body), paths.STATE)

    async def _save_weights_external(self, row: ModelRow, body: bytes) -> Prepared:
        save = parse(schema.SaveWeights, body)
        if save.age_encryption_recipients:
            raise ValueError("age_encryption_recipients: files are not encrypted; leave it out")
        return await self._named(row, save, paths.EXTERNAL)

    async def _save_weights_for_sampler(self, row: ModelRow, body: bytes) -> Prepared:
        save = parse(schema.SaveForSampler, body)
        if save.path is not None:
            return await self._named(row, save, paths.SAMPLER)
        if save.sampling_session_seq_id is None:
            raise ValueError("path: give a name, or sampling_session_seq_id for a sampler")
        await self._check_room(row)
        try:
            self._may_sample(row.owner)
        except ApiError as error:
            raise ValueError(error.message) from None
        sampler_id = f"{row.session_id}:sample:{save.sampling_session_seq_id}"
        folder = self._store.new_folder()

        def write(session: Session, size_bytes: int) -> None:
            session.merge(
                SamplerRow(
                    id=sampler_id,
                    session_id=row.session_id,
                    owner=row.owner,
                    base_model=row.base_model,
                    engine_name=folder,
                    folder=folder,
                    ephemeral=True,
                    size_bytes=size_bytes,
                )
            )

        told = {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}
        answer = Answer(msgspec.json.encode(told), write=write)
        return Prepared(SaveAdapter(folder, folder), lambda _: answer, folder)

    async def _named(self, row: ModelRow, save: schema.SaveWeights, kind: str) -> Prepared:
        path = TinkerPath(row.id, kind, paths.check_name(save.path))
        expires = None
        if save.ttl_seconds is not None:
            expires = time.time() + check_ttl(save.ttl_seconds)
        await self._check_room(row)
        there = await self._journal.read(lambda s: s.get(CheckpointRow, tuple(path)))
        if there is not None and not save.overwrite:
            raise ValueError(f"path: {str(path)!r} is there already; set overwrite, or delete it")
        folder = self._store.new_folder()
        checkpoint = CheckpointRow(
            **path._asdict(),
            owner=row.owner,
            base_model=row.base_model,
            rank=row.rank,
            train_mlp=row.train_mlp,
            train_attn=row.train_attn,
            train_unembed=row.train_unembed,
            engine_name=folder,
            folder=folder,
            created_at=time.time(),
            expires_at=expires,
            public=False,
            user_metadata=save.user_metadata,
        )

        def write(session: Session, size_bytes: int) -> None:
            checkpoint.size_bytes = size_bytes
            session.merge(checkpoint)

        def after() -> None:
            if kind != paths.EXTERNAL:
                self._store.serve(checkpoint)

        told = {"path": str(path), "type": _REQUESTS[kind]}
        answer = Answer(msgspec.json.encode(told), write=write, after=after)
        if kind == paths.STATE:
            return Prepared(SaveState(folder), lambda _: answer, folder)
        name = folder if kind == paths.SAMPLER else None
        return Prepared(SaveAdapter(folder, name), lambda _: answer, folder)

    async def _check_room(self, row: ModelRow) -> None:
        await self._journal.read(lambda s: self._store.check_room(s, row.owner))

    async def _load_weights(self, row: ModelRow, body: bytes) -> Prepared:
        load = parse(schema.LoadWeights, body)
        path = paths.parse(load.path)
        if path.run_id == paths.SERVED:
            raise ValueError("path: an adapter starts a new model; this one is there already")
        found = await self._journal.read(lambda s: self._store.find_now(s, path, row.owner))
        if load.optimizer and path.kind != paths.STATE:
            raise ValueError(f"optimizer: {load.path!r} has no state of an optimizer; load weights")
        told = {"path": load.path, "model_id": row.id, "type": "load_weights"}
        answer = Answer(msgspec.json.encode(told))
        return Prepared(LoadState(found.folder, load.optimizer), lambda _: answer)


def check_ttl(seconds: int) -> int:
    """Seconds that a checkpoint may live; ValueError."""
    if not schema.SECONDS_LEAST <= seconds <= schema.SECONDS_MOST:
        raise ValueError(
            f"ttl_seconds: got {seconds}; must be between {schema.SECONDS_LEAST} (an hour) and "
            f"{schema.SECONDS_MOST} (ten years)"
        )
    return seconds


def saved_bytes(result: Any) -> int:
    """Bytes that a call has written."""
    return result.size_bytes if isinstance(result, Saved) else 0
