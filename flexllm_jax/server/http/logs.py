"""Logs as lines of JSON: time, level, logger, message, and fields of their own.

Every request to the application is one line when it has been answered, with an id that the client
gets too, or gave (X-Request-Id).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from datetime import UTC, datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

_QUIET = ("/health", "/ping", "/load", "/metrics")  # asked all the time by machines
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "taskName", "asctime"}


class JsonFormatter(logging.Formatter):
    """A record as a line of JSON; what was given as `extra` becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {k: v for k, v in record.__dict__.items() if k not in _STANDARD}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def use_json() -> None:
    """Write all logs of this process as JSON to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.ERROR, force=True)


def _given_id(scope: Scope) -> str | None:
    """The id that the client gave its request, if it is one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return value.decode()
    return None


class AccessLog:
    """One line for every request."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, sent = time.monotonic(), 0, 0
        request_id = _given_id(scope) or uuid.uuid4().hex
        state = scope.setdefault("state", {})

        async def counted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status or 499,  # no answer: the client went
                "seconds": round(time.monotonic() - started, 4),
                "bytes_sent": sent,
                "client": state.get("client_name"),
                **state.get("log", {}),
            }
            level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
            log.log(level, "request", extra=fields)
