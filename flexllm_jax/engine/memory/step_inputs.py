"""What a step's forward program takes from the host, and its one-array form.

Everything the host tells the forward program about a step travels as a single int32 vector: one
transfer a step. A `StepShape` is a bucket, and `StepInputs` names the vector's parts: views that
the host fills, or slices on the device. Page tables, which would be most of it, stay on the device,
and only pages that are new in a table are sent (`page_writes`).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

# Entries of page tables that a program writes at once.
PAGE_WRITES = 1024


def page_writes(
    new: Iterable[tuple[int, int, Sequence[int]]], shape: tuple[int, int]
) -> Iterator[Int[np.ndarray, "2 W"]]:
    """Where in page tables of this shape [rows, columns] pages go, as flat places, and the pages;
    `PAGE_WRITES` at once, of which padding lies past the end. No two places are the same.

    new: row, first column and pages of what is written.
    """
    entries = {
        row * shape[1] + first + i: page
        for row, first, pages in new
        for i, page in enumerate(pages)
    }
    past = math.prod(shape)
    for at in range(0, len(entries), PAGE_WRITES):
        own = list(entries.items())[at : at + PAGE_WRITES]
        packed = np.zeros((2, PAGE_WRITES), np.int32)
        packed[0] = np.arange(past, past + PAGE_WRITES)
        packed[:, : len(own)] = np.array(own, np.int32).T
        yield packed


@dataclass(frozen=True)
class StepShape:
    """Sizes of a bucket: token slots, sequences (inference and packed finetuning), sampled rows."""

    tokens: int
    sequences: int
    samples: int

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every field of the inputs, in the order of the vector."""
        return {
            "token": (self.tokens,),
            "position": (self.tokens,),
            "kv_slot": (self.tokens,),
            "adapter": (self.tokens,),
            "saved_row": (self.tokens,),
            "query_starts": (self.sequences + 1,),
            "kv_lengths": (self.sequences,),
            "table": (self.sequences,),
            "sample": (self.samples,),
            "num_decode": (),
            "num_sequences": (),
            "unfinished": (2,),
        }

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Where every field lies in the vector."""
        ends = list(itertools.accumulate(math.prod(shape) for shape in self.shapes.values()))
        return {n: slice(a, b) for n, a, b in zip(self.shapes, [0, *ends], ends, strict=False)}

    @property
    def size(self) -> int:
        """Length of the packed vector."""
        return max(part.stop for part in self.parts.values())


@dataclass
class StepInputs:
    """A step's tokens; arrays of numpy on the host, of JAX inside a program; all int32.

    token: id, or -1 - row: the newest token of that request row, which only the device knows.
    kv_slot: page * page_size + offset where the token's key goes, past the pages for padding.
    adapter: row of the bank, -1 for none. saved_row: the finetuning slot of a token, past the end
    for others. No two tokens have the same kv_slot or saved_row, not even in padding, so that XLA
    writes them with plain stores and not with compare-and-swap. table: the row of the page tables
    that a sequence has. sample: the tokens whose outputs are sampled. unfinished: which of the two
    slots holds the state of the finetuning sequence that an earlier step began, and which takes
    that of the last one here. The rest is as `ragged_paged_attention` takes it.
    """

    token: Any
    position: Any
    kv_slot: Any
    adapter: Any
    saved_row: Any
    query_starts: Any
    kv_lengths: Any
    table: Any
    sample: Any
    num_decode: Any
    num_sequences: Any
    unfinished: Any

    @classmethod
    def cut(cls, vector, shape: StepShape) -> "StepInputs":
        """The fields of a packed vector; views of it when it is a numpy array."""
        shapes = shape.shapes
        return cls(**{n: vector[part].reshape(shapes[n]) for n, part in shape.parts.items()})

    @classmethod
    def empty(
        cls, shape: StepShape, kv_slots: int, saved_rows: int
    ) -> tuple["StepInputs", np.ndarray]:
        """Inputs of padding to be filled on the host, and the vector that their fields are views
        of.

        kv_slots, saved_rows: how many there are; padding has those that come after.
        """
        vector = np.zeros(shape.size, np.int32)
        inputs = cls.cut(vector, shape)
        inputs.kv_slot[:] = np.arange(kv_slots, kv_slots + shape.tokens)
        inputs.adapter[:] = -1
        inputs.saved_row[:] = np.arange(saved_rows, saved_rows + shape.tokens)
        return inputs, vector
