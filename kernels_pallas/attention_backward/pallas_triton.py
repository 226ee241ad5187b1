"""The attention backward of a slice of queries in two Pallas-Triton kernels, without atomics, and
its forward in one.

1. dq: a program owns a block of queries of one head and walks the keys that they see. Where that
   makes too few programs, the keys are split and the partial sums added in a fixed order.
2. dkv: a program owns a block of keys of one kv head, walks the queries of its whole group that see
   them, and adds to its rows of the accumulators in place. Keys that no query sees are left alone.

Both recompute the weights from the log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithm 2).
Blocks of which every query sees every key go through a loop without masks.
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
from jaxtyping import Array, Float, Int

from kernels_pallas.backend import Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.row_refs import RowRefs
from kernels_pallas.rows import Rows
from kernels_pallas.tuning import tiles

LOG2_E = math.log2(math.e)
MOST_SPLITS = 16
# Where the sequence of a row that is padding starts: after every key.
NEVER = jnp.iinfo(jnp.int32).max
_LEAST = -1e30  # where a maximum starts


def attention_backward(
    q: Float[Array, "U N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    sequence_starts: Int[Array, " U"],
    first_row: Int[Array, ""],
    out: Float[Array, "U N H"] | Rows,
    lse: Float[Array, "U N"] | Rows,
    d_out: Float[Array, "U N H"],
    dk: Float[Array, "S K H"],
    dv: Float[Array, "S K H"],
    *,
    options: AttentionOptions = FULL,
    backend: Backend,
) -> tuple[Float[Array, "U N H"], Float[Array, "S K H"], Float[Array, "S K H"]]:
    """See `base.attention_backward`."""
    keys, values = (x.reshape(-1, *x.shape[2:]) for x in (k_pages, v_pages))
    ranges, rows = _prepare(
        first_row, sequence_starts, q, d_out, out, lse, kv_slots.shape[0], options, backend
    )
    dq = _dq(ranges, rows, kv_slots, keys, values, options, backend)
    return dq, *_dkv(ranges, rows, kv_slots, keys, values, dk, dv, options, backend)


def attention_of_slice(
    q: Float[Array, "U N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    sequence_starts: Int[Array, " U"],
    first_row: Int[Array, ""],
    *,
    options: AttentionOptions = FULL,
    backend: Backend,
) -> tuple[Float[Array, "U N H"], Float[Array, "U N"]]:
    """See `base.attention_of_slice`: a program owns a block of queries of one head, as in dq."""
    unit_tokens, num_heads, head_dim = q.shape
    keys, values = (x.reshape(-1, *x.shape[2:]) for x in (k_pages, v_pages))
    tile = dq_tiles(backend.chip, head_dim, q.dtype, unit_tokens, kv_slots.shape[0])
    return pl.pallas_call(
        partial(_attention_kernel, queries=tile["queries"], keys=tile["keys"], options=options),
        grid=(pl.cdiv(unit_tokens, tile["queries"]), num_heads),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((unit_tokens, num_heads), jnp.float32),
        ),
        compiler_params=_compiler_params(tile),
        interpret=backend.interpret,
        name="attention_of_slice",
    )(first_row.astype(jnp.int32).reshape(1), sequence_starts, q, kv_slots, keys, values)


def _attention_kernel(
    first_ref, starts_ref, q_ref, slots_ref, k_ref, v_ref, out_ref, lse_ref,
    *, queries: int, keys: int, options: AttentionOptions,
):  # fmt: skip
    """A block of one head's queries against the keys that they see, with an online softmax."""
    unit_tokens, num_heads, head_dim = q_ref.shape
    block, head = pl.program_id(0), pl.program_id(1)
    kv_head = lax.div(head, num_heads // k_ref.shape[1])
    row = block * queries + _iota(queries)
    token = first_ref[0] + row
    inside = row < unit_tokens
    starts = _load(starts_ref.at[row], inside, NEVER)
    live = inside & (starts <= token)
    starts = options.first_keys(starts, token)
    q = _load_rows(q_ref, row, head, live)
    span, seen = _keys_seen(starts, token, live, keys)

    def add_block(_, index, masked: bool, carry):
        total, maximum, accumulated = carry
        key = index * keys + _iota(keys)
        read = span.holds(key) if masked else None
        slot = _load(slots_ref.at[key], read, 0)
        k, v = (_load_rows(ref, slot, kv_head, read) for ref in (k_ref, v_ref))
        scores = _scores(_dot(q, k.T), head_dim, options)[0]
        if masked:
            visible = (key[None, :] >= starts[:, None]) & (key[None, :] <= token[:, None])
            scores = jnp.where(visible, scores, -jnp.inf)
        # A row may see no key of a block: its maximum then stays finite and its weights are zero.
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_maximum[:, None])
        correction = jnp.exp2(maximum - new_maximum)
        accumulated = accumulated * correction[:, None] + _dot(weights.astype(v.dtype), v)
        return total * correction + jnp.sum(weights, axis=1), new_maximum, accumulated

    zeros = jnp.zeros((queries,), jnp.float32)
    carry = (zeros, zeros + _LEAST, jnp.zeros(q.shape, jnp.float32))
    total, maximum, accumulated = seen.accumulate(add_block, 1, carry)
    total = jnp.where(live, total, 1.0)
    out = jnp.where(live[:, None], accumulated / total[:, None], 0.0)
    lse = jnp.where(live, (maximum + jnp.log2(total)) / LOG2_E, 0.0)
    _store_rows(out_ref, row, head, out, inside)
    pltriton.store(lse_ref.at[(row, jnp.full(row.shape, head))], lse, mask=inside)


