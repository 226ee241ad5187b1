"""The limits of a request's body: its key comes first, then its size, its pace, and the memory that
all bodies take together.

A body that is not an upload is held in memory until it is answered. Where there are several keys,
those of one never take more than what is left for the others.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexllm_jax.config import Config, ServerSection
from flexllm_jax.server.http.access import OWN_CLIENT, ApiKeys
from flexllm_jax.server.http.connections import LeastRate
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.shares import Shares

_UPLOADS = re.compile(r"/v1/(files|uploads/[^/]+/parts)")  # whose bodies go to disk
FORM_BYTES = 65536  # by which a form may be larger than the file in it

_DISCARDED_BYTES = 64 * 2**20  # of a body that is too large, so that its sender reads the answer


def body_limits(config: Config) -> Callable[[Scope], int]:
    """Largest body of a request, bytes."""
    section = config.server

    def limit_of(scope: Scope) -> int:
        uploads = _UPLOADS.fullmatch(scope["path"])
        return section.max_upload_bytes + FORM_BYTES if uploads else section.max_body_bytes

    return limit_of


class BodyLimit:
    """Refuses bodies without a key (401), beyond a limit (413) whether they say their length or
    not, that come too slowly (408), or when there are too many (429)."""

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, section: ServerSection, limit_of: Callable[[Scope], int]
    ):
        self.app, self.limit_of = app, limit_of
        self._keys, self._section = keys, section
        self._held = Shares(section.max_bodies_bytes, keys.several)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        stated = headers.get(b"content-length", b"0")
        if stated == b"0" and b"transfer-encoding" not in headers:  # there is no body
            await self.app(scope, receive, send)
            return
        limit, seen, held, ended = self.limit_of(scope), 0, 0, False
        paced = _paced(receive, LeastRate(self._section))
        too_large = f"the body is larger than {limit} bytes: send less at once"
        try:
            client = scope.get(OWN_CLIENT) or self._keys.client_of(Headers(scope=scope))
            if stated.isdigit() and int(stated) > limit:
                raise ApiError(413, too_large)
        except ApiError as error:
            with suppress(HTTPException):  # whoever is slow is not waited for
                await _discard(paced)
            await error.response()(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen, held, ended
            if ended:  # nothing more comes but the client's going
                return await receive()
            part = await paced()
            size, ended = len(part.get("body", b"")), not part.get("more_body")
            seen += size
            fits, in_memory = seen <= limit, not _UPLOADS.fullmatch(scope["path"])
            if fits and in_memory:
                fits = self._held.take(client, size)
                held += size if fits else 0
            if fits:
                return part
            if not ended:
                await _discard(paced)
            if seen > limit:
                raise HTTPException(413, too_large)
            message = "the server holds as many bytes of requests as it may: try again"
            raise HTTPException(429, message, {"Retry-After": "1"})

        try:
            await self.app(scope, counted, send)
        finally:
            self._held.give_back(client, held)


def _paced(receive: Receive, rate: LeastRate) -> Receive:
    """`receive` that ends with 408 when a body comes too slowly. What the server takes to handle it
    does not count."""

    async def paced() -> Message:
        began = time.monotonic()
        try:
            async with asyncio.timeout(rate.left_s):
                part = await receive()
        except TimeoutError:
            message = f"the body came too slowly: nothing, or little, for {rate.patience_s:g} s"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        rate.passed(time.monotonic() - began, len(part.get("body", b"")))
        return part

    return paced


async def _discard(receive: Receive) -> None:
    discarded = 0
    while discarded < _DISCARDED_BYTES:
        part = await receive()
        discarded += len(part.get("body", b""))
        if not part.get("more_body"):
            return
