"""Regular expressions of adapters, matched with the paths of modules.

PEFT matches them with Python's `re`, which can take for ever, and no other thread runs meanwhile.
So it is done in a process with limits, which keeps PEFT's meaning to the letter; unless all are
plain names, which take no time.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from flexllm_jax.peft import pattern_process
from flexllm_jax.peft.adapter import AdapterError
from flexllm_jax.peft.pattern_process import find_all

CPU_S = 1.0  # of all expressions of an adapter; what people write takes milliseconds
_WALL_S = 30.0
_MEMORY_MB = 512

_PLAIN = re.compile(r"[\w.-]*")


class Expression(NamedTuple):
    """A regular expression that must match a whole path, or what it starts with: `given` by an
    adapter, between what PEFT puts `before` and `after` it."""

    how: Literal["whole", "start"]
    given: str
    before: str = ""
    after: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.before}{self.given}{self.after}"


Matches = Mapping[str, Mapping[str, str]]  # the groups, by the paths that match


def match_paths(
    expressions: Sequence[Expression], paths: Sequence[str]
) -> dict[Expression, Matches]:
    """What each of `expressions` matches. AdapterError for one that is none, or takes too long."""
    for expression in expressions:
        if not isinstance(expression.given, str):
            raise AdapterError(f"{expression.given!r} must be text: a regular expression")
    asked = [(expression.how, expression.text) for expression in expressions]
    if all(_PLAIN.fullmatch(expression.given) for expression in expressions):
        found = find_all(asked, paths)
    else:
        found = _find_all_in_process(expressions, asked, paths)
    return {
        expression: {p: groups for p, groups in zip(paths, each, strict=True) if groups is not None}
        for expression, each in zip(expressions, found, strict=True)
    }


def _find_all_in_process(
    expressions: Sequence[Expression], asked: Sequence[tuple[str, str]], paths: Sequence[str]
) -> Any:
    given = {"expressions": asked, "paths": paths, "cpu_s": CPU_S, "memory_mb": _MEMORY_MB}
    command = [sys.executable, "-I", "-S", pattern_process.__file__]
    try:
        ended = subprocess.run(
            command, input=json.dumps(given), capture_output=True, text=True, timeout=_WALL_S
        )
    except subprocess.TimeoutExpired:
        raise AdapterError(_too_long(expressions)) from None
    if ended.returncode < 0:
        raise AdapterError(_too_long(expressions))
    told = json.loads(ended.stdout)
    if "error" in told:
        raise AdapterError(f"{told['expression']!r} is no regular expression: {told['error']}")
    return told["found"]


def _too_long(expressions: Sequence[Expression]) -> str:
    some = " or ".join(repr(expression.given) for expression in expressions[:3])
    return f"matching {some} with modules takes over {CPU_S:.0f} s: give a list of names instead"
