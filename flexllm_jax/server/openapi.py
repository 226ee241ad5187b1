"""What /openapi.json declares beyond what FastAPI reads from the routes: every answer with its
status, shape and content type, the form of an upload, and the keys.

The routes answer with bytes they encode themselves, so that is written down here, in one table.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from flexllm_jax.server import answers_schema as answers

_REASONS = {
    400: "The request makes no sense, or asks for what is not supported.",
    401: "No valid API key.",
    403: "The folder is not one that the server allows.",
    404: "There is no such thing.",
    409: "Something still needs it.",
    413: "The body is too large.",
    429: "The server or the key is busy; try again after `Retry-After` seconds.",
    503: "The engine is not there, or the server is shutting down; try again.",
}
_BODY = (400, 413)
_INFERENCE = (*_BODY, 404, 429, 503)
_JOBS, _JOB = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}"
_BYTES = {"type": "string", "format": "binary"}
_EVENT = {  # what the body is made of; Open API 3.1 has no word for that
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "JSON; of the last one, [DONE]."}},
}
_EVENTS = {"text/event-stream": _EVENT}
_TEXT = {"text/plain": {"type": "string"}}

# Per route: the answer (a model, or schemas by content type; both for those that can stream), and
# the statuses of errors. 401 goes with all of /v1 and the tokenizer.
_Answer = type[BaseModel] | dict[str, Any]
_ROUTES: dict[tuple[str, str], tuple[list[_Answer], tuple[int, ...]]] = {
    ("post", "/v1/completions"): ([answers.Completion, _EVENTS], _INFERENCE),
    ("post", "/v1/chat/completions"): ([answers.ChatCompletion, _EVENTS], _INFERENCE),
    ("get", "/v1/models"): ([answers.ModelList], ()),
    ("get", "/v1/models/{name}"): ([answers.Model], (404,)),
    ("delete", "/v1/models/{name}"): ([], (400, 404)),
    ("post", "/tokenize"): ([answers.Tokens], _BODY),
    ("post", "/detokenize"): ([answers.Text], _BODY),
    ("get", "/tokenizer_info"): ([answers.TokenizerInfo], ()),
    ("get", "/health"): ([answers.Health], (503,)),
    ("get", "/version"): ([answers.Version], ()),
    ("get", "/metrics"): ([_TEXT], ()),
    ("post", "/v1/files"): ([answers.File], _BODY),
    ("get", "/v1/files"): ([answers.FilePage], (400,)),
    ("get", "/v1/files/{file_id}"): ([answers.File], (404,)),
    ("delete", "/v1/files/{file_id}"): ([answers.Deleted], (404, 409)),
    ("get", "/v1/files/{file_id}/content"): ([{"application/octet-stream": _BYTES}], (404,)),
    ("post", "/v1/load_lora_adapter"): ([_TEXT], (*_BODY, 403, 404, 503)),
    ("post", "/v1/unload_lora_adapter"): ([_TEXT], (*_BODY, 404)),
    ("post", _JOBS): ([answers.Job], (*_BODY, 404, 429)),
    ("get", _JOBS): ([answers.JobPage], (400,)),
    ("get", _JOB): ([answers.Job], (404,)),
    ("post", f"{_JOB}/cancel"): ([answers.Job], (400, 404)),
    ("post", f"{_JOB}/pause"): ([answers.Job], (400, 404)),
    ("post", f"{_JOB}/resume"): ([answers.Job], (400, 404)),
    ("get", f"{_JOB}/events"): ([answers.JobEventPage, _EVENTS], (400, 404)),
    ("get", f"{_JOB}/checkpoints"): ([answers.JobCheckpointPage], (400, 404)),
}
_OPEN = ("/health", "/version", "/metrics")  # no key is asked for
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": _BYTES,
        "purpose": {"type": "string", "enum": ["fine-tune"]},
    },
}


def describe(app: FastAPI, *, with_keys: bool) -> None:
    """Complete what `app` declares; `with_keys`: requests need one."""
    declare = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(declare(), with_keys)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi


def _complete(schema: dict[str, Any], with_keys: bool) -> None:
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # errors are all of one form here
        schemas.pop(name, None)
    models = {a for shown, _ in _ROUTES.values() for a in shown if not isinstance(a, dict)}
    named = sorted([*models, answers.Error], key=lambda model: model.__name__)
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
            if (method, path) not in _ROUTES:
                continue
            shown, statuses = _ROUTES[method, path]
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
                str(status): _error(status, reference[answers.Error]) for status in sorted(statuses)
            }
    upload = schema["paths"]["/v1/files"]["post"]
    content = {"multipart/form-data": {"schema": _UPLOAD}}
    upload["requestBody"] = {"required": True, "content": content}


def _error(status: int, form: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": form}}
    told: dict[str, Any] = {"description": _REASONS[status], "content": content}
    if status in (429, 503):
        told["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
    return told
