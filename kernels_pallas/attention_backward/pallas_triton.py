"""The attention backward of a slice of queries in two Pallas-Triton kernels, without atomics, and
its forward in one.

1. dq: a program owns a block of queries of one head and walks the keys that they see. Where that
   makes too few programs, the keys are split and the partial sums added in a fixed order.
2. dkv: a program owns a block of keys of one kv head, walks the queries of its whole group that see
   them, and adds to its rows of the accumulators in place. Keys that no query sees are left alone.

Both recompute the weights from the log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithm 2).
Blocks of which every query sees every key go through a loop without masks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from kernels_pallas.attention_backward.prepare import (
    LOG2_E,
    Queries,
    Ranges,
    iota,
    load,
    load_rows,
    load_visible,
    prepare,
    rows_index,
)
from kernels_pallas.attention_backward.visible import NEVER, Blocks, Visible, keys_seen
from kernels_pallas.backend import Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.rows import Rows
from kernels_pallas.tuning import tiles

MOST_SPLITS = 16
_LEAST = -1e30  # where a maximum starts


def attention_backward(
    q: Float[Array, "U N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    sequence_starts: Int[Array, " U"],
    shared: Int[Array, "2 U"],
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
    sizes = (backend.chip, q.shape[2], q.dtype, q.shape[0], kv_slots.shape[0])
    ranges, rows = prepare(
        *(first_row, sequence_starts, shared, q, d_out, out, lse, kv_slots.shape[0]),
        *(dq_tiles(*sizes), dkv_tiles(*sizes), options),
        interpret=backend.interpret,
    )
    dq = _dq(ranges, rows, kv_slots, keys, values, options, backend)
    return dq, *_dkv(ranges, rows, kv_slots, keys, values, dk, dv, options, backend)


def attention_of_slice(
    q: Float[Array, "U N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    sequence_starts: Int[Array, " U"],
    shared: Int[Array, "2 U"],
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
    )(first_row.astype(jnp.int32).reshape(1), sequence_starts, shared, q, kv_slots, keys, values)


def _attention_kernel(
    first_ref, starts_ref, shared_ref, q_ref, slots_ref, k_ref, v_ref, out_ref, lse_ref,
    *, queries: int, keys: int, options: AttentionOptions,
):  # fmt: skip
    """A block of one head's queries against the keys that they see, with an online softmax."""
    unit_tokens, num_heads, head_dim = q_ref.shape
    block, head = pl.program_id(0), pl.program_id(1)
    kv_head = lax.div(head, num_heads // k_ref.shape[1])
    row = block * queries + iota(queries)
    inside = row < unit_tokens
    visible, live = load_visible(starts_ref, shared_ref, first_ref[0], row, options)
    q = load_rows(q_ref, row, head, live)
    span, seen = keys_seen(visible, live, keys)

    def add_block(_, index, masked: bool, carry):
        total, maximum, accumulated = carry
        key = index * keys + iota(keys)
        read = span.holds(key) if masked else None
        slot = load(slots_ref.at[key], read, 0)
        k, v = (load_rows(ref, slot, kv_head, read) for ref in (k_ref, v_ref))
        scores = _scores(_dot(q, k.T), head_dim, options)[0]
        if masked:
            scores = jnp.where(visible.expand(1).holds(key[None, :]), scores, -jnp.inf)
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


def _dq(
    ranges: Ranges, rows: Queries, slots, keys, values, options: AttentionOptions, backend: Backend
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
    rows, (slots_ref, k_ref, v_ref, dq_ref) = Queries(*refs[:5]), refs[5:]
    unit_tokens, num_heads, head_dim = rows.q.shape
    block, head, split = (pl.program_id(i) for i in range(3))
    kv_head = lax.div(head, num_heads // k_ref.shape[1])

    row = block * queries + iota(queries)
    inside = row < unit_tokens
    sees = (load(rows.sees.at[(jnp.full(row.shape, i), row)], inside, NEVER) for i in range(3))
    visible = Visible.join(sees, bounds_ref[0] + row)
    live = visible.first < NEVER
    q, d_out, lse, minus_delta = _load_queries(rows, row, head, inside, live)

    def add_block(_, index, masked: bool, dq):
        key = index * keys + iota(keys)
        read = _is_read(bounds_ref, key) if masked else None
        slot = load(slots_ref.at[key], read, 0)
        k, v = (load_rows(ref, slot, kv_head, read) for ref in (k_ref, v_ref))
        scores, slope = _scores(_dot(q, k.T), head_dim, options)
        weights = jnp.exp2(scores - lse[:, None])
        if masked:
            weights = jnp.where(visible.expand(1).holds(key[None, :]), weights, 0.0)
        d_scores = weights * (_dot(d_out, v.T) + minus_delta[:, None]) * slope
        return dq + _dot(d_scores.astype(k.dtype), k)

    seen = Blocks.load(seen_ref, block).split(split, pl.num_programs(2))
    dq = seen.accumulate(add_block, 1, jnp.zeros(q.shape, jnp.float32))
    _store_rows(dq_ref, split * unit_tokens + row, head, dq, inside)


def _dkv(
    ranges: Ranges,
    rows: Queries,
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
        input_output_aliases={11: 0, 12: 1},
        compiler_params=_compiler_params(tile),
        interpret=backend.interpret,
        name="attention_backward_dkv",
    )(
        ranges.bounds,
        ranges.seeing,
        ranges.ends,
        *rows,
        slots,
        keys,
        values,
        dk,
        dv,
    )


def _dkv_kernel(
    bounds_ref, seeing_ref, ends_ref, *refs, queries: int, keys: int, options: AttentionOptions
):
    """A block of one head's keys and values against all queries that see them. Scores are
    transposed, so that the products with them take them as they are computed."""
    rows, (slots_ref, k_ref, v_ref, dk_ref, dv_ref, new_dk_ref, new_dv_ref) = (
        Queries(*refs[:5]),
        refs[5:],
    )
    unit_tokens, num_heads, head_dim = rows.q.shape
    kv_head, block = pl.program_id(0), pl.program_id(1)
    group = num_heads // k_ref.shape[1]
    seeing = Blocks.load(seeing_ref, block)

    @pl.when(seeing.size > 0)
    def _():
        key = block * keys + iota(keys)
        read = _is_read(bounds_ref, key)
        slot = load(slots_ref.at[key], read, 0)
        k, v = (load_rows(ref, slot, kv_head, read) for ref in (k_ref, v_ref))
        end = load(ends_ref.at[key], read, 0)

        def add_block(nth, index, masked: bool, carry):
            dk, dv = carry
            head = kv_head * group + nth
            row = index * queries + iota(queries)
            inside = row < unit_tokens if masked else None
            first = load(rows.sees.at[(jnp.zeros_like(row), row)], inside, NEVER)
            live = first < NEVER if masked else None
            q, d_out, lse, minus_delta = _load_queries(rows, row, head, inside, live)
            scores, slope = _scores(_dot(k, q.T), head_dim, options)
            weights = jnp.exp2(scores - lse[None, :])
            if masked:
                # The gap from the keys' side: that of the queries would need many registers.
                token = (bounds_ref[0] + row)[None, :]
                seen = (key[:, None] >= first[None, :]) & (key[:, None] <= token)
                weights = jnp.where(seen & (token < end[:, None]), weights, 0.0)
            dv = dv + _dot(weights.astype(d_out.dtype), d_out)
            d_scores = weights * (_dot(v, d_out.T) + minus_delta[None, :]) * slope
            return dk + _dot(d_scores.astype(q.dtype), q), dv

        # Summing onto the old values needs fewer registers than adding them at the end.
        old = tuple(load_rows(ref, key, kv_head, read) for ref in (dk_ref, dv_ref))
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


def _load_queries(rows: Queries, row, head, inside, live) -> tuple[jax.Array, ...]:
    """q, d_out [M, H], lse and minus_delta [M] of one head; zeros where not live."""
    q, d_out = (load_rows(ref, row, head, live) for ref in (rows.q, rows.d_out))
    index = (jnp.full(row.shape, head), row)
    statistics = (rows.lse, rows.minus_delta)
    lse, minus_delta = (load(ref.at[index], inside, 0.0) for ref in statistics)
    return q, d_out, lse, minus_delta


def _store_rows(ref, row, head, values, mask) -> None:
    index, mask = rows_index(ref, row, head, mask)
    pltriton.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y in float32, without TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, precision=precision)


def tuning_key(kernel: str, head_dim: int, dtype) -> str:
    """What the tiles of "dq" or "dkv" depend on."""
    return f"{kernel}/h{head_dim}/{jnp.dtype(dtype).name}"


def mosaic_key(kernel: str, head_dim: int, dtype) -> str:
    """The same of Mosaic's kernels (`pallas_mosaic`), whose compiler is not needed for that."""
    return f"mosaic/{tuning_key(kernel, head_dim, dtype)}"


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
