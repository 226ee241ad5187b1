"""The lines of a batch's input, and those of its results."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_LINES = 50_000  # as at OpenAI
_MOST_ERRORS = 100  # that are told
_LONGEST_ID = 512


@dataclass(frozen=True)
class Line:
    """A request of a batch."""

    custom_id: str
    body: dict[str, Any]


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that are not empty."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, text


def read_line(text: str, endpoint: str) -> Line:
    """A request. ValueError, saying why, for what is none."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(told, dict):
        raise ValueError("must be an object")
    name, body = told.get("custom_id"), told.get("body")
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_ID:
        raise ValueError(f"custom_id must be a text of 1 to {_LONGEST_ID} characters")
    if told.get("method") != "POST":
        raise ValueError(f"method: got {told.get('method')!r}; must be POST")
    if told.get("url") != endpoint:
        raise ValueError(f"url: got {told.get('url')!r}; must be the batch's endpoint {endpoint}")
    if not isinstance(body, dict):
        raise ValueError("body must be an object")
    if body.get("stream"):
        raise ValueError("body.stream: a batch has no streams; leave it out")
    return Line(name, body)


def check_lines(path: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """How many requests a file has, and the first things that are wrong with it, as OpenAI tells
    them."""
    count, errors, names = 0, [], set()

    def wrong(code: str, message: str, number: int | None) -> None:
        errors.append({"code": code, "message": message, "line": number, "param": None})

    for number, text in read_lines(path):
        count += 1
        if count > MOST_LINES:
            wrong("too_many_requests", f"the file has more than {MOST_LINES} requests", number)
            break
        try:
            line = read_line(text, endpoint)
        except ValueError as error:
            wrong("invalid_request", f"line {number}: {error}", number)
        else:
            if line.custom_id in names:
                message = f"line {number}: custom_id {line.custom_id!r} is another line's, too"
                wrong("duplicate_custom_id", message, number)
            names.add(line.custom_id)
        if len(errors) >= _MOST_ERRORS:
            break
    if not count:
        wrong("empty_file", "the file has no requests", None)
    return count, errors


def result(custom_id: str, status: int, body: Any) -> dict[str, Any]:
    """A line of an output: what a request was answered."""
    answer = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
    return _line(custom_id, answer, None)


def no_result(custom_id: str, code: str, message: str) -> dict[str, Any]:
    """A line of an error file: why a request was not answered."""
    return _line(custom_id, None, {"code": code, "message": message})


def _line(custom_id: str, response: Any, error: Any) -> dict[str, Any]:
    name = f"batch_req_{secrets.token_hex(12)}"
    return {"id": name, "custom_id": custom_id, "response": response, "error": error}


class ResultFile:
    """Lines that are kept one after the other; a process that is killed loses none that was
    written, and half of one at most is dropped."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        size = 0
        self.names: set[str] = set()
        with path.open("rb") as file:
            for text in file:
                if not text.endswith(b"\n"):
                    break
                size += len(text)
                self.names.add(json.loads(text)["custom_id"])
        os.truncate(path, size)

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Keep lines: they are on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self.names.update(line["custom_id"] for line in lines)
