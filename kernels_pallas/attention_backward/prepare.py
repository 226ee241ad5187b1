"""What the kernels of the attention backward want to know of a slice of queries: which blocks of
keys a block of queries sees, which blocks of queries see a block of keys, and the statistics of
the rows. One launch, for Triton's kernels and Mosaic's alike.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from operator import or_
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int

from kernels_pallas.attention_backward.visible import Visible
from kernels_pallas.layer_options import AttentionOptions
from kernels_pallas.row_refs import RowRefs
from kernels_pallas.rows import Rows

LOG2_E = math.log2(math.e)
# Where the sequence of a row that is padding starts: after every key.
NEVER = jnp.iinfo(jnp.int32).max


class Queries(NamedTuple):
    """The slice's queries, as arrays or as references to them.

    sees: [3, U], the first three of each row's `Visible`, `NEVER` in padding. q, d_out: [U, N, H].
    lse, in base 2 and infinite in padding, and minus_delta = -sum(out * d_out): [N, U], so that a
    program's rows lie side by side. A product that starts from minus_delta frees its registers.
    """

    sees: jax.Array
    q: jax.Array
    d_out: jax.Array
    lse: jax.Array
    minus_delta: jax.Array


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


class Ranges(NamedTuple):
    """What the queries of a slice see, as arrays.

    bounds: the slice's first row, and the `Span` of the keys that any of its queries sees. seen:
    for each block of queries, the `Blocks` of keys that it sees, two ranges. seeing: for each block
    of keys, those of queries that see it, one range. ends: of each key the `readers_end`.
    """

    bounds: Int[Array, " 3"]
    seen: Int[Array, "blocks 8"]
    seeing: Int[Array, "blocks 4"]
    ends: Int[Array, " S"]


def prepare(
    first_row: jax.Array,
    starts: jax.Array,
    shared: jax.Array,
    q: jax.Array,
    d_out: jax.Array,
    out: jax.Array | Rows,
    lse: jax.Array | Rows,
    slots: int,
    dq: dict[str, int],
    dkv: dict[str, int],
    options: AttentionOptions,
    *,
    interpret: bool,
) -> tuple[Ranges, Queries]:
    """All that the two kernels want to know of the slice, in one launch. dq, dkv: how many
    `queries` and `keys` a block of each has."""
    unit_tokens, num_heads = q.shape[:2]
    blocks = pl.cdiv(unit_tokens, dq["queries"])
    table = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    statistic = jax.ShapeDtypeStruct((num_heads, unit_tokens), jnp.float32)
    if not isinstance(out, Rows):
        out = out.reshape(unit_tokens, -1)
    *ranges, sees, new_lse, minus_delta = pl.pallas_call(
        partial(
            _prepare_kernel,
            layouts=[RowRefs.layout(x) for x in (out, lse)],
            dq=dq,
            dkv=dkv,
            options=options,
        ),
        grid=(blocks, num_heads),
        out_shape=(
            table((3,)),
            table((blocks, 8)),
            table((pl.cdiv(slots, dkv["keys"]), 4)),
            table((slots,)),
            table((3, unit_tokens)),
            statistic,
            statistic,
        ),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attention_backward_prepare",
    )(
        first_row.astype(jnp.int32).reshape(1),
        starts,
        shared,
        d_out,
        *RowRefs.arguments(out),
        *RowRefs.arguments(lse),
    )
    return Ranges(*ranges), Queries(sees, q, d_out, new_lse, minus_delta)


def _prepare_kernel(
    first_ref, starts_ref, shared_ref, d_out_ref, *refs,
    layouts, dq: dict[str, int], dkv: dict[str, int], options: AttentionOptions,
):  # fmt: skip
    """The statistics of a block of one head's queries; for the first head, what it sees. Blocks of
    keys are shared out among the programs."""
    refs = list(refs)
    all_out, all_lse = (RowRefs.take(refs, layout) for layout in layouts)
    bounds_ref, seen_ref, seeing_ref, ends_ref, sees_ref, new_lse_ref, minus_delta_ref = refs
    unit_tokens = starts_ref.shape[0]
    block, head = pl.program_id(0), pl.program_id(1)
    row = block * dq["queries"] + iota(dq["queries"])
    inside = row < unit_tokens
    load_some = partial(load_visible, starts_ref, shared_ref, first_ref[0], options=options)
    visible, live = load_some(row)
    d_out = load_rows(d_out_ref, row, head, live).astype(jnp.float32)
    head_dim, column = d_out_ref.shape[2], iota(d_out.shape[1])
    out = all_out.load_tile(row, head * head_dim + column).astype(jnp.float32)
    out = jnp.where(live[:, None] & (column < head_dim)[None, :], out, 0.0)
    heads = jnp.full(row.shape, head)
    lse = all_lse.load_tile(row, jnp.full((1,), head)).reshape(row.shape)
    lse = jnp.where(live, lse * LOG2_E, jnp.inf)
    pltriton.store(new_lse_ref.at[(heads, row)], lse, mask=inside)
    minus_delta = -jnp.sum(out * d_out, axis=1)
    pltriton.store(minus_delta_ref.at[(heads, row)], minus_delta, mask=inside)

    @pl.when(head == 0)
    def _():
        for i, x in enumerate(visible[:3]):
            pltriton.store(sees_ref.at[(jnp.full(row.shape, i), row)], x, mask=inside)
        keys_seen(visible, live, dq["keys"])[1].store(seen_ref, block)

    number, programs = block * pl.num_programs(1) + head, pl.num_programs(0) * pl.num_programs(1)

    @pl.when(number < seeing_ref.shape[0])
    def _():
        queries = dkv["queries"]
        shape = (pl.next_power_of_2(pl.cdiv(unit_tokens, queries)), queries)
        row = lax.broadcasted_iota(jnp.int32, shape, 0) * queries
        visible, live = load_some(row + lax.broadcasted_iota(jnp.int32, shape, 1))

        @pl.when(number == 0)
        def _():
            first, end = jnp.min(visible.first), jnp.max(jnp.where(live, visible.token + 1, 0))
            for i, bound in enumerate((first_ref[0], first, end)):
                bounds_ref[i] = bound

        @pl.loop(number, seeing_ref.shape[0], step=programs)
        def _(keys):
            first_key = keys * dkv["keys"]
            queries_seeing(visible, first_key, dkv["keys"]).store(seeing_ref, keys)
            key = first_key + iota(dkv["keys"])
            ends = first_ref[0] + readers_end(starts_ref, shared_ref, key)
            pltriton.store(ends_ref.at[key], ends, mask=key < ends_ref.shape[0])


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


def queries_seeing(visible: Visible, first_key, keys: int) -> Blocks:
    """The blocks of queries, which are rows [blocks, queries], that see some of the keys from
    `first_key` on."""
    end = first_key + keys

    def overlaps(first, last):
        return jnp.maximum(first, first_key) < jnp.minimum(last, end)

    some = overlaps(visible.first, visible.gap_first)
    some |= overlaps(visible.own_first, visible.token + 1)
    full = (visible.first <= first_key) & (visible.token >= end - 1)
    full &= jnp.logical_not(overlaps(visible.gap_first, visible.gap_end))
    blocks = some.shape[0]
    index = iota(blocks)
    some = jnp.max(some.astype(jnp.int32), axis=1) == 1
    full = jnp.min(full.astype(jnp.int32), axis=1) == 1
    first = jnp.min(jnp.where(some, index, blocks))
    last = jnp.max(jnp.where(some, index + 1, 0))
    full_first = jnp.min(jnp.where(full, index, last))
    ended = (index >= full_first) & jnp.logical_not(full)
    full_last = jnp.min(jnp.where(ended, index, last))
    return Blocks((Range(first, full_first, full_last, last),))


def readers_end(starts_ref, shared_ref, key) -> jax.Array:
    """How many of the slice's rows lie before a key or go on from it, however far their windows
    reach: they are its first ones, so that query `row` sees a key of `Visible.first` or later, and
    not behind itself, where it is one of them."""
    end, steps = jnp.zeros_like(key), starts_ref.shape[0].bit_length()
    for step in (1 << i for i in reversed(range(steps))):
        starts, (first, last) = _load_starts(starts_ref, shared_ref, end + step - 1)
        goes_on = (starts <= key) | ((first <= key) & (key < last))
        end = jnp.where(goes_on, end + step, end)
    return end


def _load_starts(starts_ref, shared_ref, row) -> tuple[jax.Array, list[jax.Array]]:
    """Of rows of the slice, where their sequences start, and the first and the end of the tokens
    before them; `NEVER` behind the last row."""
    inside = row < starts_ref.shape[0]
    columns = (jnp.full(row.shape, i) for i in range(2))
    shared = [load(shared_ref.at[(column, row)], inside, NEVER) for column in columns]
    return load(starts_ref.at[row], inside, NEVER), shared


def load_visible(
    starts_ref, shared_ref, first_row, row, options: AttentionOptions
) -> tuple[Visible, jax.Array]:
    """What rows of the slice see, and whether they are there and no padding; `NEVER` where not."""
    token = first_row + row
    starts, shared = _load_starts(starts_ref, shared_ref, row)
    live = starts <= token
    sees = Visible.of(token, starts, shared, options)[:3]
    return Visible.join((jnp.where(live, x, NEVER) for x in sees), token), live


def load_rows(ref, row, head, mask) -> jax.Array:
    """Rows of one head of [X, heads, H], and zeros where masked and beyond H."""
    index, mask = rows_index(ref, row, head, mask)
    return load(ref.at[index], mask, 0.0)


def rows_index(ref, row, head, mask):
    """Where rows of one head of [X, heads, H] lie, and what of that there is."""
    head_dim = ref.shape[2]
    shape = (row.shape[0], pl.next_power_of_2(head_dim))
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    if mask is not None:
        mask = lax.broadcast_in_dim(mask, shape, (0,))
    if head_dim < shape[1]:
        mask = column < head_dim if mask is None else mask & (column < head_dim)
    return (lax.broadcast_in_dim(row, shape, (0,)), jnp.full(shape, head), column), mask


def load(ref, mask, other) -> jax.Array:
    """What a reference holds, and `other` where masked."""
    return pltriton.load(ref, mask=mask, other=None if mask is None else other)


def iota(size: int) -> jax.Array:
    """0, 1, ... as int32."""
    return lax.iota(jnp.int32, size)
