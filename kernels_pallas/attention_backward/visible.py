"""Which keys the queries of a slice see (`base.attention_backward`), and what blocks of them there
are to walk, for every backend alike."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import or_
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.layer_options import AttentionOptions

# Where the sequence of a row that is padding starts: after every key.
NEVER = jnp.iinfo(jnp.int32).max


class Visible(NamedTuple):
    """The keys from `first` up to `token`, the query's own, without the gap [gap_first, gap_end):
    what lies between the tokens that it shares and its own sequence. A gap may be empty, and one
    that a window has left behind lies before `first`. int32 of any shape.

    Of a prompt in rows 2 and 3 and an answer in rows 8 and 9, row 9 has first = 2, gap_first = 4,
    gap_end = 8, token = 9.
    """

    first: jax.Array
    gap_first: jax.Array
    gap_end: jax.Array
    token: jax.Array

    @classmethod
    def of(
        cls,
        token: jax.Array,
        starts: jax.Array,
        shared: Sequence[jax.Array],
        options: AttentionOptions,
    ) -> "Visible":
        """Those of queries in the rows `token`."""
        return cls(options.first_keys(starts, token, shared), shared[1], starts, token)

    @classmethod
    def join(cls, sees: Iterable[jax.Array], token: jax.Array) -> "Visible":
        """Of the first three and the last."""
        first, gap_first, gap_end = sees
        return cls(first, gap_first, gap_end, token)

    def expand(self, axis: int) -> "Visible":
        """With one more axis, of size 1."""
        return Visible(*(jnp.expand_dims(x, axis) for x in self))

    @property
    def own_first(self) -> jax.Array:
        """The first key behind the gap."""
        return jnp.maximum(self.first, self.gap_end)

    def holds(self, key: jax.Array) -> jax.Array:
        """Whether each query sees a key; both broadcast."""
        seen = (key >= self.first) & (key <= self.token)
        return seen & ((key < self.gap_first) | (key >= self.gap_end))


class Span(NamedTuple):
    """The keys from `first` up to `end`: those that queries see, and only those hold numbers."""

    first: jax.Array
    end: jax.Array

    def holds(self, key) -> jax.Array:
        """Whether each key is one of them."""
        return (key >= self.first) & (key < self.end)


class Range(NamedTuple):
    """Blocks [first, last), of which those in [full_first, full_last) need no mask: every query of
    a program sees every key."""

    first: jax.Array
    full_first: jax.Array
    full_last: jax.Array
    last: jax.Array

    @classmethod
    def clipped(cls, first, full_first, full_last, last) -> "Range":
        """Of what is full only that which lies in it."""
        full_first = jnp.clip(full_first, first, last)
        return cls(first, full_first, jnp.clip(full_last, full_first, last), last)


@dataclass(frozen=True)
class Blocks:
    """What a program walks: the blocks of one `Range`, then those of the next."""

    ranges: tuple[Range, ...]

    @classmethod
    def load(cls, ref, row) -> "Blocks":
        """A program's row of a table."""
        starts = range(0, ref.shape[1], 4)
        return cls(tuple(Range(*(ref[row, start + i] for i in range(4))) for start in starts))

    def store(self, ref, row) -> None:
        """Write a program's row."""
        for i, bound in enumerate(bound for x in self.ranges for bound in x):
            ref[row, i] = bound

    @property
    def size(self) -> jax.Array:
        """How many there are."""
        return _Runs.of((x.first, x.last) for x in self.ranges).size

    def block(self, nth: jax.Array) -> jax.Array:
        """The n-th of them."""
        return _Runs.of((x.first, x.last) for x in self.ranges).block(nth)

    def is_full(self, block: jax.Array) -> jax.Array:
        """Whether a block needs no mask."""
        return reduce(or_, ((block >= x.full_first) & (block < x.full_last) for x in self.ranges))

    def split(self, index, count) -> "Blocks":
        """Part `index` of `count` equal parts."""
        size = self.size
        begin, end = (lax.div(size * i, count) for i in (index, index + 1))
        parts = []
        for x in self.ranges:
            first, last = (x.first + jnp.clip(n, 0, x.last - x.first) for n in (begin, end))
            parts += [Range.clipped(first, x.full_first, x.full_last, last)]
            begin, end = (n - (x.last - x.first) for n in (begin, end))
        return Blocks(tuple(parts))

    def accumulate(self, add_block: Callable, repeats: int, carry):
        """carry = add_block(repeat, block, masked, carry) over all blocks, `repeats` times; first
        those that need masks. One loop over both indices keeps loads in flight throughout."""

        def over(runs: _Runs, masked: bool, carry):
            def step(i, carry):
                divisor = jnp.maximum(runs.size, 1)
                repeat, nth = (lax.div(i, divisor), lax.rem(i, divisor)) if repeats > 1 else (0, i)
                return add_block(repeat, runs.block(nth), masked, carry)

            return lax.fori_loop(0, repeats * runs.size, step, carry)

        edges = (((x.first, x.full_first), (x.full_last, x.last)) for x in self.ranges)
        carry = over(_Runs.of(chain.from_iterable(edges)), True, carry)
        return over(_Runs.of((x.full_first, x.full_last) for x in self.ranges), False, carry)