class _Rows(NamedTuple):
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


class _Span(NamedTuple):
    """The keys from `first` up to `end`: those that queries see, and only those hold numbers."""

    first: jax.Array
    end: jax.Array

    def holds(self, key) -> jax.Array:
        """Whether each key is one of them."""
        return (key >= self.first) & (key < self.end)


class _Range(NamedTuple):
    """Blocks [first, last), of which those in [full_first, full_last) need no mask: every query of
    a program sees every key."""

    first: jax.Array
    full_first: jax.Array
    full_last: jax.Array
    last: jax.Array

    @classmethod
    def load(cls, ref, block) -> "_Range":
        """A program's row of a table of ranges."""
        return cls(*(ref[block, i] for i in range(4)))

    def store(self, ref, block) -> None:
        """Write a program's row."""
        for i, bound in enumerate(self):
            ref[block, i] = bound

    def split(self, index, count) -> "_Range":
        """Part `index` of `count` equal parts."""
        size = self.last - self.first
        first = self.first + lax.div(size * index, count)
        last = self.first + lax.div(size * (index + 1), count)
        full_first = jnp.clip(self.full_first, first, last)
        return _Range(first, full_first, jnp.clip(self.full_last, first, last), last)

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


class _Ranges(NamedTuple):
    """What the queries of a slice see, as arrays.

    bounds: the slice's first row, and the `_Span` of the keys that any of its queries sees. seen:
    for each block of queries, the `_Range` of the blocks of keys that it sees [blocks, 4]. seeing:
    for each block of keys, that of the blocks of queries that see it.
    """

    bounds: Int[Array, " 3"]
    seen: Int[Array, "blocks 4"]
    seeing: Int[Array, "blocks 4"]


def _prepare(
    first_row,
    starts,
    q,
    d_out,
    out,
    lse,
    slots: int,
    options: AttentionOptions,
    backend: Backend,
) -> tuple[_Ranges, _Rows]:
    """All that the two kernels want to know of the slice, in one launch."""
    unit_tokens, num_heads, head_dim = q.shape
    dq = dq_tiles(backend.chip, head_dim, q.dtype, unit_tokens, slots)
    dkv = dkv_tiles(backend.chip, head_dim, q.dtype, unit_tokens, slots)
    blocks = pl.cdiv(unit_tokens, dq["queries"])
    table = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    statistic = jax.ShapeDtypeStruct((num_heads, unit_tokens), jnp.float32)
    if not isinstance(out, Rows):
        out = out.reshape(unit_tokens, -1)
    *ranges, starts, lse, minus_delta = pl.pallas_call(
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
        interpret=backend.interpret,
        name="attention_backward_prepare",
    )(
        first_row.astype(jnp.int32).reshape(1),
        starts,
        d_out,
        *RowRefs.arguments(out),
        *RowRefs.arguments(lse),
    )
    return _Ranges(*ranges), _Rows(starts, q, d_out, lse, minus_delta)


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
    row = block * dq["queries"] + _iota(dq["queries"])
    inside, token = row < unit_tokens, first_row + row
    starts = _load(starts_ref.at[row], inside, NEVER)
    live = inside & (starts <= token)
    starts = options.first_keys(starts, token)
    d_out = _load_rows(d_out_ref, row, head, live).astype(jnp.float32)
    head_dim, column = d_out_ref.shape[2], _iota(d_out.shape[1])
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
        _keys_seen(starts, token, live, dq["keys"])[1].store(seen_ref, block)

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


