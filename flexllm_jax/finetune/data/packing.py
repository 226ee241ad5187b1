"""Packing a batch's sequences into microbatches, so that few token slots stay empty.

Packed sequences stay apart (own positions, own causal attention), so packing changes nothing but
speed. Those that begin alike share what they can (`layout`), and take less room together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import TypeVar

from flexllm_jax.finetune.layout import Head

Row = TypeVar("Row", bound=Sized)


def pack(
    rows: Sequence[Row],
    max_tokens: int,
    target: int | None = None,
    most_rows: int | None = None,
    heads: Callable[[Row], Sequence[Head | None]] = lambda row: (),
) -> list[list[Row]]:
    """First fit in the given order: each row, a sequence or a pair, goes to the first microbatch
    with room for it.

    No microbatch has more than `target` tokens (default `max_tokens`), unless a row alone has, or
    more than `most_rows` rows. heads: what the sequences of a row may share. ValueError for a row
    that has more than `max_tokens`.
    """
    target = max_tokens if target is None else target
    microbatches: list[list[Row]] = []
    room: list[int] = []
    begun: list[set[bytes]] = []  # the heads that are there
    for row in rows:
        tokens, own = len(row), [head for head in heads(row) if head]
        if tokens > max_tokens:
            raise ValueError(
                f"a row of {tokens} tokens does not fit a microbatch of {max_tokens}; "
                "lower max_seq_len or raise finetune.max_tokens"
            )
        fits = (i for i, free in enumerate(room) if free >= tokens - _shared(own, begun[i]))
        index = next((i for i in fits if len(microbatches[i]) != most_rows), len(room))
        if index == len(room):
            microbatches.append([])
            room.append(target)
            begun.append(set())
        microbatches[index].append(row)
        room[index] -= tokens - _shared(own, begun[index])
        begun[index].update(head.key for head in own)
    return microbatches


def _shared(heads: Sequence[Head], begun: set[bytes]) -> int:
    """Tokens of a row's sequences that are there, or come with its first."""
    there = [head.key in begun or head in heads[:i] for i, head in enumerate(heads)]
    return sum(head.length for head, known in zip(heads, there, strict=True) if known)
