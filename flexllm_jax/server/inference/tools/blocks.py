"""Calls that are not JSON, in a block that is complete: what is inside of its marks, read.

parameters  <function=name> <parameter=key> value </parameter> ... </function>
pairs       name <arg_key> key </arg_key> <arg_value> value </arg_value> ...
gemma       call:name{key:QUOTEtextQUOTE,key:1}, where objects have bare keys
python      name(key='text', other=[1]), one in a line; null, true and false are known, too
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from flexllm_jax.server.inference.tools.formats import NAME, Format
from flexllm_jax.server.inference.tools.values import Schema, properties_of, value_of

Call = tuple[str, dict[str, Any]]

_FUNCTION = re.compile(r"\s*<function=([^>]*)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>]*)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PAIRS = re.compile(r"\s*([^<]*?)\s*((?:<arg_key>.*)?)", re.DOTALL)
_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_ESCAPE = re.compile(r"\\(U[0-9a-fA-F]{8}|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[nrtbf\\'\"/])")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_BARE = re.compile(r"[^\s,:=()\[\]{}'\"<>]+")
_KEY = re.compile(r"[\w.-]+")


def read_block(
    form: Format, inside: str, functions: Mapping[str, Schema | None]
) -> list[Call] | None:
    """The calls of a block; None: it is none."""
    try:
        return _READERS[form.body](form, inside, functions)
    except (ValueError, RecursionError):
        return None


def _tagged(whole: re.Pattern[str], pair: re.Pattern[str]) -> Callable[..., list[Call]]:
    def read(form: Format, inside: str, functions: Mapping[str, Schema | None]) -> list[Call]:
        match = whole.fullmatch(inside)
        if match is None:
            raise ValueError("no call")
        schemas = properties_of(functions.get(match[1]))
        pairs = [(key.strip(), text) for key, text in pair.findall(match[2])]
        return [(match[1], {key: value_of(schemas.get(key), text) for key, text in pairs})]

    return read


class _Text:
    """Values in a text, from its beginning on; ValueError where there is none."""

    def __init__(self, text: str, quote: str):
        self._text, self._at = text, 0
        if quote:
            self._string = re.compile(f"{re.escape(quote)}(.*?){re.escape(quote)}", re.DOTALL)
        else:
            self._string = _STRING
        self._is_python = not quote

    def find(self, pattern: re.Pattern[str] | str) -> re.Match[str] | None:
        """What comes next, after white space, if it is this."""
        pattern = re.compile(re.escape(pattern)) if isinstance(pattern, str) else pattern
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return match

    def take(self, pattern: re.Pattern[str] | str) -> str:
        """The same, which has to come."""
        match = self.find(pattern)
        if match is None:
            raise ValueError(f"no {pattern} at {self._at}")
        return match[0]

    @property
    def at_end(self) -> bool:
        return not self._text[self._at :].strip()

    def pairs(self, between: str, close: str) -> dict[str, Any]:
        """Keys and values up to `close`."""

        def pair() -> tuple[str, Any]:
            key = self._quoted()
            key = self.take(_KEY) if key is None else key
            self.take(between)
            return key, self.value()

        return dict(self._items(pair, close))

    def value(self) -> Any:
        """One value."""
        if (text := self._quoted()) is not None:
            return text
        if self.find("["):
            return self._items(self.value, "]")
        if self.find("{"):
            return self.pairs(":", "}")
        value = value_of(None, self.take(_BARE))
        if self._is_python and isinstance(value, str):
            raise ValueError(f"{value} is a name")
        return value

    def _quoted(self) -> str | None:
        match = self.find(self._string)
        if match is None:
            return None
        return _unescape(match[0][1:-1]) if self._is_python else match[1]

    def _items(self, read: Callable[[], Any], close: str) -> list[Any]:
        items: list[Any] = []
        while not self.find(close):
            if items:
                self.take(",")
                if self.find(close):
                    break
            items.append(read())
        return items


def _unescape(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if code[1:] else _ESCAPED.get(code, code)

    whole = _ESCAPE.sub(character, text)
    return whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs become one


def _read_gemma(form: Format, inside: str, functions: Mapping[str, Schema | None]) -> list[Call]:
    text = _Text(inside, form.quote)
    text.take("call:")
    name = text.take(re.compile(r"[\w./-]+"))
    text.take("{")
    call = name, text.pairs(":", "}")
    if not text.at_end:
        raise ValueError("more than a call")
    return [call]


def _read_python(form: Format, inside: str, functions: Mapping[str, Schema | None]) -> list[Call]:
    text, calls = _Text(inside, ""), []
    while not text.at_end:
        name = text.take(NAME)
        text.take("(")
        calls.append((name, text.pairs("=", ")")))
        text.find(",")
    return calls


_READERS: dict[str, Callable[..., list[Call]]] = {
    "parameters": _tagged(_FUNCTION, _PARAMETER),
    "pairs": _tagged(_PAIRS, _PAIR),
    "gemma": _read_gemma,
    "python": _read_python,
}
