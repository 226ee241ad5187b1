"""The Tinker API's parts put together, from the server's start to its end."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from flexllm_jax.config import Config
from flexllm_jax.server.database import Database
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.registry import ModelRegistry
from flexllm_jax.server.http.access import Admission, ApiKeys
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.shares import Shares
from flexllm_jax.server.inference.requests import Inference
from flexllm_jax.server.tinker import sampling
from flexllm_jax.server.tinker.calls import Preparation
from flexllm_jax.server.tinker.journal import Journal
from flexllm_jax.server.tinker.protocol import schema
from flexllm_jax.server.tinker.runs import Surroundings
from flexllm_jax.server.tinker.samplers import Samplers
from flexllm_jax.server.tinker.sessions import Sessions
from flexllm_jax.server.tinker.store import Store
from flexllm_jax.server.tinker.tables import CheckpointRow, ModelRow, UsageRow
from flexllm_jax.server.tinker.training import Training

log = logging.getLogger(__name__)

_SWEEP_S = 5.0


class TinkerService:
    """What the routes share."""

    def __init__(
        self,
        config: Config,
        database: Database,
        engines: Engines,
        models: ModelRegistry,
        keys: ApiKeys,
        admission: Admission,
        inference: Inference,
    ):
        self.config, self.section = config, config.server.tinker
        self.engines, self.keys, self._inference = engines, keys, inference
        own = [models.base, config.server.model_name or models.base]
        self.base_names = list(dict.fromkeys([*self.section.model_names, *own]))
        self.journal = Journal(database)
        self.store = Store(config, self.journal, models, keys.several)
        self.sessions = Sessions(self.section, self.journal)
        waiting = Shares(self.section.max_waiting_bytes, keys.several)
        self.samplers = Samplers(
            self.section,
            self.base_names,
            self.sessions,
            self.journal,
            self.store,
            sampling.Sampler(engines, inference.codec.detokenizer),
            admission,
            waiting,
            keys.several,
            self._sampled,
        )
        self.body_limit = 4 * config.server.max_body_bytes  # of one that was compressed
        around = Surroundings(
            engines,
            self.journal,
            self.store,
            Preparation(self.store, self.journal, self.body_limit, self.samplers.may_add),
            self.section.snapshot_every,
            self._trained,
            lambda owner, size: waiting.add(owner, -size),
        )
        self.training = Training(self.section, self.sessions, around, waiting, keys.several)
        self.usage: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # unwritten
        self.totals: Counter[str] = Counter()  # tokens since the start, by use
        self.failures: Counter[str] = Counter()  # by category
        engines.on_ready.append(self.training.engine_ready)
        engines.on_lost.append(self.training.engine_lost)
        self._sweeper: asyncio.Task[None] | None = None

    # -- its life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Go on with what an earlier process left."""
        query = select(CheckpointRow)
        self.store.restore(await self.journal.read(lambda s: list(s.scalars(query))))
        await self.samplers.start()
        await self.training.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self, within_s: float) -> None:
        """Keep what models are, while the engines are still there."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        try:
            async with asyncio.timeout(within_s):
                await self.training.close()
                await self._write_usage()
        except TimeoutError:  # what is written down is enough to go on from
            log.warning("tinker: not all models were kept within %.0f s", within_s)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self.section.session_timeout_s / 4))
            try:
                self.sessions.sweep()
                await self.training.sweep()
                await self.samplers.sweep()
                for name in await self.store.sweep(self.section.sampler_idle_s):
                    await self._unload(name)
                await self._write_usage()
            except ApiError as error:
                log.warning("tinker: %s", error.message)
            except Exception:
                log.exception("tinker: a sweep failed")

    async def _unload(self, name: str) -> None:
        for member in self.engines.members:
            if member.state == "ready":
                member.training.samplers.discard(name)
                await member.call("unload_adapter", member.patience_s, name=name)

    # -- what requests must fit -------------------------------------------------------------------

    def ask(self, body: schema.Sample) -> sampling.Asked:
        """A sample request, checked; ValueError, or ApiError 503 without an engine."""
        room = self._inference.room
        info = self.engines.info
        if info is None:
            room([])
        assert info is not None
        asked = sampling.check(body, room, info.vocab_size)
        total = len(asked.prompt) + asked.params.max_tokens
        if total > info.max_model_len:
            raise ValueError(
                f"prompt of {len(asked.prompt)} tokens + max_tokens={asked.params.max_tokens} "
                f"exceeds the context of {info.max_model_len}: shorten the prompt or lower "
                f"max_tokens"
            )
        if -(-(total - 1) // info.page_size) > info.num_pages:
            raise ValueError(
                f"prompt of {len(asked.prompt)} tokens + max_tokens={asked.params.max_tokens} does "
                f"not fit in the {info.num_pages} KV pages of {info.page_size} tokens"
            )
        return asked

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its output, and of a datum."""
        info = self.engines.info
        if info is None:
            return None
        return min(info.max_model_len, self.config.finetune.max_tokens)

    def counts(self) -> dict[str, Any]:
        """How much of everything there is."""
        futures: Counter[tuple[str, str]] = Counter()
        for future in list(self.samplers.futures.values()):
            state = "waiting" if not future.done.is_set() else "failed" if future.failed else "done"
            futures["sample", state] += 1
        runs = list(self.training.runs.values())
        futures["training", "waiting"] = sum(len(run.pending) for run in runs)
        return {
            "sessions": len(self.sessions.active),
            "samplers": self.samplers.count(None),
            "models": Counter(run.state for run in runs),
            "futures": futures,
        }

    # -- what was used ----------------------------------------------------------------------------

    def _trained(self, row: ModelRow, kind: str, category: str | None, tokens: int) -> None:
        if category is not None:
            self.failures[category] += 1
        self._use(row.owner, row.base_model, training=tokens)

    def _sampled(self, owner: str | None, base: str, prompt: int, sampled: int) -> None:
        self._use(owner, base, prefill=prompt, sampled=sampled)

    def _use(self, owner: str | None, base: str, **tokens: int) -> None:
        self.usage[owner or "", base].update(tokens)
        self.totals.update(tokens)

    async def _write_usage(self) -> None:
        if not self.usage:
            return
        usage, self.usage = dict(self.usage), defaultdict(Counter)

        def write(session: Session) -> None:
            for (owner, model), tokens in usage.items():
                row = session.get(UsageRow, (owner, model[:200]))
                if row is None:
                    row = UsageRow(owner=owner, model=model[:200], training=0, prefill=0, sampled=0)
                    session.add(row)
                row.training += tokens["training"]
                row.prefill += tokens["prefill"]
                row.sampled += tokens["sampled"]

        await self.journal.until_written(write)

    async def read_usage(self) -> list[dict[str, Any]]:
        """Tokens by key and model, of all time."""
        await self._write_usage()
        rows = await self.journal.read(lambda s: list(s.scalars(select(UsageRow))))
        return [
            {
                "key": row.owner or None,
                "model": row.model,
                "training_tokens": row.training,
                "prefill_tokens": row.prefill,
                "sampled_tokens": row.sampled,
            }
            for row in rows
        ]
