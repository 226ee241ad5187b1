"""The HTTP client of everything that loads a server: completions as their clients see them.

Every request has a connection of its own, as those of many users have. A stream's events are told
apart by their text and not parsed, but for the last: a client's own work would be mistaken for the
server's. Proxies of the environment are not used.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Literal

import httpx2

LONGEST_S = 300.0  # that a client waits for the next event; then its request is lost

Outcome = Literal["finished", "left", "refused", "failed", "lost"]


@dataclass
class Completion:
    """A completion request as its client saw it.

    outcome: `finished` with all its tokens; `left` by the client amid the stream; `refused`, to be
    sent again after `retry_after_s`; `failed` with an error or another number of tokens; `lost`
    without an answer. sent: seconds on the monotonic clock. tpot_s: the mean.
    """

    sent: float
    outcome: Outcome = "lost"
    why: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    tokens: int = 0
    retry_after_s: float | None = None


def open_client(url: str, key: str = "") -> httpx2.Client:
    """A client that asks one thing at a time; `key` is an API key."""
    return httpx2.Client(
        base_url=url, headers=_headers(key), timeout=LONGEST_S, limits=_limits(), trust_env=False
    )


def open_clients(url: str, key: str = "") -> httpx2.AsyncClient:
    """A client that asks as many things at a time as one likes."""
    return httpx2.AsyncClient(
        base_url=url, headers=_headers(key), timeout=LONGEST_S, limits=_limits(), trust_env=False
    )


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _limits() -> httpx2.Limits:
    return httpx2.Limits(max_connections=None, max_keepalive_connections=0)


def first_model(client: httpx2.Client) -> str:
    """The name of the model that the server serves."""
    return client.get("/v1/models").raise_for_status().json()["data"][0]["id"]


def read_metrics(client: httpx2.Client) -> list[tuple[str, float]]:
    """Name with labels, and value, of every line of the server's metrics."""
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return [(name, float(value)) for name, value in pairs]


def metric(metrics: list[tuple[str, float]], name: str) -> float:
    """A metric with its labels, or without them summed over all of them."""
    return sum(value for key, value in metrics if key == name or key.startswith(name + "{"))


async def complete(
    client: httpx2.AsyncClient, body: dict[str, Any], leaves_after: int | None = None
) -> Completion:
    """Send a completion request for exactly `max_tokens` tokens of each prompt; never raises an
    HTTP error.

    A body with `stream` has one prompt and asks for the usage too; one without has a list of
    prompts. `leaves_after`: tokens after which the client goes away amid the stream.
    """
    completion = Completion(time.monotonic())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 200 and body.get("stream"):
                await _read_stream(response, completion, body["max_tokens"], leaves_after)
            elif response.status_code == 200:
                usage = json.loads(await response.aread())["usage"]
                completion.tokens = usage["completion_tokens"]
                _judge(completion, usage, body["max_tokens"] * len(body["prompt"]))
            elif "retry-after" in response.headers:
                completion.outcome = "refused"
                completion.retry_after_s = float(response.headers["retry-after"])
            else:
                answer = (await response.aread()).decode()[:2000]
                completion.outcome = "failed"
                completion.why = f"{response.status_code}: {answer}"
    except httpx2.HTTPError as error:
        completion.why = f"{type(error).__name__}: {error}"
    return completion


async def _read_stream(
    response: httpx2.Response, completion: Completion, wanted: int, leaves_after: int | None
) -> None:
    first = last = None
    event = "data: {}"
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line.startswith("data: [DONE]"):
            break
        if line.startswith('data: {"error"'):
            completion.outcome, completion.why = "failed", line
            return
        event, now = line, time.monotonic()
        if '"choices":[]' in event:
            continue
        completion.tokens += 1
        first, last = first or now, now
        if leaves_after is not None and completion.tokens > leaves_after:
            completion.outcome = "left"
            return
    else:
        completion.why = "the connection was closed amid an answer"
        return
    if first is not None and last is not None:
        completion.ttft_s = first - completion.sent
        if completion.tokens > 1:
            completion.tpot_s = (last - first) / (completion.tokens - 1)
    _judge(completion, json.loads(event.removeprefix("data: ")).get("usage") or {}, wanted)


def _judge(completion: Completion, usage: dict[str, Any], wanted: int) -> None:
    """Finished, if as many tokens came as were counted and as were asked for."""
    counted = usage.get("completion_tokens")
    if counted == completion.tokens == wanted:
        completion.outcome = "finished"
    else:
        completion.outcome = "failed"
        completion.why = f"{completion.tokens} tokens and a count of {counted}, not {wanted}"


async def upload(client: httpx2.AsyncClient, name: str, content: bytes) -> str:
    """Upload a file of finetuning rows; its id, or else what went wrong."""
    try:
        response = await client.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, content)}
        )
    except httpx2.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    if response.status_code != 200:
        return f"{response.status_code}: {response.text}"
    return response.json()["id"]
