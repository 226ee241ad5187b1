"""The rows of a microbatch: sequences that begin alike go through the model once as far as they do.

The answers to one prompt, and the two of a pair, differ from where they are trained. What comes
before is a part of its own, whose keys the others read (in the forward by their page tables, in the
backward as `attention_backward` says), and whose gradient is the sum of theirs:

    sequences    P P P P a a a      rows    P P P P | a a a | b b
                 P P P P b b

Pages are read whole, so parts end where pages do; what is left of a prompt goes with each answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Head(NamedTuple):
    """The tokens that a sequence may share with others: how many, and what they have to be."""

    length: int
    key: bytes


class Part(NamedTuple):
    """Tokens [start, stop) of a sequence, in the rows of a microbatch from `row` on.

    sequence: its number. shared: the number of the part with the tokens before `start`, in the rows
    from `shared_row` on; None and `row` if there are none.
    """

    sequence: int
    start: int
    stop: int
    row: int
    shared: int | None
    shared_row: int

    def __len__(self) -> int:
        return self.stop - self.start


def head_of(token: np.ndarray, label: np.ndarray, silent: np.ndarray, page: int) -> Head | None:
    """What a sequence may share: whole pages of tokens without a part in the loss, but never its
    last token. token, label: int32 [n]. silent: bool [n], which tokens have no part in it. page:
    tokens of one; 0: nothing is shared."""
    if not page or len(token) <= page or not silent[:page].all():
        return None
    most = len(token) - 1 if silent.all() else min(int(silent.argmin()), len(token) - 1)
    length = most // page * page
    return Head(length, np.stack([token[:length], label[:length]]).tobytes())


def lay_out(lengths: Sequence[int], heads: Iterable[Head | None]) -> tuple[Part, ...]:
    """The parts of sequences of these lengths, in the order of their rows: a head that several have
    lies before all of them, at the place of the first."""
    groups: dict[Head | int, list[int]] = {}
    for number, head in enumerate(heads):
        groups.setdefault(head or number, []).append(number)
    parts: list[Part] = []
    row = 0

    def add(sequence: int, start: int, stop: int, shared: int | None, shared_row: int) -> None:
        nonlocal row
        parts.append(Part(sequence, start, stop, row, shared, shared_row))
        row += stop - start

    for head, members in groups.items():
        if isinstance(head, int) or len(members) == 1:
            add(members[0], 0, lengths[members[0]], None, row)
            continue
        before, first_row = len(parts), row
        add(members[0], 0, head.length, None, row)
        for number in members:
            add(number, head.length, lengths[number], before, first_row)
    return tuple(parts)
