"""Tool calls in what a model writes: found token by token, told as OpenAI's clients read them.

Two formats are read, told apart by the chat template that asks the model for them:

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, text around it: Hermes, Qwen
    llama    {"name": ..., "parameters": {...}} and nothing else: Llama 3.1 and later

A call's name is told as soon as it is known, and its arguments as they are written, character by
character. What begins like a call and is none is text. A model that may choose whether to call
writes what it likes; of one that must, the arguments have the tool's schema.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flexllm_jax.engine.structured_outputs import StructuredOutputsParams, quote
from flexllm_jax.server.inference.marks import overlap

Format = Literal["hermes", "llama"]

START, _END = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[\w.:/-]{1,256}")
_HEAD = re.compile(
    rf'(?:{START})?\s*\{{\s*"name"\s*:\s*"({_NAME.pattern})"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_SPACED = {
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
}
_NEXT = re.compile(r"\s*\}?\s*;?\s*")  # between two of Llama's calls


@dataclass
class CallDelta:
    """What is new of call `index`: with its first piece its id and name, then more arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str

    def describe(self) -> dict[str, Any]:
        """As in a chunk of a stream."""
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass
class Parsed:
    """What is new of an output: text, and pieces of calls."""

    text: str
    calls: list[CallDelta]


def find_format(template: str) -> Format | None:
    """The format a chat template asks for; None: another one, or none."""
    if START in template and "<function=" not in template:  # Qwen3-Coder writes XML inside of it
        return "hermes"
    return "llama" if '"parameters": dictionary' in template else None


