"""Does HTTP load slow the engine's steps? The same prompts, first all in one request, then from
many streaming clients at once.

Asks a server that runs already (scripts/serve.py) and reads its /metrics. Prints, for both, the
mean time of a step on the device; the CPU time that the engine's thread spends on one, and those
threads of its process that talk to the HTTP process; output tokens per second, and the clients'
times to first token. The two loads take turns `--repeat` times and the medians are shown, as other
work on the machine comes and goes.

The CPU times tell what HTTP costs the engine from what it costs the machine: on a host with few
cores, clients, the HTTP process and XLA's threads (with the model on the CPU) compete for them, and
steps take longer though the engine does no more. There, give way to it: `--nice` is for the
clients, and `renice 10 PID` of serve.py is for the HTTP process, whose engine keeps its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from rich import get_console
from rich.table import Table

from flexllm_jax.config.cli import run_script

_STEPS = "flexllm:step_seconds"
_TOKENS = "vllm:generation_tokens_total"
_CPU = "flexllm:engine_cpu_seconds_total"


@dataclass
class Load:
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


class Target:
    """The server."""

    def __init__(self, url: str, key: str):
        self._url, self._headers = url, {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str) -> str:
        """A body."""
        request = urllib.request.Request(self._url + path, headers=self._headers)
        with urllib.request.urlopen(request) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """A metric, summed over its labels."""
        lines = self.get("/metrics").splitlines()
        values = [line for line in lines if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in values)

    async def ask(self, body: dict) -> tuple[float | None, bool]:
        """Send a completion request; time to the first event, and whether it ended as it should."""
        address = urllib.parse.urlsplit(self._url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
        data = json.dumps(body).encode()
        head = {"Host": address.netloc, "Content-Length": len(data), "Connection": "close"}
        lines = [f"{name}: {value}" for name, value in (self._headers | head).items()]
        started, first, tail = time.monotonic(), None, b""
        writer.write("\r\n".join(["POST /v1/completions HTTP/1.1", *lines, "", ""]).encode() + data)
        status = await reader.readline()
        while piece := await reader.read(1 << 16):
            if first is None and b"data: " in piece:
                first = time.monotonic() - started
            tail = (tail + piece)[-64:]
        writer.close()
        whole = b"[DONE]" in tail if body["stream"] else b"total_tokens" in tail
        return first, b" 200 " in status and whole


async def measure(target: Target, name: str, bodies: list[dict]) -> Load:
    """Send all bodies at once."""
    threads = tuple(_CPU + f'{{engine="0",thread="{each}"}}' for each in ("step", "messages"))
    names = (_STEPS + "_count", _STEPS + "_sum", _TOKENS, *threads)
    before, started = [target.metric(each) for each in names], time.monotonic()
    results = await asyncio.gather(*(target.ask(body) for body in bodies))
    wall_s = time.monotonic() - started
    await asyncio.sleep(1)  # until the last steps are in the metrics
    after = [target.metric(each) for each in names]
    steps, step_s, tokens, *cpu_s = (a - b for a, b in zip(after, before, strict=True))
    each_s = [total / max(steps, 1) for total in (step_s, *cpu_s)]
    ttft = [first for first, _ in results if first is not None]
    failed = sum(not good for _, good in results)
    return Load(name, steps, each_s[0], tokens, wall_s, each_s[1], each_s[2], failed, ttft)


def main() -> int:
    """Run; returns the exit status, 1 if a request failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--nice", type=int, default=10, help="how far the clients give way")
    arguments = parser.parse_args()
    os.nice(arguments.nice)
    target = Target(arguments.url, arguments.key)
    model = json.loads(target.get("/v1/models"))["data"][0]["id"]
    random = np.random.default_rng(0)

    def body(prompts: int, stream: bool) -> dict:
        shape = (prompts, arguments.prompt_tokens)
        tokens = random.integers(3, 200, shape).tolist()
        limits = {"max_tokens": arguments.output_tokens, "ignore_eos": True, "temperature": 0}
        return {"model": model, "prompt": tokens, "stream": stream, **limits}

    count = arguments.clients
    whole, streams = [], []
    for _ in range(arguments.repeat):
        one, many = [body(count, False)], [body(1, True) for _ in range(count)]
        whole.append(asyncio.run(measure(target, "one request", one)))
        streams.append(asyncio.run(measure(target, f"{count} streams", many)))
    table = Table("", "steps", "ms", "engine ms", "message ms", "tokens/s")
    for title in ("TTFT p50/p99", "failed"):
        table.add_column(title)
    for loads in (whole, streams):
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
    get_console().print(table)
    get_console().print(
        "Of a step: ms on the device, and CPU ms of the engine's threads. TTFT: ms."
    )
    return int(any(load.failed for load in (*whole, *streams)))


if __name__ == "__main__":
    run_script(main)
