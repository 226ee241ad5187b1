"""Rows of a dataset file, JSONL or one JSON array, each with the line that holds it.

A row that cannot be read is yielded as a `BadRow` with its reason: one broken line never hides the
others. Only a file that cannot be read at all is an error. Files are never held whole, and neither
are rows beyond `MOST_ROW_BYTES`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllm_jax.errors import UserError

MOST_ROW_BYTES = 8 * 2**20  # as many as a request has, at most; of characters in an array
_READ = 2**20
_AFTER = tuple(", ]\t\n\r")  # an item
_SPACE = re.compile(r"[ \t\n\r]*")


class DatasetError(UserError):
    """A dataset file cannot be used at all. The message is one line naming the file."""


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be used."""

    reason: str


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield (line, row) in file order, line counted from 1; of a JSON array, the item's number.

    Raises DatasetError: missing, a folder, unreadable, or a JSON array that does not parse.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            if head.startswith(b"["):
                yield from _array(path, file)
            else:
                yield from _lines(file)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; give a JSONL or JSON file of rows") from None
    except IsADirectoryError:
        raise DatasetError(f"{path}: is a folder; give a JSONL or JSON file of rows") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(file: Any) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    number = 0
    while line := file.readline(MOST_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > MOST_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_READ)
            yield number, BadRow(f"longer than {MOST_ROW_BYTES} bytes")
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield number, BadRow("not UTF-8")
        except json.JSONDecodeError as error:
            yield number, BadRow(f"not JSON ({error.msg.lower()} at column {error.colno})")
        except (RecursionError, ValueError):
            yield number, BadRow("not JSON that can be read (nesting or a number without end)")
        else:
            yield number, _checked(row)


def _array(path: Path, file: Any) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    text = _ArrayText(file)
    try:
        for number, row in enumerate(text.items(), start=1):
            yield number, _checked(row)
    except json.JSONDecodeError as error:
        line, column = text.place(error.pos)
        raise DatasetError(
            f"{path}:{line}:{column}: not a JSON array of rows: {error.msg.lower()}; "
            "as JSONL (one row a line) single broken rows can be skipped"
        ) from None
    except UnicodeDecodeError:
        raise DatasetError(f"{path}: not UTF-8") from None
    except (RecursionError, ValueError):
        raise DatasetError(f"{path}: not a JSON array that can be read") from None


class _ArrayText:
    """The text of a JSON array, of which a part is held, from the item being read on."""

    def __init__(self, file: Any):
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self._held, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 1  # where what is held begins
        self._decoder = json.JSONDecoder()

    def place(self, at: int) -> tuple[int, int]:
        """Line and column of a character of what is held."""
        lines, last = self._held.count("\n", 0, at), self._held.rfind("\n", 0, at)
        return self._line + lines, at - last if lines else self._column + at

    def items(self) -> Iterator[Any]:
        """The array's items. JSONDecodeError where it is none."""
        self._take("[")
        if self._next() != "]":
            yield self._value()
            while self._next() == ",":
                self._at += 1
                self._next()
                yield self._value()
        self._take("]")
        if self._next():
            raise json.JSONDecodeError("Extra data", self._held, self._at)

    def _next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            match = _SPACE.match(self._held, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._held) or self._ended:
                return self._held[self._at : self._at + 1]
            self._read(_READ)

    def _take(self, mark: str) -> None:
        if self._next() != mark:
            raise json.JSONDecodeError(f"Expecting '{mark}' delimiter", self._held, self._at)
        self._at += 1

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
                # A number may go on.
                whole = self._ended or self._held[end : end + 1] in _AFTER
            except json.JSONDecodeError:
                if self._ended:
                    raise
                value, end, whole = None, 0, False
            if whole:
                self._at = end
                return value
            length = len(self._held) - self._at
            if length > MOST_ROW_BYTES:
                message = f"Broken, or longer than {MOST_ROW_BYTES} characters"
                raise json.JSONDecodeError(message, self._held, self._at)
            self._read(max(_READ, length))

    def _read(self, count: int) -> None:
        more = self._file.read(count)
        self._line, self._column = self.place(self._at)
        self._held, self._at, self._ended = self._held[self._at :] + more, 0, not more


def _checked(row: Any) -> dict[str, Any] | BadRow:
    if not isinstance(row, dict):
        return BadRow(f"a {type(row).__name__} instead of an object with fields")
    return row