def _dq(
    ranges: _Ranges, rows: _Rows, slots, keys, values, options: AttentionOptions, backend: Backend
) -> jax.Array:
    """Gradient of the queries."""
    unit_tokens, num_heads, head_dim = rows.q.shape
    tile = dq_tiles(backend.chip, head_dim, rows.q.dtype, unit_tokens, slots.shape[0])
    blocks = pl.cdiv(unit_tokens, tile["queries"])
    splits = max(1, min(tile["programs"] // (blocks * num_heads), MOST_SPLITS))
    dtype = rows.q.dtype if splits == 1 else jnp.float32
    parts = pl.pallas_call(
        partial(_dq_kernel, queries=tile["queries"], keys=tile["keys"], options=options),
        grid=(blocks, num_heads, splits),
        out_shape=jax.ShapeDtypeStruct((splits * unit_tokens, num_heads, head_dim), dtype),
        compiler_params=_compiler_params(tile),
        interpret=backend.interpret,
        name="attention_backward_dq",
    )(ranges.bounds, ranges.seen, *rows, slots, keys, values)
    return jnp.sum(parts.reshape(splits, *rows.q.shape), axis=0).astype(rows.q.dtype)


def _dq_kernel(bounds_ref, seen_ref, *refs, queries: int, keys: int, options: AttentionOptions):
    """A block of one head's queries against one split of the keys that they see."""
    rows, (slots_ref, k_ref, v_ref, dq_ref) = _Rows(*refs[:5]), refs[5:]
    unit_tokens, num_heads, head_dim = rows.q.shape
    block, head, split = (pl.program_id(i) for i in range(3))
    kv_head = lax.div(head, num_heads // k_ref.shape[1])

    row = block * queries + _iota(queries)
    token = bounds_ref[0] + row
    inside = row < unit_tokens
    starts = _load(rows.starts.at[row], inside, NEVER)
    q, d_out, lse, minus_delta = _load_queries(rows, row, head, inside, starts < NEVER)

    def add_block(_, index, masked: bool, dq):
        key = index * keys + _iota(keys)
        read = _is_read(bounds_ref, key) if masked else None
        slot = _load(slots_ref.at[key], read, 0)
        k, v = (_load_rows(ref, slot, kv_head, read) for ref in (k_ref, v_ref))
        scores, slope = _scores(_dot(q, k.T), head_dim, options)
        weights = jnp.exp2(scores - lse[:, None])
        if masked:
            visible = (key[None, :] >= starts[:, None]) & (key[None, :] <= token[:, None])
            weights = jnp.where(visible, weights, 0.0)
        d_scores = weights * (_dot(d_out, v.T) + minus_delta[:, None]) * slope
        return dq + _dot(d_scores.astype(k.dtype), k)

    seen = _Range.load(seen_ref, block).split(split, pl.num_programs(2))
    dq = seen.accumulate(add_block, 1, jnp.zeros(q.shape, jnp.float32))
    _store_rows(dq_ref, split * unit_tokens + row, head, dq, inside)


def _dkv(
    ranges: _Ranges,
    rows: _Rows,
    slots,
    keys,
    values,
    dk,
    dv,
    options: AttentionOptions,
    backend: Backend,
) -> tuple:
    """The accumulators with this slice's share added, in place."""
    unit_tokens, _, head_dim = rows.q.shape
    tile = dkv_tiles(backend.chip, head_dim, rows.q.dtype, unit_tokens, slots.shape[0])
    return pl.pallas_call(
        partial(_dkv_kernel, queries=tile["queries"], keys=tile["keys"], options=options),
        # Blocks of late keys are seen by fewer queries: they start last, on every head.
        grid=(keys.shape[1], pl.cdiv(slots.shape[0], tile["keys"])),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (dk, dv)),
        input_output_aliases={10: 0, 11: 1},
        compiler_params=_compiler_params(tile),
        interpret=backend.interpret,
        name="attention_backward_dkv",
    )(
        ranges.bounds,
        ranges.seeing,
        *rows,
        slots,
        keys,
        values,
        dk,
        dv,
    )


def _dkv_kernel(bounds_ref, seeing_ref, *refs, queries: int, keys: int, options: AttentionOptions):
    """A block of one head's keys and values against all queries that see them. Scores are
    transposed, so that the products with them take them as they are computed."""
    rows, (slots_ref, k_ref, v_ref, dk_ref, dv_ref, new_dk_ref, new_dv_ref) = (
        _Rows(*refs[:5]),
        refs[5:],
    )
    unit_tokens, num_heads, head_dim = rows.q.shape
    kv_head, block = pl.program_id(0), pl.program_id(1)
    group = num_heads // k_ref.shape[1]
    seeing = _Range.load(seeing_ref, block)

    @pl.when(seeing.first < seeing.last)
    def _():
        key = block * keys + _iota(keys)
        read = _is_read(bounds_ref, key)
        slot = _load(slots_ref.at[key], read, 0)
        k, v = (_load_rows(ref, slot, kv_head, read) for ref in (k_ref, v_ref))

        def add_block(nth, index, masked: bool, carry):
            dk, dv = carry
            head = kv_head * group + nth
            row = index * queries + _iota(queries)
            inside = row < unit_tokens if masked else None
            starts = _load(rows.starts.at[row], inside, NEVER)
            live = starts < NEVER if masked else None
            q, d_out, lse, minus_delta = _load_queries(rows, row, head, inside, live)
            scores, slope = _scores(_dot(k, q.T), head_dim, options)
            weights = jnp.exp2(scores - lse[None, :])
            if masked:
                token = bounds_ref[0] + row
                visible = (key[:, None] >= starts[None, :]) & (key[:, None] <= token[None, :])
                weights = jnp.where(visible, weights, 0.0)
            dv = dv + _dot(weights.astype(d_out.dtype), d_out)
            d_scores = weights * (_dot(v, d_out.T) + minus_delta[None, :]) * slope
            return dk + _dot(d_scores.astype(q.dtype), q), dv

        # Summing onto the old values needs fewer registers than adding them at the end.
        old = tuple(_load_rows(ref, key, kv_head, read) for ref in (dk_ref, dv_ref))
        dk, dv = seeing.accumulate(add_block, group, old)
        _store_rows(new_dk_ref, key, kv_head, dk, read)
        _store_rows(new_dv_ref, key, kv_head, dv, read)


def _scores(products, head_dim: int, options: AttentionOptions):
    """Scores in units of log2, from products of queries and keys; and what their gradient is
    multiplied by to be that of the products."""
    scale, cap = options.scale_of(head_dim), options.soft_cap
    if cap is None:
        return products * (scale * LOG2_E), scale
    # tanh(x) = 1 - 2 / (1 + exp(2 x)), which is exact at both ends.
    tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(products * (2.0 * LOG2_E * scale / cap)))
    return tanh * (cap * LOG2_E), scale * (1.0 - tanh * tanh)


def _is_read(bounds_ref, key) -> jax.Array:
    """Whether some query of the slice sees a key: only those hold numbers."""
    return (key >= bounds_ref[1]) & (key < bounds_ref[2])


def _load_queries(rows: _Rows, row, head, inside, live) -> tuple[jax.Array, ...]:
    """q, d_out [M, H], lse and minus_delta [M] of one head; zeros where not live."""
    q, d_out = (_load_rows(ref, row, head, live) for ref in (rows.q, rows.d_out))
    index = (jnp.full(row.shape, head), row)
    statistics = (rows.lse, rows.minus_delta)
    lse, minus_delta = (_load(ref.at[index], inside, 0.0) for ref in statistics)
    return q, d_out, lse, minus_delta


def _load_rows(ref, row, head, mask) -> jax.Array:
    """Rows of one head of [X, heads, H], and zeros where masked and beyond H."""
    index, mask = _rows_index(ref, row, head, mask)
    return _load(ref.at[index], mask, 0.0)


def _store_rows(ref, row, head, values, mask) -> None:
    index, mask = _rows_index(ref, row, head, mask)
    pltriton.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def _rows_index(ref, row, head, mask):
    head_dim = ref.shape[2]
    shape = (row.shape[0], pl.next_power_of_2(head_dim))
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    if mask is not None:
        mask = lax.broadcast_in_dim(mask, shape, (0,))
    if head_dim < shape[1]:
        mask = column < head_dim if mask is None else mask & (column < head_dim)
    return (lax.broadcast_in_dim(row, shape, (0,)), jnp.full(shape, head), column), mask


def _load(ref, mask, other) -> jax.Array:
    return pltriton.load(ref, mask=mask, other=None if mask is None else other)


def _iota(size: int) -> jax.Array:
    return lax.iota(jnp.int32, size)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y in float32, without TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, precision=precision)


