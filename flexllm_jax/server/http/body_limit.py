"""The limit of a request's body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexllm_jax.config import Config
from flexllm_jax.server.http.errors import ApiError

_DISCARDED_BYTES = 64 * 2**20  # of a body that is too large, so that its sender reads the answer


def body_limits(config: Config) -> Callable[[Scope], int]:
    """Largest body of a request, bytes."""
    section = config.server

    def limit_of(scope: Scope) -> int:
        is_upload = scope["path"] == "/v1/files"
        # A form is a little larger than the file in it.
        return section.max_upload_bytes + 65536 if is_upload else section.max_body_bytes

    return limit_of


class BodyLimit:
    """Refuses bodies beyond a limit, whether they say their length or not."""

    def __init__(self, app: ASGIApp, limit_of: Callable[[Scope], int]):
        self.app, self.limit_of = app, limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, seen = self.limit_of(scope), 0
        message = f"the body is larger than {limit} bytes: send less at once"
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > limit:
            await _discard(receive)
            await ApiError(413, message).response()(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > limit:
                await _discard(receive)
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)


async def _discard(receive: Callable[[], Awaitable[Any]]) -> None:
    discarded = 0
    while discarded < _DISCARDED_BYTES:
        part = await receive()
        discarded += len(part.get("body", b""))
        if not part.get("more_body"):
            return
