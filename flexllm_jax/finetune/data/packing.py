"""Packing a batch's sequences into microbatches, so that few token slots stay empty.

Packed sequences stay apart (own positions, own pages, own causal attention), so packing changes
nothing but speed.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import TypeVar

Row = TypeVar("Row", bound=Sized)


def pack(
    rows: Sequence[Row],
    max_tokens: int,
    target: int | None = None,
    most_rows: int | None = None,
) -> list[list[Row]]:
    """First fit in the given order: each row, a sequence or a pair, goes to the first microbatch
    with room for it.

    No microbatch has more than `target` tokens (default `max_tokens`), unless a row alone has, or
    more than `most_rows` rows. ValueError for a row that has more than `max_tokens`.
    """
    target = max_tokens if target is None else target
    microbatches: list[list[Row]] = []
    room: list[int] = []
    for row in rows:
        tokens = len(row)
        if tokens > max_tokens:
            raise ValueError(
                f"a row of {tokens} tokens does not fit a microbatch of {max_tokens}; "
                "lower max_seq_len or raise finetune.max_tokens"
            )
        fits = (i for i, free in enumerate(room) if free >= tokens)
        index = next((i for i in fits if len(microbatches[i]) != most_rows), len(room))
        if index == len(room):
            microbatches.append([])
            room.append(target)
        microbatches[index].append(row)
        room[index] -= tokens
    return microbatches
