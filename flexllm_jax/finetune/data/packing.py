"""Packing a batch's sequences into microbatches, so that few token slots stay empty.

Packed sequences stay apart (own positions, own pages, own causal attention), so packing changes
nothing but speed.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexllm_jax.finetune.data.formats import TrainingSequence


def pack(
    sequences: Sequence[TrainingSequence], max_tokens: int, target: int | None = None
) -> list[list[TrainingSequence]]:
    """First fit in the given order: each sequence goes to the first microbatch with room for it.

    No microbatch has more than `target` tokens (default `max_tokens`), unless a sequence alone has.
    ValueError for one that has more than `max_tokens`.
    """
    target = max_tokens if target is None else target
    microbatches: list[list[TrainingSequence]] = []
    room: list[int] = []
    for sequence in sequences:
        tokens = len(sequence)
        if tokens > max_tokens:
            raise ValueError(
                f"a sequence of {tokens} tokens does not fit a microbatch of {max_tokens}; "
                "lower max_seq_len or raise finetune.max_tokens"
            )
        index = next((i for i, free in enumerate(room) if free >= tokens), len(room))
        if index == len(room):
            microbatches.append([])
            room.append(target)
        microbatches[index].append(sequence)
        room[index] -= tokens
    return microbatches