def _keys_seen(starts, token, live, keys: int) -> tuple[_Span, _Range]:
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
    return _Span(first_start, end), _Range(first, full_first, full_last, last)


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
        starts = _load(starts_ref.at[row], inside, NEVER)
        live = inside & (starts <= token)
        starts = jnp.where(live, options.first_keys(starts, token), NEVER)
        return cls(
            jnp.min(token, axis=1),
            jnp.min(starts, axis=1),
            jnp.max(jnp.where(live, token + 1, 0), axis=1),
            jnp.max(starts, axis=1),
        )

    @property
    def span(self) -> _Span:
        """The keys that any query sees."""
        return _Span(jnp.min(self.first_start), jnp.max(self.end))

    def seeing(self, first_key, keys: int) -> _Range:
        """The blocks of queries that see some of the keys from `first_key` on."""
        index, blocks = _iota(self.end.shape[0]), self.end.shape[0]
        last_key = first_key + keys - 1
        some = (self.first_start <= last_key) & (self.end > first_key)
        full = (self.last_start <= first_key) & (self.first_token >= last_key)
        first = jnp.min(jnp.where(some, index, blocks))
        last = jnp.max(jnp.where(some, index + 1, 0))
        full_first = jnp.min(jnp.where(full, index, last))
        ended = (index >= full_first) & jnp.logical_not(full)
        full_last = jnp.min(jnp.where(ended, index, last))
        return _Range(first, full_first, full_last, last)


