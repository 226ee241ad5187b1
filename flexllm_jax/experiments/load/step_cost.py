"""What HTTP costs the engine's steps: the same prompts in one request, and from many streams.

For both: the mean time of a step on the device; the CPU time that the engine's thread spends on
one, and those threads of its process that talk to the HTTP process; output tokens per second, and
the clients' times to first token. The two loads take turns, as other work on the machine comes and
goes, and medians are shown.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx2
import numpy as np
from rich.table import Table

from flexllm_jax.experiments.load.client import (
    complete,
    first_model,
    metric,
    open_client,
    open_clients,
    read_metrics,
)

_STEPS = "flexllm:step_seconds"
_TOKENS = "vllm:generation_tokens_total"
_CPU = "flexllm:engine_cpu_seconds_total"


@dataclass
class LoadCost:
    """What a load brought."""

    name: str
    steps: float
    step_s: float  # of one, and so are the CPU times
    tokens: float
    wall_s: float
    step_cpu_s: float
    message_cpu_s: float
    failed: int = 0
    ttft_s: list[float] = field(default_factory=list)


def compare(
    url: str, key: str, clients: int, prompt_tokens: int, output_tokens: int, repeat: int
) -> tuple[list[LoadCost], list[LoadCost]]:
    """Each load as often as `repeat` says: in one request, from so many streams."""
    random = np.random.default_rng(0)
    with open_client(url, key) as client:
        model = first_model(client)

        def body(prompts: int, *, stream: bool) -> dict[str, Any]:
            made: dict[str, Any] = {
                "model": model,
                "prompt": random.integers(3, 200, (prompts, prompt_tokens)).tolist(),
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": stream,
            }
            return made | ({"stream_options": {"include_usage": True}} if stream else {})

        whole, streams = [], []
        for _ in range(repeat):
            one = [body(clients, stream=False)]
            many = [body(1, stream=True) for _ in range(clients)]
            whole.append(asyncio.run(_measure(client, key, "one request", one)))
            streams.append(asyncio.run(_measure(client, key, f"{clients} streams", many)))
    return whole, streams


async def _measure(
    client: httpx2.Client, key: str, name: str, bodies: list[dict[str, Any]]
) -> LoadCost:
    """Send all bodies at once."""
    threads = tuple(_CPU + f'{{engine="0",thread="{each}"}}' for each in ("step", "messages"))
    names = (_STEPS + "_count", _STEPS + "_sum", _TOKENS, *threads)
    before, started = read_metrics(client), time.monotonic()
    async with open_clients(str(client.base_url), key) as http:
        answers = await asyncio.gather(*(complete(http, body) for body in bodies))
    wall_s = time.monotonic() - started
    await asyncio.sleep(1)  # until the last steps are in the metrics
    after = read_metrics(client)
    steps, step_s, tokens, *cpu_s = (metric(after, n) - metric(before, n) for n in names)
    each_s = [total / max(steps, 1) for total in (step_s, *cpu_s)]
    ttft = [answer.ttft_s for answer in answers if answer.ttft_s is not None]
    failed = sum(answer.outcome != "finished" for answer in answers)
    return LoadCost(name, steps, each_s[0], tokens, wall_s, each_s[1], each_s[2], failed, ttft)


def cost_table(*kinds: list[LoadCost]) -> Table:
    """A line for each kind of load, with the medians over its turns."""
    table = Table("", "steps", "ms", "engine ms", "message ms", "tokens/s")
    for title in ("TTFT p50/p99", "failed"):
        table.add_column(title)
    for loads in kinds:
        ttft_s = [first for load in loads for first in load.ttft_s]
        ttft = np.percentile(ttft_s, [50, 99]) * 1e3 if ttft_s else None
        table.add_row(
            loads[0].name,
            f"{median(load.steps for load in loads):.0f}",
            f"{median(load.step_s for load in loads) * 1e3:.2f}",
            f"{median(load.step_cpu_s for load in loads) * 1e3:.2f}",
            f"{median(load.message_cpu_s for load in loads) * 1e3:.2f}",
            f"{median(load.tokens / load.wall_s for load in loads):.0f}",
            "" if ttft is None else f"{ttft[0]:.0f} / {ttft[1]:.0f}",
            str(sum(load.failed for load in loads)),
        )
    return table
