"""What a server is given to do in a round: a file, jobs of known configurations, and requests.

A client of a server that fails asks again, as real ones do: after an error that says so, or none at
all, it looks whether what it asked for has been done, and asks again if not.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections import Counter
from typing import Any

import httpx2
import numpy as np

from flexllm_jax.errors import UserError
from flexllm_jax.experiments.faults.server import FaultyServer
from flexllm_jax.experiments.load.client import Completion, complete, open_clients

LORA = {"batch_tokens": 256, "learning_rate": 3e-3}
# Jobs that are made with and without faults. Of the same name they are to end the same.
JOBS: dict[str, dict[str, Any]] = {
    "wide": {**LORA, "lora_rank": 8, "max_steps": 30, "seed": 1},
    "narrow": {**LORA, "lora_rank": 2, "max_steps": 22, "seed": 2, "batch_tokens": 400},
}
ENDED = ("succeeded", "failed", "cancelled")
_ASKED_S = 120.0  # that a client goes on asking


class Api:
    """A client that does not give up."""

    def __init__(self, server: FaultyServer):
        self._server = server
        self.refusals: Counter[str] = Counter()  # by what was answered instead

    def ask(self, method: str, path: str, **body: Any) -> httpx2.Response:
        """Ask until there is an answer that is not of a server in trouble."""
        end = time.monotonic() + _ASKED_S
        while True:
            answer = self.try_once(method, path, **body)
            if answer is not None:
                return answer
            if time.monotonic() > end:
                raise UserError(f"{method} {path}: no answer in {_ASKED_S:g} s")
            time.sleep(0.1)

    def try_once(self, method: str, path: str, **body: Any) -> httpx2.Response | None:
        """The answer; None of a server that is away, or in trouble."""
        try:
            answer = self._server.client.request(method, path, **body)
        except httpx2.HTTPError as error:
            self.refusals[type(error).__name__] += 1
            return None
        if answer.status_code >= 500 or answer.status_code == 429:
            self.refusals[str(answer.status_code)] += 1
            return None
        return answer

    def get(self, path: str) -> Any:
        """The JSON of what is there."""
        return self.ask("GET", path).raise_for_status().json()

    def all_of(self, path: str) -> list[dict[str, Any]]:
        """A whole list, page by page, as the API orders it."""
        items: list[dict[str, Any]] = []
        while True:
            after = f"&after={items[-1]['id']}" if items else ""
            page = self.get(f"{path}?limit=100{after}")
            items += page["data"]
            if not page.get("has_more"):
                return items

    def upload(self, name: str, content: bytes, slow_s: float = 0.0) -> str:
        """Upload a file, in a body whose bytes come after `slow_s`; its id. One that was kept
        though its client was not told so stays."""
        while True:
            body = _SlowFile(content, slow_s)
            form = {"purpose": "fine-tune"}
            answer = self.try_once("POST", "/v1/files", data=form, files={"file": (name, body)})
            if answer is not None:
                return answer.raise_for_status().json()["id"]
            time.sleep(0.2)

    def create(self, kind: str, name: str, file: str, model: str) -> str:
        """Create a job of a known configuration under a name of its own; its id."""
        body = {"model": model, "training_file": file, "metadata": {"name": name}, **JOBS[kind]}
        while True:
            answer = self.try_once("POST", "/v1/fine_tuning/jobs", json=body)
            if answer is not None:
                return answer.raise_for_status().json()["id"]
            time.sleep(0.2)
            known = [job for job in self.jobs() if (job["metadata"] or {}).get("name") == name]
            if known:
                return known[0]["id"]

    def jobs(self) -> list[dict[str, Any]]:
        """All that there are."""
        return self.all_of("/v1/fine_tuning/jobs")

    def job(self, job: str) -> dict[str, Any]:
        """One of them."""
        return self.get(f"/v1/fine_tuning/jobs/{job}")

    def wait_ended(self, jobs: list[str], timeout_s: float) -> list[str]:
        """Wait for the ends of jobs; those that have not come in time."""
        end = time.monotonic() + timeout_s
        left = list(jobs)
        while left and time.monotonic() < end:
            left = [job for job in left if self.job(job)["status"] not in ENDED]
            time.sleep(0.2)
        return left


class _SlowFile(io.BytesIO):
    """A file whose bytes are not there at once."""

    def __init__(self, content: bytes, slow_s: float):
        super().__init__(content)
        self._slow_s = slow_s

    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(self._slow_s)
        self._slow_s = 0.0
        return super().read(size)


class Streams:
    """Clients that stream completions one after the other, whatever happens, in a thread."""

    def __init__(self, url: str, model: str, clients: int, seed: int):
        self.requests: list[Completion] = []
        self._stop = threading.Event()
        self._arguments = url, model, clients, seed
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    async def _run(self) -> None:
        url, model, clients, seed = self._arguments
        async with open_clients(url) as http:
            await asyncio.gather(
                *(
                    self._client(http, model, np.random.default_rng([seed, i]))
                    for i in range(clients)
                )
            )

    async def _client(
        self, http: httpx2.AsyncClient, model: str, random: np.random.Generator
    ) -> None:
        while not self._stop.is_set():
            body = {
                "model": model,
                "prompt": random.integers(3, 200, int(random.integers(4, 60))).tolist(),
                "max_tokens": int(random.integers(4, 40)),
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            completion = await complete(http, body)
            self.requests.append(completion)
            if completion.outcome != "finished":
                await asyncio.sleep(0.3)

    def finished(self) -> int:
        """Requests that came to their end, so far."""
        return sum(request.outcome == "finished" for request in self.requests)

    def stop(self, timeout_s: float) -> bool:
        """Let the last requests end; False: one hangs."""
        self._stop.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def rows(text: str, count: int) -> bytes:
    """The first rows of a dataset."""
    return "".join(line + "\n" for line in text.splitlines()[:count]).encode()
