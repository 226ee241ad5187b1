"""Calls that have to be made, as a grammar: of a format, with the schemas of the tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams, quote
from flexllm_jax.server.inference.tools.formats import Format
from flexllm_jax.server.inference.tools.values import Schema, choices_of, is_text, properties_of

# White space is as templates write it, which models are trained on.
_SPACED = {
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
}


def calls_of(
    form: Format,
    functions: Mapping[str, dict[str, Any] | None],
    literal: Callable[[str], str],
    *,
    parallel: bool,
    answer: StructuredOutputsParams | None = None,
) -> StructuredOutputsParams:
    """Outputs that call one of `functions`, which are given with the schemas of their arguments;
    with `parallel` more than one, if the format can. Or, instead, what matches `answer`. `literal`
    writes a mark in a grammar."""
    rules = [f"body: {' | '.join(f'function{i}' for i in range(len(functions)))}"]
    for i, (name, schema) in enumerate(functions.items()):
        rules += _WRITERS[form.body](form, i, name, schema, literal)
    start, end = literal(form.start), literal(form.end)
    if form.body == "list":
        more = '(", " body)*' if parallel else ""
        rules.append(f'calls: {start} {quote(form.opening)} body {more} "]"')
    elif form.body == "python":
        rules.append(f'calls: {start} "\\n" body{"+" if parallel else ""} {end}')
    elif not form.start:
        rules.append("calls: body")
    else:
        lines = '"\\n"?' if form.body == "object" else ""
        rules.append(f"call: {start} {lines} body {lines} {end if form.end else ''}")
        between = '"\\n"?' if form.end else ""
        rules.append(f"calls: call ({between} call)*" if parallel else "calls: call")
    rules.append("start: calls" if answer is None else "start: calls | answer")
    if answer is not None:
        rules.append(f"answer: {answer.as_lark()}")
    return StructuredOutputsParams(grammar="\n".join(rules))


def _object(
    form: Format, i: int, name: str, schema: Mapping[str, Any] | None, literal: Any
) -> list[str]:
    # In the pieces of JSON, so that an answer in JSON can begin with the same ones.
    pieces = ("{", '"name"', ": ", json.dumps(name), ", ", json.dumps(form.key), ": ")
    head = " ".join(map(quote, pieces))
    return [f'function{i}: {head} arguments{i} "}}"', _arguments(i, schema)]


def _named(
    form: Format, i: int, name: str, schema: Mapping[str, Any] | None, literal: Any
) -> list[str]:
    return [f"function{i}: {quote(name)} {literal('[ARGS]')} arguments{i}", _arguments(i, schema)]


def _arguments(i: int, schema: Mapping[str, Any] | None) -> str:
    return f"arguments{i}: %json {json.dumps({'type': 'object'} | dict(schema or {}) | _SPACED)}"


def _parameters(
    form: Format, i: int, name: str, schema: Mapping[str, Any] | None, literal: Any
) -> list[str]:
    def opening(key: str) -> str:
        return quote(f"<parameter={key}>\n")

    body, rules = _values(i, schema, opening, quote("\n</parameter>\n"))
    head = quote(f"\n<function={name}>\n")
    return [f'function{i}: {head} {body} "</function>\\n"', *rules]


def _pairs(
    form: Format, i: int, name: str, schema: Mapping[str, Any] | None, literal: Any
) -> list[str]:
    def opening(key: str) -> str:
        marks = [literal(mark) for mark in ("<arg_key>", "</arg_key>", "<arg_value>")]
        return f'{marks[0]} {quote(key)} {marks[1]} "\\n" {marks[2]}'

    close = literal("</arg_value>")
    close = f'{close} "\\n"' if close.startswith("<[") else quote("</arg_value>\n")
    body, rules = _values(i, schema, opening, close)
    head = quote(f"{name}\n")
    return [f"function{i}: {head} {body}", *rules]


def _values(
    i: int,
    schema: Mapping[str, Any] | None,
    opening: Callable[[str], str],
    close: str,
) -> tuple[str, list[str]]:
    """The arguments of a function in the order of its schema, each between what `opening` and
    `close` match: a part of a rule, and more rules."""
    given_required = (schema or {}).get("required")
    required = given_required if isinstance(given_required, list) else []
    parts, rules = [], []
    for j, (key, given) in enumerate(properties_of(schema).items()):
        rule = f"value{i}_{j}"
        choices, until = choices_of(given), close
        if choices is not None:
            rules.append(f"{rule}: {' | '.join(map(quote, choices))}")
        elif not is_text(given):
            rules.append(f"{rule}: %json {json.dumps(dict(given) | _SPACED)}")
        elif close.startswith("<["):  # a token, which no text has
            rules.append(f"{rule}: /(?s:.*)/")
        else:
            until = ""
            rules.append(f"{rule}[suffix={close}]: /(?s:.*)/")
        part = f"{opening(key)} {rule} {until}"
        parts.append(part if key in required else f"({part})?")
    return " ".join(parts), rules


def _gemma(
    form: Format, i: int, name: str, schema: Mapping[str, Any] | None, literal: Any
) -> list[str]:
    mark = literal(form.quote)
    inner = f"/(?s:.*)/ {mark}" if mark.startswith("<[") else f"inner{i}"
    any_value = f"any{i}"

    def write(rule: str, given: Schema) -> str:
        choices = choices_of(given)
        texts = {isinstance(value, str) for value in given.get("enum", [given.get("const")])}
        if choices and texts == {True}:
            return f"{rule}: {mark} ({' | '.join(map(quote, choices))}) {mark}"
        if is_text(given):
            return f"{rule}: {mark} text{i}"
        plain = given.get("type") in ("integer", "number", "boolean", "null")
        if plain or (choices and texts == {False}):
            return f"{rule}: %json {json.dumps(dict(given))}"
        return f"{rule}: {any_value}"

    head = quote(f"call:{name}{{")
    return [
        f'function{i}: {head} first{i}_0 "}}"',
        *_separated(i, schema, lambda key: quote(f"{key}:"), quote(","), write),
        f"text{i}: {inner}",
        *([] if mark.startswith("<[") else [f"inner{i}[suffix={mark}]: /(?s:.*)/"]),
        f'{any_value}: {mark} text{i} | %json {{"type": ["number", "boolean", "null"]}} '
        f'| "[" ({any_value} ("," {any_value})*)? "]" | "{{" (pair{i} ("," pair{i})*)? "}}"',
        f'pair{i}: /[a-zA-Z0-9_.-]+/ ":" {any_value}',
    ]


def _python(
    form: Format, i: int, name: str, schema: Mapping[str, Any] | None, literal: Any
) -> list[str]:
    def write(rule: str, given: Schema) -> str:
        return f"{rule}: %json {json.dumps(dict(given) | _SPACED)}"

    head = quote(f"{name}(")
    return [
        f'function{i}: {head} first{i}_0 ")\\n"',
        *_separated(i, schema, lambda key: quote(f"{key}="), quote(", "), write),
    ]


def _separated(
    i: int,
    schema: Mapping[str, Any] | None,
    opening: Callable[[str], str],
    comma: str,
    write: Callable[[str, Schema], str],
) -> list[str]:
    """Rules of the arguments of a function in the order of its schema with a comma between them,
    of which the first is `first{i}_0`; `write` makes the rule of a value."""
    given_required = (schema or {}).get("required")
    required = given_required if isinstance(given_required, list) else []
    rules, properties = [], properties_of(schema)
    for j, (key, given) in enumerate(properties.items()):
        own = f"{opening(key)} value{i}_{j} more{i}_{j + 1}"
        leave = ("", "") if key in required else (f" | first{i}_{j + 1}", f" | more{i}_{j + 1}")
        rules += [f"first{i}_{j}: {own}{leave[0]}", f"more{i}_{j}: {comma} {own}{leave[1]}"]
        rules.append(write(f"value{i}_{j}", given))
    return [*rules, *(f'{name}{i}_{len(properties)}: ""' for name in ("first", "more"))]


_WRITERS: dict[str, Callable[..., list[str]]] = {
    "object": _object,
    "list": _object,
    "named": _named,
    "parameters": _parameters,
    "pairs": _pairs,
    "gemma": _gemma,
    "python": _python,
}
