"""Connections that are bounded, in number and in time: no client holds one by sending nothing.

uvicorn ends idle connections after a response, and nothing else. Here a head has a time and a size,
what is left of a body after its answer has a time, an answer is read at a least rate, and when
there are too many connections the one that has waited longest without a request makes room. A body
that comes slowly is answered with 408, by `body_limit`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import sys
import termios
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flexllm_jax.config import ServerSection
from flexllm_jax.server.http.errors import ApiError

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65536  # h11's limit; httptools has none
_MAX_PIPELINED = 16  # requests behind the one that is answered
_CHECK_S = 1.0  # between two looks at an answer that is not read


class LeastRate:
    """How far somebody is behind a rate, seconds: time that passes counts, data takes it back.
    Never less than 0: who was fast may not stop for longer than others."""

    def __init__(self, section: ServerSection):
        self._bytes_per_s, self.patience_s = section.least_bytes_per_s, section.stalled_after_s
        self.behind_s = 0.0

    @property
    def left_s(self) -> float:
        """Seconds that it may go on so."""
        return self.patience_s - self.behind_s

    def passed(self, seconds: float, moved: int) -> None:
        """So much data took so long."""
        self.behind_s = max(0.0, self.behind_s + seconds - moved / self._bytes_per_s)


class Waiting:
    """The connections of a server that have no request under way, the oldest first."""

    def __init__(self, section: ServerSection):
        self.section = section
        self.connections: dict[BoundedConnection, None] = {}


class BoundedConnection(HttpToolsProtocol):
    """A connection of a server with limits of `waiting.section`."""

    def __init__(self, *args: Any, waiting: Waiting, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._waiting, self._section = waiting, waiting.section
        self._deadline: asyncio.TimerHandle | None = None  # of a head, or of what is discarded
        self._watch: asyncio.TimerHandle | None = None  # of an answer that is not read
        self._in_message = False  # its head is read, its end is not
        self._unparsed = 0  # bytes that were neither a whole head nor part of a body

    # -- the connection ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """One more: another one may have to make room."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # whatever the system does not take is watched
        self._waiting.connections[self] = None
        self._expect_head()
        if len(self.connections) > self._section.max_connections:
            oldest = next(iter(self._waiting.connections))
            if oldest is self:
                self._refuse(ApiError(503, "too many connections: try again", retry_after_s=5))
            else:
                oldest.transport.abort()
                oldest.forget()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is no more."""
        super().connection_lost(exc)
        self.forget()

    def forget(self) -> None:
        """Nothing waits for this connection."""
        self._waiting.connections.pop(self, None)
        self.connections.discard(self)
        self._unset_keepalive_if_required()
        for timer in (self._deadline, self._watch):
            if timer is not None:
                timer.cancel()
        self._deadline = self._watch = None

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request (yet), and close; amid another's answer, only close."""
        if self._is_idle:
            response = error.response()
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
            lines += [name + b": " + value for name, value in response.raw_headers]
            lines += [b"connection: close", b"", bytes(response.body)]
            self.transport.write(b"\r\n".join(lines))
        self.transport.close()

    # -- what comes -------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, of a body, or of several of both."""
        if self.transport.is_closing():
            return
        if self._deadline is None and self._is_idle and not self._in_message:
            self._expect_head()
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    @property
    def _is_idle(self) -> bool:
        """Nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self._end_after(self._section.head_timeout_s, self._head_is_late)

    def _end_after(self, seconds: float, end: Any) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, end)

    def _head_is_late(self) -> None:
        seconds = self._section.head_timeout_s
        self._refuse(ApiError(408, f"no request came within {seconds:g} s: send it at once"))

    def _refuse_head(self) -> None:
        self._refuse(ApiError(431, f"the head is larger than {MAX_HEAD_BYTES} bytes"))

    def on_headers_complete(self) -> None:
        """A request begins."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._waiting.connections.pop(self, None)
        self._in_message, self._unparsed = True, 0
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse_head()
        elif len(self.pipeline) >= _MAX_PIPELINED:
            self.transport.abort()
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Part of a body, which counts elsewhere."""
        self._unparsed = 0
        if self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come."""
        self._in_message, self._unparsed = False, 0
        if self.cycle is None:
            return
        super().on_message_complete()
        if self.cycle.response_complete and self._deadline is not None:
            self._deadline.cancel()  # nothing is left to discard
            self._deadline = None

    def on_response_complete(self) -> None:
        """A request is answered, perhaps before its body has come."""
        super().on_response_complete()
        if self.transport.is_closing() or not self._is_idle:
            return
        self._waiting.connections[self] = None
        if self._in_message:
            self._end_after(self._section.stalled_after_s, self.transport.close)
        elif self._unparsed:
            self._expect_head()

    # -- what goes --------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The client has to read before more is written."""
        super().pause_writing()
        if self._watch is None:
            self._look(LeastRate(self._section), self._unread)

    def resume_writing(self) -> None:
        """The system has taken all."""
        super().resume_writing()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    @property
    def _unread(self) -> int:
        """Bytes on their way to the client: here, and in the system where that tells."""
        size = self.transport.get_write_buffer_size()
        socket = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            queued = fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, b"\0" * 4)
            size += int.from_bytes(queued, sys.byteorder)
        return size

    def _look(self, rate: LeastRate, unread: int) -> None:
        seconds = min(_CHECK_S, rate.patience_s / 4)

        def look() -> None:
            left = self._unread
            rate.passed(seconds, unread - left)
            if rate.left_s > 0:
                self._look(rate, left)
                return
            log.info("a client stopped reading its answer: the connection is closed")
            self.transport.abort()

        self._watch = self.loop.call_later(seconds, look)