def tuning_key(kernel: str, head_dim: int, dtype) -> str:
    """What the tiles of "dq" or "dkv" depend on."""
    return f"{kernel}/h{head_dim}/{jnp.dtype(dtype).name}"


def dq_tiles(chip: str, head_dim: int, dtype, unit_tokens: int, slots: int) -> dict[str, int]:
    """queries and keys of a step; programs: how many to split the keys for."""
    return _tiles("dq", chip, head_dim, dtype, unit_tokens, slots)


def dkv_tiles(chip: str, head_dim: int, dtype, unit_tokens: int, slots: int) -> dict[str, int]:
    """queries and keys of a step."""
    return _tiles("dkv", chip, head_dim, dtype, unit_tokens, slots)


def _tiles(
    kernel: str, chip: str, head_dim: int, dtype, unit_tokens: int, slots: int
) -> dict[str, int]:
    default = {"queries": 16, "keys": 16, "programs": 512, "num_warps": 4, "num_stages": 2}
    tile = tiles("attention_backward", chip, tuning_key(kernel, head_dim, dtype), default)
    sizes = {"queries": unit_tokens, "keys": slots}
    return tile | {
        name: min(tile[name], max(16, pl.next_power_of_2(size))) for name, size in sizes.items()
    }


def _compiler_params(tile: dict[str, int]):
    return pltriton.CompilerParams(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
