"""Forms with a file: they stream to disk, and have room for every byte before it is written."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser

from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.body_limit import FORM_BYTES
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.shares import Shares


class _Form(MultiPartParser):
    """What is in memory of a form: a start of its file, and few, short fields."""

    spool_max_size = 1 << 16


@asynccontextmanager
async def form_with_file(
    request: Request, client: Client, storage: Shares
) -> AsyncIterator[tuple[FormData, Callable[[int], None]]]:
    """The form of a request, and a function to call with the bytes of it that stay in `storage`: at
    the end the others are given back. ApiError 400, or 413 when there is no room."""
    room = storage.room(client, client.storage_bytes)
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > room + FORM_BYTES:
        raise _full(storage, client)
    reserved, kept = 0, 0

    async def reserving() -> AsyncGenerator[bytes]:
        nonlocal reserved
        async for piece in request.stream():
            if not storage.take(client, len(piece), client.storage_bytes):
                raise _full(storage, client)
            reserved += len(piece)
            yield piece

    def keep(size: int) -> None:
        nonlocal kept
        kept = size

    try:
        try:
            parser = _Form(
                request.headers, reserving(), max_files=1, max_fields=8, max_part_size=1 << 16
            )
            form = await parser.parse()
        except (MultiPartException, KeyError) as error:
            reason = getattr(error, "message", "no boundary")
            raise ApiError(400, f"the body is not a multipart form: {reason}") from None
        try:
            yield form, keep
        finally:
            await form.close()
    finally:
        storage.give_back(client, reserved - kept)


def _full(storage: Shares, client: Client) -> ApiError:
    """There is no room for an upload."""
    room = storage.room(client, client.storage_bytes)
    message = f"the file is larger than the {room} bytes left for it: send a smaller one, or "
    return ApiError(413, f"{message}delete files", param="file")
