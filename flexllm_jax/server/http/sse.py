"""Server-sent events, and answering only as long as somebody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")

_encoder = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED = 499  # nginx's status for a client that is gone; nobody reads it


def event(data: Any) -> bytes:
    """One event with JSON data."""
    return b"data: " + _encoder.encode(data) + b"\n\n"


def typed(data: dict[str, Any]) -> bytes:
    """One event that is named by the `type` of its data."""
    return b"event: " + data["type"].encode() + b"\n" + event(data)


def json_response(data: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(_encoder.encode(data), status, media_type="application/json")


class EventStream(Response):
    """A response of events. However it ends, also when the client goes before it begins, `events`
    is closed and `close` is called."""

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], Awaitable[None]] | None = None
    ):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["Content-Length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""

        async def produce() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _until_disconnected(receive, produce())
        finally:
            await self._events.aclose()
            if self._close:
                await self._close()


async def while_connected(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Run `answer` to its end, but cancel it when the client closes the connection."""
    response = await _until_disconnected(request.receive, answer)
    return Response(status_code=CLIENT_CLOSED) if response is None else response


async def _until_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` returns; None when the client went before that, which cancels it."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
