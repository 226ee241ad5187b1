"""What the kernels of the attention backward want to know of a slice of queries: which blocks of
keys a block of queries sees, which blocks of queries see a block of keys, and the statistics of
the rows. One launch, for Triton's kernels and Mosaic's alike.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int

from kernels_pallas.layer_options import AttentionOptions
from kernels_pallas.row_refs import RowRefs
from kernels_pallas.rows import Rows

LOG2_E = math.log2(math.e)
# Where the sequence of a row that is padding starts: after every key.
NEVER = jnp.iinfo(jnp.int32).max


class Queries(NamedTuple):
    """The slice's queries, as arrays or as references to them.

    starts: [U], first key of each row, `NEVER` in padding. q, d_out: [U, N, H]. lse, in base 2 and
    infinite in padding, and minus_delta = -sum(out * d_out): [N, U], so that a program's rows lie
    side by side. A product that starts from minus_delta frees its registers.
    """

    starts: jax.Array
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
    def load(cls, ref, block) -> "Range":
        """A program's row of a table of ranges."""
        return cls(*(ref[block, i] for i in range(4)))

    def store(self, ref, block) -> None:
        """Write a program's row."""
        for i, bound in enumerate(self):
            ref[block, i] = bound

    def is_full(self, block) -> jax.Array:
        """Whether a block needs no mask."""
        return (block >= self.full_first) & (block < self.full_last)

    def split(self, index, count) -> "Range":
        """Part `index` of `count` equal parts."""
        size = self.last - self.first
        first = self.first + lax.div(size * index, count)
        last = self.first + lax.div(size * (index + 1), count)
        full_first = jnp.clip(self.full_first, first, last)
        return Range(first, full_first, jnp.clip(self.full_last, first, last), last)

    def accumulate(self, add_block: Callable, repeats: int, carry):
        """carry = add_block(repeat, block, masked, carry) over all blocks, `repeats` times; first
        those that need masks. One loop over both indices keeps loads in flight throughout."""

        def over(count, block_of, masked: bool, carry):
            def step(i, carry):
                divisor = jnp.maximum(count, 1)
                repeat, nth = (lax.div(i, divisor), lax.rem(i, divisor)) if repeats > 1 else (0, i)
                return add_block(repeat, block_of(nth), masked, carry)

            return lax.fori_loop(0, repeats * count, step, carry)

        before, full = self.full_first - self.first, self.full_last - self.full_first
        edges = before + self.last - self.full_last
        carry = over(edges, lambda n: self.first + n + jnp.where(n < before, 0, full), True, carry)
        return over(full, lambda n: self.full_first + n, False, carry)


class Ranges(NamedTuple):
    """What the queries of a slice see, as arrays.

    bounds: the slice's first row, and the `Span` of the keys that any of its queries sees. seen:
    for each block of queries, the `Range` of the blocks of keys that it sees [blocks, 4]. seeing:
    for each block of keys, that of the blocks of queries that see it.
    """

    bounds: Int[Array, " 3"]
    seen: Int[Array, "blocks 4"]
    seeing: Int[Array, "blocks 4"]


def prepare(
    first_row: jax.Array,
    starts: jax.Array,
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
    *ranges, first_keys, new_lse, minus_delta = pl.pallas_call(
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
            table((blocks, 4)),
            table((pl.cdiv(slots, dkv["keys"]), 4)),
            table((unit_tokens,)),
            statistic,
            statistic,
        ),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attention_backward_prepare",
    )(
        first_row.astype(jnp.int32).reshape(1),
        starts,
        d_out,
        *RowRefs.arguments(out),
        *RowRefs.arguments(lse),
    )
    return Ranges(*ranges), Queries(first_keys, q, d_out, new_lse, minus_delta)


