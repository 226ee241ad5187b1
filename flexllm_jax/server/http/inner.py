"""Requests that the server asks of itself, for a client whose key it has not got.

They go through the whole application, and are checked, limited and answered as any other.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

from flexllm_jax.server.http.access import OWN_CLIENT, Client


@dataclass(frozen=True)
class Reply:
    """What was answered."""

    status: int
    headers: dict[str, str]
    body: bytes


async def ask(app: ASGIApp, client: Client, path: str, body: bytes) -> Reply:
    """POST a JSON body. Cancelling it is what a client's going is."""
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("batch", 0),
        "server": ("batch", 0),
        OWN_CLIENT: client,
    }
    parts = [body]
    status, told, answer = 500, {}, b""

    async def receive() -> Message:
        if not parts:
            await asyncio.Event().wait()  # it stays until it is answered
        return {"type": "http.request", "body": parts.pop(), "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, told, answer
        if message["type"] == "http.response.start":
            status = message["status"]
            told = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            answer += message.get("body", b"")

    await app(scope, receive, send)
    return Reply(status, told, answer)
