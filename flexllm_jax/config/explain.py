"""What is wrong with a configuration, in one line: the field as `--set` names it, its value and the
remedy; and all fields by that name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from flexllm_jax.config import renamed
from flexllm_jax.config.fields import Section, sections_in

Location = tuple[str | int, ...]


def explain(error: ValidationError, root: type[Section]) -> str:
    """What pydantic found, in one line: field, value, remedy."""
    problems = error.errors(include_url=False)
    # An old name first: what it makes missing is not worth telling.
    old_names = [text for problem in problems if (text := _old_name(problem))]
    text = old_names[0] if old_names else _explain_one(problems[0], root)
    more = len(problems) - 1
    return one_line(text) + (f" (and {more} more)" if more else "")


def _old_name(problem: ErrorDetails) -> str | None:
    loc, given = problem["loc"], problem.get("input")
    field = ".".join(map(str, loc))
    if problem["type"] == "extra_forbidden" and (new := renamed.new_field(loc)):
        return f"{field}: is called {new} now; rename it"
    if new := renamed.new_value(loc, given):
        return f"{field}: the value {given} is called {new} now; write that"
    return None


def _explain_one(problem: ErrorDetails, root: type[Section]) -> str:
    loc, given = problem["loc"], problem.get("input")
    field = ".".join(_follow(loc, root)[0])
    if problem["type"] == "extra_forbidden":
        text = f"{field}: unknown field (value {_short(given)}); {_suggest(loc, root)}"
    elif problem["type"] == "missing":
        described = _field_at(loc, root)
        about = f" ({described.description})" if described else ""
        text = f"{field}: required field is missing; add it{about}"
    elif problem["type"] == "union_tag_not_found":
        text = f"{field}.type: required field is missing; add it"
    elif problem["type"] == "union_tag_invalid":
        known = problem.get("ctx", {})
        text = f"{field}.type: got {known['tag']!r}; must be one of {known['expected_tags']}"
    elif problem["type"] == "value_error":
        text = problem["msg"].removeprefix("Value error, ")
        text = f"{field}: {text}" if field else text
    else:
        wanted = problem["msg"].replace("Input should be", "must be").replace("Input", "it")
        wanted = wanted[0].lower() + wanted[1:]
        if isinstance(given, str) and problem["type"] in ("int_type", "float_type", "bool_type"):
            wanted += " (write it without quotes)"
        text = f"{field}: got {_short(given)}; {wanted}"
    return text


def _field_at(loc: Location, root: type[Section]) -> FieldInfo | None:
    section = section_of(loc[:-1], root)
    return section.model_fields.get(str(loc[-1])) if section else None


def section_of(loc: Location, root: type[Section]) -> type[Section] | None:
    """The section at a place, if there is one."""
    return next(iter(_follow(loc, root)[1]), None)


def _follow(loc: Location, root: type[Section]) -> tuple[list[str], list[type[Section]]]:
    """The name of a place, key by key, and the sections it may hold. Where there is a choice,
    pydantic puts the `type` that was given between two keys; a name has none."""
    names: list[str] = []
    choice: list[type[Section]] = [root]
    is_name = False  # of an item of a mapping
    for key in loc:
        chosen = [s for s in choice if len(choice) > 1 and s.model_fields["type"].default == key]
        if chosen and not is_name:
            choice = chosen
            continue
        names.append(str(key))
        if isinstance(key, str) and not is_name:
            field = next((s.model_fields[key] for s in choice if key in s.model_fields), None)
            choice = sections_in(field.annotation) if field else []
            is_name = field is not None and get_origin(field.annotation) is dict
        else:
            is_name = False
    return names, choice


def _suggest(loc: Location, root: type[Section]) -> str:
    key, section = str(loc[-1]), section_of(loc[:-1], root) or root
    near = difflib.get_close_matches(key, section.model_fields, n=1)
    if near:
        return f"did you mean {'.'.join([*_follow(loc[:-1], root)[0], near[0]])}?"
    own = ".".join("N" if n.isdecimal() else n for n in _follow(loc, root)[0])  # of another choice
    elsewhere = [n for n in dict(walk(root)) if n.rsplit(".", 1)[-1] == key and n != own]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here: {', '.join(section.model_fields)}"


def walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field with its dotted name; items of lists are called N. Of a choice all are told,
    some under one name."""
    for name, field in section.model_fields.items():
        children = sections_in(field.annotation)
        if not children:
            yield prefix + name, field
        item = ".N" if "tuple" in str(field.annotation) else ""
        for child in children:
            yield from walk(child, f"{prefix}{name}{item}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(text: object) -> str:
    """A text without line breaks."""
    return " ".join(str(text).split())
