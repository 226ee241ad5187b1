"""What the kernels of the attention backward want to know of a slice of queries: which blocks of
keys a block of queries sees, which blocks of queries see a block of keys, and the statistics of
the rows. One launch, for Triton's kernels and Mosaic's alike.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int

from kernels_pallas.attention_backward.visible import (
    NEVER,
    Blocks,
    Range,
    Visible,
    keys_seen,
)
from kernels_pallas.layer_options import AttentionOptions
from kernels_pallas.row_refs import RowRefs
from kernels_pallas.rows import Rows

LOG2_E = math.log2(math.e)


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