def marks_of(form: Format) -> tuple[str, ...]:
    """What has to be in a text for calls to be found in it."""
    return (START, _END) if form == "hermes" else ()


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
    writes a mark in a grammar. White space is as templates write it, which models are trained on.
    """
    key = "arguments" if form == "hermes" else "parameters"
    names = " | ".join(f"function{i}" for i in range(len(functions)))
    rules = [f"body: {names}"]
    for i, (name, schema) in enumerate(functions.items()):
        # In the pieces of JSON, so that an answer in JSON can begin with the same ones.
        pieces = ("{", '"name"', ": ", json.dumps(name), ", ", json.dumps(key), ": ")
        head = " ".join(map(quote, pieces))
        rules += [
            f'function{i}: {head} arguments{i} "}}"',
            f"arguments{i}: %json {json.dumps({'type': 'object'} | (schema or {}) | _SPACED)}",
        ]
    if form == "hermes":
        rules.append(f'call: {literal(START)} "\\n"? body "\\n"? {literal(_END)}')
        rules.append('calls: call ("\\n"? call)*' if parallel else "calls: call")
    else:
        rules.append("calls: body")
    rules.append("start: calls" if answer is None else "start: calls | answer")
    if answer is not None:
        rules.append(f"answer: {answer.as_lark()}")
    return StructuredOutputsParams(grammar="\n".join(rules))


class ToolCallParser:
    """One output's text, piece by piece, split into text and calls of the functions `names`.

    With `parallel` False only the first call is told.
    """

    def __init__(self, form: Format, names: Collection[str], *, parallel: bool = True):
        self._form, self._names, self._parallel = form, names, parallel
        self._state: Literal["text", "head", "arguments", "after", "plain"] = (
            "text" if form == "hermes" else "head"
        )
        self._held = ""  # not decided yet
        self._after_call = False  # where white space is no text
        self._depth, self._in_string, self._escaped = 0, False, False
        self._parsed = Parsed("", [])
        self.count = 0  # calls so far

    def push(self, text: str, *, final: bool) -> Parsed:
        """Take in what came; `final`: nothing more will."""
        self._held += text
        steps = {
            "text": self._read_text,
            "head": self._read_head,
            "arguments": self._read_arguments,
            "after": self._read_after,
            "plain": self._read_plain,
        }
        while self._held and steps[self._state](final):
            pass
        parsed, self._parsed = self._parsed, Parsed("", [])
        if not self._parallel:
            parsed.calls = [call for call in parsed.calls if call.index == 0]
        return parsed

    # Each returns whether there may be more to read in what is held.

    def _read_text(self, final: bool) -> bool:
        at = self._held.find(START)
        if at < 0:
            at = len(self._held) - (0 if final else overlap(self._held, START))
        else:
            self._state = "head"
        text, self._held = self._held[:at], self._held[at:]
        if self._after_call:
            text = text.lstrip()
        self._after_call = self._after_call and not text
        self._parsed.text += text
        return self._state == "head"

    def _read_head(self, final: bool) -> bool:
        if self._form == "llama" and not self._held.lstrip().startswith("{"):
            if self._held.strip() or final:
                self._state = "plain"
            return self._state == "plain"
        match = _HEAD.match(self._held)
        if match and self._is_function(match[1]):
            self._begin(match[1])
            self._held, self._state = self._held[match.end() :], "arguments"
            return True
        return self._read_whole(final)

    def _read_whole(self, final: bool) -> bool:
        """A call whose parts are in another order, once it is complete; or no call."""
        if self._form == "hermes":
            whole, end, rest = self._held.partition(_END)
            value, whole = _load(whole.removeprefix(START))[0], whole + end
            complete = bool(end)
        else:
            value, length = _load(self._held)
            whole, rest = self._held[:length], self._held[length:]
            complete = value is not None
        if not complete and not final:
            return False
        name = value.get("name") if isinstance(value, dict) else None
        if isinstance(value, dict) and isinstance(name, str) and self._is_function(name):
            given = value.get("arguments", value.get("parameters", {}))
            self._begin(name)
            text = given if isinstance(given, str) else json.dumps(given)
            self._tell(text.encode("utf-8", "replace").decode())
            self._held, self._state = rest, "text" if self._form == "hermes" else "after"
        elif self._form == "hermes":
            self._parsed.text += whole
            self._held, self._state, self._after_call = rest, "text", False
        else:
            self._state = "plain"
        return True

    def _read_arguments(self, final: bool) -> bool:
        """Arguments are a JSON object, which ends where its first brace is closed."""
        for at, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._tell(self._held[: at + 1])
                    self._held, self._state = self._held[at + 1 :], "after"
                    return True
        self._tell(self._held)
        self._held = ""
        return False

    def _read_after(self, final: bool) -> bool:
        if self._form == "hermes":
            _, end, rest = self._held.partition(_END)
            if end or final:
                self._held, self._state = rest, "text"
            return bool(end)
        match = _NEXT.match(self._held)
        assert match is not None
        rest = self._held[match.end() :]
        if rest:
            self._held, self._state = rest, "head"
        elif final:
            self._held = ""
        return bool(rest)

    def _read_plain(self, final: bool) -> bool:
        self._parsed.text += self._held
        self._held = ""
        return False

    def _is_function(self, name: str) -> bool:
        """Without marks, only a known name tells a call from an answer that is JSON."""
        known = self._form == "hermes" or name in self._names
        return known and _NAME.fullmatch(name) is not None

    def _begin(self, name: str) -> None:
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        self._parsed.calls.append(CallDelta(self.count, call_id, name, ""))
        self.count += 1
        self._after_call = True

    def _tell(self, arguments: str) -> None:
        calls = self._parsed.calls
        if calls and calls[-1].index == self.count - 1:
            calls[-1].arguments += arguments
        elif arguments:
            calls.append(CallDelta(self.count - 1, None, None, arguments))


def join_calls(deltas: Collection[CallDelta]) -> list[dict[str, Any]]:
    """The calls that pieces make up, as in a message."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.id is not None:
            described = delta.describe()
            calls[described.pop("index")] = described
        else:
            calls[delta.index]["function"]["arguments"] += delta.arguments
    return list(calls.values())


def _load(text: str) -> tuple[Any, int]:
    """The JSON value that `text` begins with, and where it ends; (None, 0) where there is none."""
    start = len(text) - len(text.lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, 0
