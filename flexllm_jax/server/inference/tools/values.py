"""Arguments that are written as text, not as JSON: which value a text is, and which texts are the
values of a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_MOST_REFERENCES = 16  # one after the other
_PYTHON = {"True": True, "False": False, "None": None}

Schema = Mapping[str, Any]


def properties_of(schema: Schema | None) -> dict[str, Schema]:
    """The arguments of a function by their names, each with what its schema refers to."""
    schema = schema or {}
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    return {
        name: {**shared, **_referred(given, shared)} if isinstance(given, Mapping) else shared
        for name, given in properties.items()
    }


def _referred(given: Schema, shared: Schema) -> Schema:
    """What a reference means, with what stands beside it; one that leads nowhere stays."""
    for _ in range(_MOST_REFERENCES):
        named = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(given.get("$ref")))
        definitions = shared.get(named[1]) if named else None
        target = definitions.get(named[2]) if named and isinstance(definitions, Mapping) else None
        if not isinstance(target, Mapping):
            break
        given = {**target, **{key: value for key, value in given.items() if key != "$ref"}}
    return given


def is_text(schema: Schema) -> bool:
    """Whether a value is written as it is, without quotes."""
    kind = schema.get("type")
    return kind == "string" or (isinstance(kind, list) and "string" in kind)


def choices_of(schema: Schema) -> list[str] | None:
    """The texts of a schema that lists its values; None: it does not."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if not isinstance(values, list):
        return None
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def value_of(schema: Schema | None, text: str) -> Any:
    """The value that a text is."""
    if schema is not None and is_text(schema):
        return text
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _PYTHON.get(text.strip(), text)


def _refuse(name: str) -> None:
    """Python reads NaN and Infinity, which are no JSON."""
    raise ValueError(name)
