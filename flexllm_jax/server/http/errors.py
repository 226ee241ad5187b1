"""Errors as the OpenAI interfaces tell them, `{"error": {message, type, param, code}}`, and beside
it the `"type": "error"` of Anthropic's."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    507: "insufficient_storage_error",
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")


class ApiError(Exception):
    """An error to answer with. `param` names the field; `retry_after_s` becomes a header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        message = message.encode("utf-8", "backslashreplace").decode()  # what JSON can hold
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = _TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, "type": "error"}

    def response(self) -> Response:
        """The whole answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = msgspec.json.encode(self.body)
        return Response(body, self.status, headers, media_type="application/json")


def _methods(app: FastAPI, request: Request) -> list[str]:
    """Methods that the path of a request is for."""

    def is_for(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in app.routes)

    return [method for method in _METHODS if is_for(method)]


def _is_of_a_type(error: Mapping[str, Any], body: Any) -> bool:
    """Whether it is one of those of a field that may be of several types, which is reported once
    for each: then its place ends in a type, and not in a part of the body."""
    value, place = body, error["loc"][1:-1]
    for part in place:
        try:
            value = value[part]
        except (LookupError, TypeError):
            return False
    return bool(place) and error["type"] != "missing" and value is error["input"]


def _reason(error: Mapping[str, Any], depth: int) -> str:
    """What is wrong, and where in a value whose own place has that many parts."""
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    within = ".".join(map(str, error["loc"][depth:]))
    return f"{within} {message}" if within else message


def install(app: FastAPI) -> None:
    """Make every error of `app` one of these."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        errors = error.errors()
        first = errors[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", "")
            return ApiError(400, f"the body is not JSON: {reason}").response()
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        name = where[0] if where else None
        if isinstance(first.get("input"), bytes):
            message = "the body is taken for no JSON: send Content-Type: application/json"
            return ApiError(400, message).response()
        given = repr(first.get("input"))
        given = given if len(given) <= 80 else given[:77] + "..."
        if _is_of_a_type(first, error.body):
            where = where[:-1]
            depth = len(first["loc"])
            of_types = [e for e in errors if e["loc"][: depth - 1] == first["loc"][:-1]]
            message = ", or ".join(dict.fromkeys(_reason(e, depth) for e in of_types))
        else:
            message = _reason(first, len(first["loc"]))
        at = ".".join(where) or "body"
        return ApiError(400, f"{at}: got {given}; {message}", param=name).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        path, code = quote(request.url.path), error.status_code  # in one line, whatever it has
        message = {404: f"no such path: {path}", 405: f"{request.method} is not for {path}"}
        answer = ApiError(code, message.get(code, str(error.detail))).response()
        answer.headers.update(error.headers or {})
        if code == 405:  # the framework names the methods of one route; a path may have several
            answer.headers["Allow"] = ", ".join(_methods(app, request))
        return answer

    @app.exception_handler(OSError)
    async def _cannot_write(request: Request, error: OSError) -> Response:
        if error.errno not in _NO_ROOM:
            raise error
        message = f"nothing was kept: {error.strerror}; free space on the server's disk"
        return ApiError(507, message, retry_after_s=60).response()

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error: the server's log has the details").response()
