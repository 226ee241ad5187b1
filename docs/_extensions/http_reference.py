"""The page of the HTTP API, from the OpenAPI document that a server gives at /openapi.json.

No weights are needed: the application is put together over a configuration and a tokenizer of one
word, and not started.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flexllm_jax.config import build_config
from flexllm_jax.server.app import Server

# Paths by what one wants to do; a path that is on no shelf is an error of the build.
_SHELVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Inference",
        (
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/responses",
            "/v1/messages",
            "/invocations",
            "/v1/models",
        ),
    ),
    ("Tokens", ("/tokenize", "/detokenize", "/tokenizer_info")),
    ("Files", ("/v1/files", "/v1/uploads")),
    ("Batches", ("/v1/batches",)),
    ("Finetuning", ("/v1/fine_tuning",)),
    ("Adapters", ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")),
    ("Operation", ("/health", "/ping", "/load", "/version", "/metrics", "/dashboard")),
)

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2,
    "eos_token_id": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def openapi_document() -> tuple[dict[str, Any], str]:
    """The document of a server with keys and with folders of adapters, and its text."""
    with tempfile.TemporaryDirectory() as folder:
        _save_tokenizer(Path(folder))
        (Path(folder) / "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
        tree = {
            "model": {"path": folder},
            "server": {
                "model_name": "demo",
                "adapter_dirs": [folder],
                "api_keys": [{"name": "docs", "key": "not-a-secret"}],
            },
            "output_dir": folder,
        }
        document = Server(build_config(tree)).app.openapi()
    return document, json.dumps(document, indent=1) + "\n"


def _save_tokenizer(folder: Path) -> None:
    backend = Tokenizer(models.WordLevel({"word": 0, "<eos>": 1}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)


def api_markdown(document: dict[str, Any]) -> str:
    """Markdown of all paths: what goes in, what comes out, which errors there are."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    left = dict(document["paths"])
    named: dict[str, dict[str, Any]] = {}
    for title, prefixes in _SHELVES:
        own = [path for path in left if path.startswith(prefixes)]
        if own:
            yield f"## {title}\n"
        for path in own:
            for method, operation in left.pop(path).items():
                yield from _operation(method, path, operation, document, named)
    if left:
        raise ValueError(f"{', '.join(left)}: on no shelf of docs/_extensions/http_reference.py")
    schemas = document["components"]["schemas"]
    yield "## Shapes\n"
    yield "Bodies of requests and answers, and what they are made of.\n"
    for name in sorted(schemas):
        yield from _shape(name, schemas[name])


def _operation(
    method: str,
    path: str,
    operation: dict[str, Any],
    document: dict[str, Any],
    named: dict[str, dict[str, Any]],
) -> Iterator[str]:
    yield f"### {method.upper()} {path}\n"
    parameters = operation.get("parameters", [])
    if parameters:
        yield "| parameter | in | type | |\n|---|---|---|---|"
        for given in parameters:
            what = _type(given.get("schema", {}))
            default = given.get("schema", {}).get("default")
            told = given.get("description", "")
            if given.get("required"):
                told = f"required. {told}".strip()
            elif default is not None:
                told = f"default `{json.dumps(default)}`. {told}".strip()
            yield f"| `{given['name']}` | {given['in']} | {_cell(what)} | {_cell(told)} |"
        yield ""
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Body, `{kind}`: {_type(content['schema'])}\n"
    errors = []
    for status, answer in operation.get("responses", {}).items():
        if int(status) >= 400:
            errors.append((status, answer["description"]))
            continue
        kinds = [
            f"`{kind}`: {_type(c.get('schema', {}))}"
            for kind, c in answer.get("content", {}).items()
        ]
        yield f"{status}: {'; or '.join(kinds) or 'empty'}\n"
    if errors:
        yield "Errors: " + ", ".join(f"[{status}](#errors)" for status, _ in errors) + ".\n"


def _shape(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if schema.get("description"):
        yield f"{_code_free(schema['description'])}\n"
    fields = schema.get("properties")
    if not fields:
        yield f"{_type(schema)}\n"
        return
    required = schema.get("required", ())
    yield "| field | type | default | |\n|---|---|---|---|"
    for field, form in fields.items():
        default = "required" if field in required else ""
        if not default and form.get("default") is not None:
            default = f"`{json.dumps(form['default'])}`"
        cells = (f"`{field}`", _type(form), default, form.get("description", ""))
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"
    yield ""


def _type(form: dict[str, Any]) -> str:
    if "$ref" in form:
        name = form["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "const" in form:
        return f"`{json.dumps(form['const'])}`"
    if "enum" in form:
        return " or ".join(f"`{json.dumps(value)}`" for value in form["enum"])
    for choice in ("anyOf", "oneOf"):
        if choice in form:
            kinds = [_type(one) for one in form[choice] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if form.get("type") == "array":
        return f"list of {_type(form.get('items', {}))}{_limits(form)}"
    if form.get("type") == "object" and isinstance(form.get("additionalProperties"), dict):
        return f"map to {_type(form['additionalProperties'])}{_limits(form)}"
    if form.get("properties") and "title" not in form:
        return "a form with " + ", ".join(f"`{name}`" for name in form["properties"])
    kind = form.get("type", "anything")
    kind = {"string": "text", "object": "object", "boolean": "true or false"}.get(kind, kind)
    if form.get("format") == "binary":
        kind = "bytes"
    return f"{kind}{_limits(form)}"


def _limits(form: dict[str, Any]) -> str:
    told = [
        text.format(form[name])
        for name, text in (
            ("minimum", "{} or more"),
            ("exclusiveMinimum", "above {}"),
            ("maximum", "at most {}"),
            ("exclusiveMaximum", "below {}"),
            ("minLength", "{} characters or more"),
            ("maxLength", "at most {} characters"),
            ("minItems", "{} or more"),
            ("maxItems", "at most {}"),
        )
        if name in form and form[name] not in (0, 0.0)
    ]
    return f" ({', '.join(told)})" if told else ""


def _code_free(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
