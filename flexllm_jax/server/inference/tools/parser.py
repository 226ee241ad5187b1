"""Tool calls in what a model writes: found token by token, told as OpenAI's clients read them.

A call's name is told as soon as it is known, and its arguments as they are written, character by
character; where they are no JSON, a call is told when it is complete. What begins like a call and
is none is text. A model that may choose whether to call writes what it likes; of one that must, the
arguments have the tool's schema.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flexllm_jax.models.text.marks import overlap
from flexllm_jax.server.inference.tools.blocks import read_block
from flexllm_jax.server.inference.tools.formats import NAME, Format
from flexllm_jax.server.inference.tools.values import Schema

_NEXT = re.compile(r"\s*\}?\s*;?\s*")  # between two of Llama's calls
# What may be after the arguments in an item of a list, such as its id.
_TAIL = re.compile(r'\s*(?:,\s*"\w+"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[^"\[\]{},]*)\s*)*\}')


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


class ToolCallParser:
    """One output's text, piece by piece, split into text and calls of `functions`, which are given
    with the schemas of their arguments. With `parallel` False only the first call is told."""

    def __init__(
        self, form: Format, functions: Mapping[str, Schema | None], *, parallel: bool = True
    ):
        self._form, self._functions, self._parallel = form, functions, parallel
        self._state: Literal["text", "head", "arguments", "after", "between", "plain"] = (
            "text" if form.start else "head"
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
            "between": self._read_between,
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
        start = self._form.start
        at = self._held.find(start)
        if at < 0:
            at = len(self._held) - (0 if final else overlap(self._held, start))
        else:
            self._state = "head"
        self._say(at)
        return self._state == "head"

    def _say(self, length: int) -> None:
        """Of what is held, so many characters are text."""
        text, self._held = self._held[:length], self._held[length:]
        if self._after_call:
            text = text.lstrip()
        self._after_call = self._after_call and not text
        self._parsed.text += text

    def _read_head(self, final: bool) -> bool:
        form = self._form
        if not form.start and not self._held.lstrip().startswith("{"):
            if self._held.strip() or final:
                self._state = "plain"
            return self._state == "plain"
        match = form.head.match(self._held) if form.head else None
        if match and self._is_function(match["name"]):
            self._begin(match["name"])
            self._held, self._state = self._held[match.end() :], "arguments"
            return True
        readers = {"object": self._read_object, "list": self._read_item, "named": self._read_named}
        return readers.get(form.body, self._read_block)(final)

    def _read_object(self, final: bool) -> bool:
        """A call whose parts are in another order, once it is complete; or no call."""
        form = self._form
        if form.end:
            whole, end, rest = self._held.partition(form.end)
            value = _load(whole.removeprefix(form.start))[0]
            complete = bool(end)
        else:
            value, length = _load(self._held)
            rest, complete = self._held[length:], value is not None
        if not complete and not final:
            return False
        if self._tell_whole(value):
            self._held, self._state = rest, "text" if form.end else "after"
            return True
        return self._give_up()

    def _read_item(self, final: bool) -> bool:
        """The same of an item of a list."""
        inner = self._held.removeprefix(self._form.start).lstrip()
        if not final and (not inner or not inner[1:].strip()):
            return False
        value, length = _load(inner[1:])
        if value is None and inner[:1] in ("[", ",") and not final:
            return False
        if inner[:1] in ("[", ",") and self._tell_whole(value):
            self._held, self._state = inner[1 + length :], "between"
            return True
        return self._give_up()

    def _read_named(self, final: bool) -> bool:
        if not final and "{" not in self._held:
            return False
        return self._give_up()

    def _read_block(self, final: bool) -> bool:
        """A call that is no JSON, once it is complete; or no call."""
        whole, end, rest = self._held.partition(self._form.end)
        if not end and not final:
            return False
        inside = whole.removeprefix(self._form.start)
        calls = read_block(self._form, inside, self._functions) if end else None
        if not calls or not all(self._is_function(name) for name, _ in calls):
            return self._give_up()
        for name, given in calls:
            self._tell_whole({"name": name, "arguments": given})
        self._held, self._state = rest, "text"
        return True

    def _tell_whole(self, value: Any) -> bool:
        """Tell a call that is complete; whether it is one."""
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or not self._is_function(name):
            return False
        given = value.get("arguments", value.get("parameters", {}))
        self._begin(name)
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        self._tell(text.encode("utf-8", "replace").decode())
        return True

    def _give_up(self) -> bool:
        """What is held begins with no call, so its first mark is text."""
        if not self._form.start:
            self._state = "plain"
            return True
        self._after_call, self._state = False, "text"
        self._say(len(self._form.start) if self._held.startswith(self._form.start) else 1)
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
        form = self._form
        if form.end:
            _, end, rest = self._held.partition(form.end)
            if end or final:
                self._held, self._state = rest, "text"
            return bool(end)
        if form.body == "named":
            self._state = "text"
            return True
        match = (_TAIL if form.body == "list" else _NEXT).match(self._held)
        if match is None:  # of a list's item, not all has come
            return False
        rest = self._held[match.end() :]
        if form.body == "list":
            self._held, self._state = rest, "between"
        elif rest:
            self._held, self._state = rest, "head"
        elif final:
            self._held = ""
        return bool(rest)

    def _read_between(self, final: bool) -> bool:
        """Between the items of a list, or after them."""
        self._held = self._held.lstrip()
        self._state = "head" if self._held.startswith(",") else "text"
        if not self._held:
            self._state = "between"
        self._held = self._held.removeprefix("]")
        return bool(self._held)

    def _read_plain(self, final: bool) -> bool:
        self._parsed.text += self._held
        self._held = ""
        return False

    def _is_function(self, name: str) -> bool:
        """Without marks, only a known name tells a call from an answer that is JSON."""
        known = bool(self._form.start) or name in self._functions
        return known and NAME.fullmatch(name) is not None

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
