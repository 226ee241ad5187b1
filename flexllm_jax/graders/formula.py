"""The formula of a multi grader: numbers, names, + - * / ^ and a few functions.

`^` is a power, binds tighter than a sign and groups to the right: -2^2 is -4, 2^3^2 is 2^9. The
text is read by this grammar alone, never by Python:

    sum     = product { ("+" | "-") product }
    product = signed { ("*" | "/") signed }
    signed  = { "+" | "-" } power
    power   = atom [ "^" signed ]
    atom    = number | name | function "(" sum { "," sum } ")" | "(" sum ")"

All numbers are 64-bit floats, so that a power takes no longer than a sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from flexllm_jax.errors import UserError
from flexllm_jax.graders.grade import GradingError

_MOST_TOKENS = 500
_MOST_DEPTH = 50
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<sign>[-+*/^(),]))",
    re.ASCII,
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": lambda x: float(math.ceil(x)),
    "exp": math.exp,
    "floor": lambda x: float(math.floor(x)),
    "log": math.log,  # the natural one
    "max": max,
    "min": min,
    "sqrt": math.sqrt,
}
_OF_MANY = ("max", "min")
_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": math.pow,
}

_Node = Callable[[Mapping[str, float]], float]


class Formula:
    """A formula of `names`. Raises UserError for one that cannot be read; `field` opens the
    message."""

    def __init__(self, text: str, names: frozenset[str], field: str):
        reader = _Reader(text, names, field)
        self._value, self.reads, self._field = reader.whole(), frozenset(reader.used), field

    def value(self, values: Mapping[str, float]) -> float:
        """What it is. Raises GradingError where it is no finite number."""
        try:
            result = self._value(values)
            reason = f"it is {result}"
        except (ArithmeticError, ValueError) as error:
            result, reason = math.nan, str(error)
        if math.isfinite(result):
            return result
        given = ", ".join(f"{name} = {values[name]:g}" for name in sorted(self.reads))
        message = f"{self._field}: {reason}, where {given or 'it has no variables'}"
        raise GradingError("formula_parse_error", f"{message}; keep it finite, with max or min")


class _Reader:
    """Reads a formula from its first token to its last."""

    def __init__(self, text: str, names: frozenset[str], field: str):
        self._names, self._field = names, field
        self._tokens: list[tuple[str, str]] = []
        self._at = self._depth = 0
        self.used: set[str] = set()
        place, text = 0, text.rstrip()
        while place < len(text):
            if (match := _TOKEN.match(text, place)) is None:
                rest = text[place:].strip()
                raise self._error(f"{rest[:20]!r} is not known; it has + - * / ^ ( ) , and names")
            self._tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            place = match.end()
        if len(self._tokens) > _MOST_TOKENS:
            raise self._error(f"it has {len(self._tokens)} parts; it may have {_MOST_TOKENS}")

    def whole(self) -> _Node:
        value = self._sum()
        if self._at < len(self._tokens):
            raise self._error(f"{self._tokens[self._at][1]!r} stands where an operator should")
        return value

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self._field}: {reason}")

    def _next(self, *signs: str) -> str | None:
        """The next token, if it is one of these."""
        if self._at < len(self._tokens) and self._tokens[self._at] in {("sign", s) for s in signs}:
            self._at += 1
            return self._tokens[self._at - 1][1]
        return None

    def _sum(self) -> _Node:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise self._error(f"it is nested deeper than {_MOST_DEPTH}; make it flatter")
        left = self._product()
        while sign := self._next("+", "-"):
            left = _apply(sign, left, self._product())
        self._depth -= 1
        return left

    def _product(self) -> _Node:
        left = self._signed()
        while sign := self._next("*", "/"):
            left = _apply(sign, left, self._signed())
        return left

    def _signed(self) -> _Node:
        negative = False
        while sign := self._next("+", "-"):
            negative ^= sign == "-"
        value = self._power()
        return (lambda values: -value(values)) if negative else value

    def _power(self) -> _Node:
        base = self._atom()
        if not self._next("^"):
            return base
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise self._error(f"it is nested deeper than {_MOST_DEPTH}; make it flatter")
        value = _apply("^", base, self._signed())
        self._depth -= 1
        return value

    def _atom(self) -> _Node:
        if self._next("("):
            value = self._sum()
            self._close()
            return value
        if self._at == len(self._tokens):
            raise self._error("it ends where a number or a name should stand")
        kind, text = self._tokens[self._at]
        self._at += 1
        if kind == "number":
            number = float(text)
            return lambda values: number
        if kind == "name" and self._next("("):
            return self._call(text)
        if kind == "name" and text in self._names:
            self.used.add(text)
            return lambda values: values[text]
        known = ", ".join(sorted(self._names))
        if kind == "name":
            raise self._error(f"there is no grader {text[:64]!r}; there are {known[:300]}")
        raise self._error(f"{text!r} stands where a number or a name should")

    def _call(self, name: str) -> _Node:
        if (function := _FUNCTIONS.get(name)) is None:
            raise self._error(f"no function {name[:64]!r}; there are {', '.join(_FUNCTIONS)}")
        arguments = [self._sum()]
        while self._next(","):
            arguments.append(self._sum())
        self._close()
        if name not in _OF_MANY and len(arguments) > 1:
            raise self._error(f"{name} is of one number, and {len(arguments)} are given")
        if len(arguments) == 1 and name in _OF_MANY:
            return arguments[0]
        return lambda values: function(*[argument(values) for argument in arguments])

    def _close(self) -> None:
        if not self._next(")"):
            raise self._error("a ( is not closed; add )")


def _apply(sign: str, left: _Node, right: _Node) -> _Node:
    operator = _OPERATORS[sign]
    return lambda values: operator(left(values), right(values))
