"""Texts of a grader with `{{ item.x }}` and `{{ sample.output_text }}` in them.

They are clients' texts. Jinja reads them; nothing of them is run: a template is a list of texts and
of paths into the row and the sample, and what else Jinja knows (loops, calls, filters) is refused.
So rendering takes as long as its result is long, and that is bounded. A path leads through objects
and arrays of JSON only: `item.items` is the row's field of that name, not a method.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexllm_jax.errors import UserError
from flexllm_jax.graders.grade import GradingError, Sample, SampleError

MOST_CHARACTERS = 2**20  # of a rendered text
_MOST_STEPS = 32  # of a path
_OF_SAMPLE = ("output_text", "output_json", "output_tools", "choices")
_REMEDY = "write {{ item.x }} or {{ sample.output_text }}"


class _Path(NamedTuple):
    root: str
    keys: tuple[str | int, ...]

    def __str__(self) -> str:
        steps = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.keys)
        return self.root + "".join(steps)


class Template:
    """A text with places that a sample and its row fill in. Raises UserError for one that cannot
    be: `field` is what it is called in that message."""

    def __init__(self, source: str, field: str):
        self.field = field
        self._pieces = tuple(_parse(source, field))

    @property
    def reads(self) -> frozenset[str]:
        """The fields of a row that it needs."""
        paths = (piece for piece in self._pieces if isinstance(piece, _Path))
        return frozenset(str(p.keys[0]) for p in paths if p.root == "item")

    def render(self, sample: Sample) -> str:
        """The text for a sample. Raises GradingError where a row lacks a field, SampleError where
        the sample is not JSON or has no such field."""
        texts, length = [], 0
        for piece in self._pieces:
            text = self._fill(piece, sample) if isinstance(piece, _Path) else piece
            length += len(text)
            if length > MOST_CHARACTERS:
                reason = f"with what it names it has over {MOST_CHARACTERS:,} characters"
                raise GradingError("other_error", f"{self.field}: {reason}; name less in it")
            texts.append(text)
        return "".join(texts)

    def _fill(self, path: _Path, sample: Sample) -> str:
        try:
            return _text(self._look_up(path, sample))
        except (TypeError, ValueError, RecursionError) as error:
            reason = (
                f"{{{{ {path} }}}} cannot be written as JSON: {' '.join(str(error).split())[:100]}"
            )
            raise GradingError("invalid_variable_error", f"{self.field}: {reason}") from None

    def _look_up(self, path: _Path, sample: Sample) -> Any:
        if path.root == "item":
            value: Any = sample.item
        elif path.keys[0] == "output_json":
            value = {"output_json": sample.output_json}
        else:
            value = sample.variables()
        for index, key in enumerate(path.keys):
            if not _has(value, key):
                raise self._missing(path, index, value)
            value = value[key]
        return value

    def _missing(self, path: _Path, index: int, value: Any) -> GradingError:
        parent = str(_Path(path.root, path.keys[:index]))
        if isinstance(value, Mapping):
            known = " ".join(", ".join(list(value)[:20]).split()) or "nothing"
            reason = f"{parent} has no field {path.keys[index]!r}; it has {known[:200]}"
        elif isinstance(value, list):
            reason = f"{parent} is an array of {len(value)} and has no {path.keys[index]!r}"
        else:
            reason = f"{parent} is {str(value)[:50]!r}, neither an object nor an array"
        message = f"{self.field}: {{{{ {path} }}}}: {reason}"
        if path.root == "sample":
            return SampleError(message)
        return GradingError("invalid_variable_error", message)


def _parse(source: str, field: str) -> Iterator[str | _Path]:
    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True)
    try:
        body = environment.parse(source).body
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {' '.join(str(error.message).split())[:200]}"
        raise UserError(f"{field}: not a template, {reason}; {_REMEDY}") from None
    except ValueError as error:  # of a number of thousands of digits
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{field}: not a template, {reason}; {_REMEDY}") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{field}: its expressions are nested too deep; {_REMEDY}") from None
    for statement in body:
        if not isinstance(statement, nodes.Output):
            raise UserError(f"{field}: {_name(statement)} is not for graders; {_REMEDY}")
        for node in statement.nodes:
            yield node.data if isinstance(node, nodes.TemplateData) else _path(node, field)


def _path(node: nodes.Expr, field: str) -> _Path:
    keys: list[str | int] = []
    while isinstance(node, (nodes.Getattr, nodes.Getitem)):
        if isinstance(node, nodes.Getattr):
            keys.append(node.attr)
        elif isinstance(node.arg, nodes.Const) and type(node.arg.value) in (int, str):
            keys.append(node.arg.value)
        else:
            raise UserError(f"{field}: {_name(node.arg)} in [ ] is not for graders; {_REMEDY}")
        node = node.node
    if not isinstance(node, nodes.Name):
        raise UserError(f"{field}: {_name(node)} is not for graders; {_REMEDY}")
    path = _Path(node.name, tuple(reversed(keys)))
    if path.root not in ("item", "sample"):
        raise UserError(
            f"{field}: {{{{ {str(path)[:80]} }}}}: there is no {path.root!r}; {_REMEDY}"
        )
    if len(keys) > _MOST_STEPS:
        raise UserError(f"{field}: a path of {len(keys)} steps; it may have {_MOST_STEPS}")
    if not keys or not isinstance(path.keys[0], str):
        raise UserError(f"{field}: {{{{ {str(path)[:80]} }}}} names no field; {_REMEDY}")
    if path.root == "sample" and path.keys[0] not in _OF_SAMPLE:
        known = ", ".join(_OF_SAMPLE)
        raise UserError(f"{field}: {{{{ {str(path)[:80]} }}}}: a sample has {known}")
    return path


def _has(value: Any, key: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(key, int) and key < len(value)
    return isinstance(value, Mapping) and key in value


def _name(node: nodes.Node) -> str:
    """What an element of Jinja is called, such as `a call` or `for`."""
    word = type(node).__name__.lower()
    return f"Jinja's {word!r}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
