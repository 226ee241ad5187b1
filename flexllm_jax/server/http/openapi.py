"""What /openapi.json declares beyond what FastAPI reads from the routes: every answer with its
status, shape and content type, the form of an upload, and the keys.

The routes answer with bytes they encode themselves, so each floor declares its answers in a table,
`answers.py`; a test holds every answer against these declarations.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REASONS = {
    400: "The request makes no sense, or asks for what is not supported.",
    401: "No valid API key.",
    403: "The folder is not one that the server allows.",
    404: "There is no such thing.",
    408: "The body came too slowly.",
    409: "Something still needs it.",
    413: "The body is too large.",
    429: "The server or the key is busy; try again after `Retry-After` seconds.",
    503: "The engine is not there, the database refuses, or the server shuts down; try again.",
    507: "The disk is full: nothing was kept.",
}
WITH_BODY = (400, 408, 413, 429)
READS, WRITES = (503,), (503, 507)  # the database
JSON = type[BaseModel]
Answer = JSON | dict[str, Any]
Answers = dict[tuple[str, str], tuple[list[Answer], tuple[int, ...]]]
"""Per method and path: the answer (a model, or schemas by content type; both for those that can
stream), and the statuses of errors. 401 goes with all that need a key."""

BYTES = {"type": "string", "format": "binary"}
TEXT = {"text/plain": {"type": "string"}}
_EVENT = {  # what the body is made of; OpenAPI 3.1 has no word for that
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "JSON; of the last one, [DONE]."}},
}
EVENTS = {"text/event-stream": _EVENT}
_OPEN = ("/health", "/ping", "/load", "/version", "/metrics")  # no key is asked for
_FORMS = {
    "/v1/files": {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": BYTES,
            "purpose": {"type": "string", "enum": ["fine-tune", "batch"]},
            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
        },
    },
    "/v1/uploads/{upload_id}/parts": {
        "type": "object",
        "required": ["data"],
        "properties": {"data": BYTES},
    },
}


class ErrorDetails(BaseModel):
    """What went wrong, in one line; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The body of every status from 400 on."""

    type: Literal["error"]
    error: ErrorDetails


def describe(app: FastAPI, answers: Answers, *, with_keys: bool) -> None:
    """Complete what `app` declares with its `answers`; `with_keys`: requests need one."""
    declare = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(declare(), answers, with_keys)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi


def _complete(schema: dict[str, Any], answers: Answers, with_keys: bool) -> None:
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # errors are all of one form here
        schemas.pop(name, None)
    models = {a for shown, _ in answers.values() for a in shown if not isinstance(a, dict)}
    named = sorted([*models, Error], key=lambda model: model.__name__)
    references, definitions = models_json_schema(
        [(model, "serialization") for model in named],
        ref_template="#/components/schemas/{model}",
    )
    schemas.update(definitions["$defs"])
    reference = {model: references[model, "serialization"] for model in named}
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            if (method, path) not in answers:
                continue
            shown, statuses = answers[method, path]
            if with_keys and path not in _OPEN:
                statuses = (*statuses, 401)
                operation["security"] = [{"key": []}]
            content: dict[str, Any] = {}
            for answer in shown:
                if isinstance(answer, dict):
                    content |= {kind: {"schema": form} for kind, form in answer.items()}
                else:
                    content["application/json"] = {"schema": reference[answer]}
            success = {"200": {"description": "The answer.", "content": content}} if shown else {}
            operation["responses"] = success | {
                str(status): _error(status, reference[Error]) for status in sorted(set(statuses))
            }
    for path, form in _FORMS.items():
        content = {"multipart/form-data": {"schema": form}}
        schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}


def _error(status: int, form: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": form}}
    told: dict[str, Any] = {"description": _REASONS[status], "content": content}
    if status in (429, 503):
        told["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
    return told
