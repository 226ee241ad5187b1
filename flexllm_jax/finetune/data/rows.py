"""Rows of a dataset file, JSONL or one JSON array, each with the line that holds it.

A row that cannot be read is yielded as a `BadRow` with its reason: one broken line never hides the
others. Only a file that cannot be read at all is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllm_jax.errors import UserError


class DatasetError(UserError):
    """A dataset file cannot be used at all. The message is one line naming the file."""


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be used."""

    reason: str


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield (line, row) in file order, line counted from 1; of a JSON array, the item's number.

    A JSONL file is read line by line and never held whole. Raises DatasetError: missing, a folder,
    unreadable, or a JSON array that does not parse.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            if head.startswith(b"["):
                yield from _array(path, file.read())
            else:
                yield from _lines(file)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; give a JSONL or JSON file of rows") from None
    except IsADirectoryError:
        raise DatasetError(f"{path}: is a folder; give a JSONL or JSON file of rows") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(file: Any) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
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


def _array(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}:{error.lineno}:{error.colno}: not a JSON array of rows: {error.msg.lower()}; "
            "as JSONL (one row a line) single broken rows can be skipped"
        ) from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (RecursionError, ValueError):
        raise DatasetError(f"{path}: not a JSON array that can be read") from None
    for number, row in enumerate(rows, start=1):
        yield number, _checked(row)


def _checked(row: Any) -> dict[str, Any] | BadRow:
    if not isinstance(row, dict):
        return BadRow(f"a {type(row).__name__} instead of an object with fields")
    return row
