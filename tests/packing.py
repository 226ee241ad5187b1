"""A microbatch as the engine's programs take it, for tests that run them without an engine."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.engine.memory.step_inputs import StepInputs
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch


class Packed(NamedTuple):
    """A microbatch, its table, and the inputs of the steps that bring it forward."""

    batch: PackedMicrobatch
    table: jax.Array
    vectors: list[np.ndarray]
    page_tables: np.ndarray


def pack(
    sizes: EngineSizes,
    num_pages: int,
    tokens: Sequence[np.ndarray],
    pages: Sequence[Sequence[int]],
    steps: Sequence[Sequence[tuple[int, int, int]]],
) -> Packed:
    """Sequences of tokens, each in its own pages; every step has pieces of them, each a sequence
    and from where to where, in the smallest bucket; all wear the adapter in row 0."""
    page, (bucket, shape) = sizes.page_size, min(sizes.step_shapes.items())
    lengths = [len(own) for own in tokens]
    starts = np.cumsum([0, *lengths])
    position = np.concatenate([np.arange(n) for n in lengths])
    kv_slot = np.concatenate(
        [
            np.asarray(own)[np.arange(n) // page] * page + np.arange(n) % page
            for own, n in zip(pages, lengths, strict=True)
        ]
    )
    batch = PackedMicrobatch(
        tuple(Datum.following(own, np.ones(len(own), np.float32)) for own in tokens), Loss.of()
    )
    flat, vectors = np.concatenate(tokens), []
    for pieces in steps:
        inputs, vector = StepInputs.empty(shape, num_pages * page, sizes.finetune_slots)
        at = 0
        for s, (which, first, last) in enumerate(pieces):
            rows = starts[which] + np.arange(first, last)
            where = slice(at, at + last - first)
            inputs.token[where], inputs.position[where] = flat[rows], position[rows]
            inputs.kv_slot[where], inputs.saved_row[where] = kv_slot[rows], rows
            inputs.adapter[where] = 0
            inputs.kv_lengths[s] = last
            inputs.table[s] = which
            at += last - first
            inputs.query_starts[s + 1 :] = at
        assert at <= bucket
        inputs.num_sequences[...] = len(pieces)
        vectors.append(vector)
    page_tables = np.zeros(sizes.request_arrays["page_tables"].shape, np.int32)
    for row, own in enumerate(pages):
        page_tables[row, : len(own)] = own
    table = jnp.asarray(batch.table(sizes.finetune_slots, 0, kv_slot))
    return Packed(batch, table, vectors, page_tables)
