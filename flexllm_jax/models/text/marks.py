"""Marks in a text that comes in pieces."""

from __future__ import annotations


def overlap(text: str, mark: str) -> int:
    """Characters at the end of `text` that `mark` may begin with."""
    lengths = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((n for n in lengths if mark.startswith(text[-n:])), 0)