class _Runs(NamedTuple):
    """Numbers in runs, one after the other: from the `begins[i]`-th of all on they are that far on
    plus `offsets[i]`; and how many there are."""

    begins: tuple[jax.Array, ...]
    offsets: tuple[jax.Array, ...]
    size: jax.Array

    @classmethod
    def of(cls, runs: Iterable[tuple[jax.Array, jax.Array]]) -> "_Runs":
        """The numbers of each [first, last)."""
        begins, offsets, size = [], [], jnp.int32(0)
        for first, last in runs:
            begins += [size]
            offsets += [first - size]
            size += last - first
        return cls(tuple(begins), tuple(offsets), size)

    def block(self, nth: jax.Array) -> jax.Array:
        """The n-th number."""
        offset = self.offsets[0]
        for begin, later in zip(self.begins[1:], self.offsets[1:], strict=True):
            offset = jnp.where(nth < begin, offset, later)
        return nth + offset


def keys_seen(visible: Visible, live, keys: int) -> tuple[Span, Blocks]:
    """The keys that a block of queries sees, and their blocks: those before the gap that all of
    them have, and those behind it. Without a live row there are none."""

    def least(x, where=live):
        return jnp.min(jnp.where(where, x, NEVER))

    def most(x, where=live, other=0):
        return jnp.max(jnp.where(where, x, other))

    first, end, own_first = least(visible.first), most(visible.token + 1), least(visible.own_first)
    before = live & (visible.first < own_first)
    shared_end = most(jnp.minimum(visible.gap_first, own_first), before)
    last = lax.div(end + keys - 1, keys)
    own_block = jnp.minimum(lax.div(own_first, keys), last)
    first_block = jnp.minimum(lax.div(first, keys), own_block)
    shared_last = jnp.clip(lax.div(shared_end + keys - 1, keys), first_block, own_block)
    # A block of keys is full where it is in no query's gap, from the last of the first keys on, up
    # to the first query.
    full_first = lax.div(most(visible.first, live, NEVER - keys) + keys - 1, keys)
    full_last = lax.div(jnp.min(visible.token) + 1, keys)
    gaps = live & (visible.gap_first < visible.gap_end)
    gap_block = lax.div(least(visible.gap_first, gaps), keys)
    gap_last = lax.div(most(visible.gap_end, gaps) + keys - 1, keys)
    shared = (first_block, full_first, jnp.minimum(full_last, gap_block), shared_last)
    own = (own_block, jnp.maximum(full_first, gap_last), full_last, last)
    return Span(first, end), Blocks((Range.clipped(*shared), Range.clipped(*own)))