def _prepare_kernel(
    first_ref, starts_ref, d_out_ref, *refs,
    layouts, dq: dict[str, int], dkv: dict[str, int], options: AttentionOptions,
):  # fmt: skip
    """The statistics of a block of one head's queries; for the first head, what it sees. Blocks of
    keys are shared out among the programs."""
    refs = list(refs)
    all_out, all_lse = (RowRefs.take(refs, layout) for layout in layouts)
    bounds_ref, seen_ref, seeing_ref, new_starts_ref, new_lse_ref, minus_delta_ref = refs
    unit_tokens = starts_ref.shape[0]
    block, head = pl.program_id(0), pl.program_id(1)
    first_row = first_ref[0]
    row = block * dq["queries"] + iota(dq["queries"])
    inside, token = row < unit_tokens, first_row + row
    starts = load(starts_ref.at[row], inside, NEVER)
    live = inside & (starts <= token)
    starts = options.first_keys(starts, token)
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
        pltriton.store(new_starts_ref.at[row], jnp.where(live, starts, NEVER), mask=inside)
        keys_seen(starts, token, live, dq["keys"])[1].store(seen_ref, block)

    number, programs = block * pl.num_programs(1) + head, pl.num_programs(0) * pl.num_programs(1)

    @pl.when(number < seeing_ref.shape[0])
    def _():
        table = _Table.of(starts_ref, first_row, dkv["queries"], options)
        bounds = (first_row, *table.span)

        @pl.when(number == 0)
        def _():
            for i, bound in enumerate(bounds):
                bounds_ref[i] = bound

        @pl.loop(number, seeing_ref.shape[0], step=programs)
        def _(keys):
            table.seeing(keys * dkv["keys"], dkv["keys"]).store(seeing_ref, keys)


def keys_seen(starts, token, live, keys: int) -> tuple[Span, Range]:
    """The keys that a block of queries sees, and the range of their blocks. Without a live row
    there are none."""
    first_start = jnp.min(jnp.where(live, starts, NEVER))
    end = jnp.max(jnp.where(live, token + 1, 0))
    # A block of keys is full from the last start on, up to the first query.
    last_start = jnp.max(jnp.where(live, starts, NEVER - keys))
    last = lax.div(end + keys - 1, keys)
    first = jnp.minimum(lax.div(first_start, keys), last)
    full_first = jnp.clip(lax.div(last_start + keys - 1, keys), first, last)
    full_last = jnp.clip(lax.div(jnp.min(token) + 1, keys), full_first, last)
    return Span(first_start, end), Range(first, full_first, full_last, last)


class _Table(NamedTuple):
    """For each block of a slice's queries: its first token, the first start and the last token + 1
    of its rows that are not padding, and the last start of all its rows."""

    first_token: jax.Array
    first_start: jax.Array
    end: jax.Array
    last_start: jax.Array

    @classmethod
    def of(cls, starts_ref, first_row, queries: int, options: AttentionOptions) -> "_Table":
        """The table of all queries, in blocks of `queries`; a power of two of them."""
        unit_tokens = starts_ref.shape[0]
        shape = (pl.next_power_of_2(pl.cdiv(unit_tokens, queries)), queries)
        row = lax.broadcasted_iota(jnp.int32, shape, 0) * queries
        row += lax.broadcasted_iota(jnp.int32, shape, 1)
        inside, token = row < unit_tokens, first_row + row
        starts = load(starts_ref.at[row], inside, NEVER)
        live = inside & (starts <= token)
        starts = jnp.where(live, options.first_keys(starts, token), NEVER)
        return cls(
            jnp.min(token, axis=1),
            jnp.min(starts, axis=1),
            jnp.max(jnp.where(live, token + 1, 0), axis=1),
            jnp.max(starts, axis=1),
        )

    @property
    def span(self) -> Span:
        """The keys that any query sees."""
        return Span(jnp.min(self.first_start), jnp.max(self.end))

    def seeing(self, first_key, keys: int) -> Range:
        """The blocks of queries that see some of the keys from `first_key` on."""
        index, blocks = iota(self.end.shape[0]), self.end.shape[0]
        last_key = first_key + keys - 1
        some = (self.first_start <= last_key) & (self.end > first_key)
        full = (self.last_start <= first_key) & (self.first_token >= last_key)
        first = jnp.min(jnp.where(some, index, blocks))
        last = jnp.max(jnp.where(some, index + 1, 0))
        full_first = jnp.min(jnp.where(full, index, last))
        ended = (index >= full_first) & jnp.logical_not(full)
        full_last = jnp.min(jnp.where(ended, index, last))
        return Range(first, full_first, full_last, last)


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
