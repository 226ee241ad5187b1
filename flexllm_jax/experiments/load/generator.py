"""Many clients that stream one completion after the other from a server, for minutes.

Some go away amid a stream; one that is refused asks again after Retry-After. At first many files
are uploaded at once. Lengths and who leaves follow from seeds.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import httpx2
import numpy as np

from flexllm_jax.config.cli import message_console
from flexllm_jax.experiments.load.client import Completion, Outcome, complete, open_clients, upload
from flexllm_jax.experiments.load.server import Sample, ServerProcess

OUTCOMES: tuple[str, ...] = get_args(Outcome)
_SAMPLE_S, _LINE_S = 1.0, 5.0
_ROWS = b'{"prompt": "a", "completion": "b"}\n' * 100


@dataclass(frozen=True)
class LoadShape:
    """How much is asked of the server. leaving: the share of requests whose client goes away.
    slo: the requests' class of service."""

    clients: int = 500
    seconds: float = 120.0
    leaving: float = 0.05
    prompt_tokens: tuple[int, int] = (8, 96)
    output_tokens: tuple[int, int] = (8, 64)
    uploads: int = 1000
    slo: str = "standard"


@dataclass(frozen=True)
class Turn:
    """A part of the load, seconds of its clock, in which jobs train or are paused."""

    start: float
    stop: float
    jobs: bool

    def holds(self, start: float, stop: float) -> bool:
        """Whether what lasts from `start` to `stop` is all within it."""
        return self.start <= start and stop <= self.stop


@dataclass
class Load:
    """The clients, and what became of their requests; `turns` if jobs were paused in between."""

    url: str
    model: str
    shape: LoadShape
    began: float = field(default_factory=time.monotonic)
    requests: list[Completion] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    uploads_s: float = 0.0
    in_flight: int = 0
    turns: list[Turn] = field(default_factory=list)

    async def run(self) -> None:
        """All clients, until the time is over and their last requests have ended."""
        self.began = time.monotonic()
        async with open_clients(self.url) as http:
            clients = (self._client(http, seed) for seed in range(self.shape.clients))
            await asyncio.gather(self._upload_all(http), *clients)

    @property
    def files(self) -> list[str]:
        """Ids of the files that were uploaded."""
        return [told for told in self.uploads if told.startswith("file-")]

    async def _client(self, http: httpx2.AsyncClient, seed: int) -> None:
        random, shape = np.random.default_rng(seed), self.shape
        end = self.began + shape.seconds
        while time.monotonic() < end:
            length, wanted = (
                int(random.integers(low, high + 1))
                for low, high in (shape.prompt_tokens, shape.output_tokens)
            )
            body: dict[str, Any] = {
                "model": self.model,
                "prompt": random.integers(3, 200, length).tolist(),
                "max_tokens": wanted,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "slo": shape.slo,
            }
            leaves_after = int(random.integers(wanted)) if random.random() < shape.leaving else None
            while (pause_s := await self._ask(http, body, leaves_after)) is not None:
                if time.monotonic() + pause_s >= end:
                    break
                await asyncio.sleep(pause_s)

    async def _ask(
        self, http: httpx2.AsyncClient, body: dict[str, Any], leaves_after: int | None
    ) -> float | None:
        """Send a request; seconds to wait if it is refused."""
        self.in_flight += 1
        try:
            completion = await complete(http, body, leaves_after)
        finally:
            self.in_flight -= 1
        self.requests.append(completion)
        return completion.retry_after_s

    async def _upload_all(self, http: httpx2.AsyncClient) -> None:
        """All at once."""
        began, names = time.monotonic(), (f"{i}.jsonl" for i in range(self.shape.uploads))
        self.uploads = await asyncio.gather(*(upload(http, name, _ROWS) for name in names))
        self.uploads_s = time.monotonic() - began


async def run_and_watch(
    server: ServerProcess, load: Load, jobs: Sequence[str] = (), turn_s: float = 0.0
) -> list[Sample]:
    """Run the load; the samples meanwhile. Every second turn of `turn_s` the jobs are paused; 0:
    never."""
    samples: list[Sample] = []
    beside = [asyncio.create_task(_watch(server, load, samples))]
    if turn_s:
        beside.append(asyncio.create_task(_take_turns(server, load, jobs, turn_s)))
    await load.run()
    for task in beside:
        task.cancel()
    for ended in await asyncio.gather(*beside, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    return samples


async def _take_turns(
    server: ServerProcess, load: Load, jobs: Sequence[str], turn_s: float
) -> None:
    """Pause the jobs and let them go on, until cancelled."""
    train = True
    while True:
        start = time.monotonic() - load.began
        await asyncio.sleep(turn_s)
        load.turns.append(Turn(start, time.monotonic() - load.began, train))
        train = not train
        for job in jobs:
            await asyncio.to_thread(server.resume_job if train else server.pause_job, job)


async def _watch(server: ServerProcess, load: Load, samples: list[Sample]) -> None:
    """Sample the server and tell how it goes, until cancelled."""
    console, told = message_console(), 0.0
    while True:
        samples.append(now := await asyncio.to_thread(server.sample, load.began))
        if now.at - told >= _LINE_S:
            told = now.at
            counts = Counter(request.outcome for request in load.requests)
            console.print(
                f"{now.at:5.0f} s  {load.in_flight} in flight, {now.running:.0f} running  "
                + "  ".join(f"{counts[name]} {name}" for name in OUTCOMES)
                + f"  KV {now.kv_usage:.0%}  {now.finetune_tokens:.0f} tokens finetuned  "
                f"{now.http_rss / 2**20:.0f} + {now.engine_rss / 2**20:.0f} MiB  "
                f"{now.http_fds} + {now.engine_fds} fds",
                soft_wrap=True,
                highlight=False,
            )
        await asyncio.sleep(_SAMPLE_S)
