"""The page of the configuration: every field of the schema, with type, default and description."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from flexllm_jax.config import Config, Section
from flexllm_jax.config.fields import sections_in


def configuration_markdown(root: type[Section] = Config) -> str:
    """Markdown of all sections below `root`: a heading and a table each."""
    return "\n".join(_sections(root, "")) + "\n"


def _sections(section: type[Section], path: str) -> Iterator[str]:
    own = [(n, f) for n, f in section.model_fields.items() if not sections_in(f.annotation)]
    if path:
        level = min(2 + path.count("."), 4)
        name, choice, kind = path.partition(" ")
        yield f"{'#' * level} `{name}`{choice}{kind}\n"
        yield f"{_text(section.__doc__)}\n"
    elif own:
        yield "## At the top\n"
    if own:
        yield "| field | type | default | |\n|---|---|---|---|"
        yield from (_row(name, field) for name, field in own)
        yield ""
    for name, field in section.model_fields.items():
        children = sections_in(field.annotation)
        below = f"{path}.{name}" if path else name
        if _is_list(field.annotation):
            below += "[]"
        elif _is_map(field.annotation):
            below += ".NAME"
        for child in children:
            kind = f" of type {child.model_fields['type'].default}" if len(children) > 1 else ""
            yield from _sections(child, below + kind)


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_default(field)}`"
    cells = (f"`{name}`", _type(field), default, field.description or "")
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    limits = [text for constraint in field.metadata for text in _limits(constraint)]
    return ", ".join([_name(field.annotation), *limits])


def _name(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        limits = [text for constraint in inside[1:] for text in _limits(constraint)]
        return " ".join([_name(inside[0]), *(f"({text})" for text in limits)])
    if origin is Literal:
        return " or ".join(f"`{_plain(value)}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(one) for one in inside if one is not type(None))
    if origin is tuple:
        return f"list of {_name(inside[0])}"
    if origin is dict:
        return f"map from {_name(inside[0])} to {_name(inside[1])}"
    return {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def _limits(constraint: Any) -> Iterator[str]:
    if isinstance(constraint, FieldInfo):
        for below in constraint.metadata:
            yield from _limits(below)
    elif isinstance(constraint, Interval):
        for below in constraint:
            yield from _limits(below)
    elif isinstance(constraint, Ge):
        yield f"{constraint.ge} or more"
    elif isinstance(constraint, Gt):
        yield f"above {constraint.gt}"
    elif isinstance(constraint, Le):
        yield f"at most {constraint.le}"
    elif isinstance(constraint, Lt):
        yield f"below {constraint.lt}"
    elif isinstance(constraint, MinLen):
        yield "not empty" if constraint.min_length == 1 else f"{constraint.min_length} or longer"
    elif isinstance(constraint, MaxLen):
        yield f"{constraint.max_length} or shorter"


def _default(field: FieldInfo) -> str:
    return _plain(field.get_default(call_default_factory=True))


def _plain(value: Any) -> str:
    if isinstance(value, Section):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.model_dump().items())
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {{{_plain(v)}}}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    home = str(Path.home())
    text = str(value)
    return text.replace(home, "~", 1) if text.startswith(home) else text


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _is_map(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
