"""The contract of ragged paged attention, and its XLA reference.

One call serves every kind of token of a step: decode (one query), prefill chunks and finetuning
chunks (many queries). The reference works on blocks of queries of one sequence, a few blocks at a
time, and walks the keys in chunks with an online softmax, so its work follows the lengths in the
batch and not the largest lengths possible. A query's result depends on nothing but its own
sequence: chunks start at fixed positions.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.rows import from_stored

_MASKED = -1e30  # finite, so that a row with no visible key gives zeros and not NaN
_SINGLES_AT_ONCE = 8  # queries that are a block of their own
_BLOCKS_AT_ONCE = 2  # blocks of a chunk: all walk the keys of the longest
_CHUNK_BLOCK = 32  # queries a block of a chunk of prefill or finetuning holds
_SMALL_BATCH = 32  # up to here every query is a block of its own
_KEYS_AT_ONCE = 64


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    query_starts: Int[Array, " S_plus_1"],
    kv_lengths: Int[Array, " S"],
    page_tables: Int[Array, "S M"],
    num_decode: Int[Array, ""],
    num_sequences: Int[Array, ""],
    *,
    k_scales: Float[Array, "P K"] | None = None,
    v_scales: Float[Array, "P K"] | None = None,
    options: AttentionOptions = FULL,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Causal softmax attention over keys and values kept in pages.

    Args:
        q: queries of all sequences, one after the other.
        k_pages: pages of B keys, as `rows.stored_dtype` says; this call's own keys are already in
            their pages.
        v_pages: pages of values.
        query_starts: sequence s owns queries [query_starts[s], query_starts[s + 1]), the last ones
            of its kv_lengths[s] tokens; int32, not decreasing.
        kv_lengths: tokens of each sequence that have keys, its queries included; int32.
        page_tables: pages of each sequence, in order; entries past its length are ignored; int32.
        num_decode: the first this many sequences have exactly one query each.
        num_sequences: sequences in use; later rows of the tables are ignored.
        k_scales: for 8-bit pages (int8 or float8): a key is its stored value times the float32
            scale of its page and head. None: pages hold the keys themselves.
        v_scales: the same of the values.
        options: how scores are made; static.

    Returns:
        Attention output in q's dtype, and the float32 log-sum-exp of the scaled scores. Rows of no
        sequence are zero.

    Products accumulate in float32. N must be a multiple of K: query head n reads key head n // (N /
    K).
    """
    num_tokens, num_slots = q.shape[0], kv_lengths.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.searchsorted(query_starts[1:], token, side="right", method="compare_all")
    sequence = jnp.minimum(sequence, num_slots - 1).astype(jnp.int32)
    used = query_starts[num_sequences]
    if k_scales is not None and v_scales is not None:
        k_pages, v_pages = _dequantized(k_pages, k_scales), _dequantized(v_pages, v_scales)
    pages = (k_pages, v_pages, query_starts, kv_lengths, page_tables)

    small = num_tokens <= _SMALL_BATCH
    block = 1 if small else _CHUNK_BLOCK  # rows past the last query are for what is not asked for
    results = (
        jnp.zeros((num_tokens + block, *q.shape[1:]), q.dtype),
        jnp.zeros((num_tokens + block, q.shape[1]), jnp.float32),
    )
    ones = num_tokens if small else min(num_tokens, num_slots)
    single = used if small else num_decode
    results = _attend(q, pages, (sequence[:ones], token[:ones], single), 1, results, options)
    if not small:
        blocks = _query_blocks(query_starts, num_decode, num_sequences, num_tokens)
        results = _attend(q, pages, blocks, block, results, options)
    out, lse = (x[:num_tokens] for x in results)
    asked = (token < used)[:, None]
    return jnp.where(asked[..., None], out, 0), jnp.where(asked, lse, 0)


def _query_blocks(
    query_starts: Int[Array, " S_plus_1"],
    num_decode: Int[Array, ""],
    num_sequences: Int[Array, ""],
    num_tokens: int,
) -> tuple[Int[Array, " X"], Int[Array, " X"], Int[Array, ""]]:
    """Cut the queries of every sequence after the decoding ones into blocks of `_CHUNK_BLOCK`.

    Returns each block's sequence and first query, and the number of blocks in use.
    """
    slots = query_starts.shape[0] - 1
    sequence = jnp.arange(slots)
    lengths = query_starts[1:] - query_starts[:-1]
    lengths = jnp.where((sequence >= num_decode) & (sequence < num_sequences), lengths, 0)
    blocks = (lengths + _CHUNK_BLOCK - 1) // _CHUNK_BLOCK
    ends = jnp.cumsum(blocks)
    capacity = -(-num_tokens // _CHUNK_BLOCK) + min(slots, num_tokens)
    block = jnp.arange(capacity, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, block, side="right", method="compare_all").astype(jnp.int32)
    owner = jnp.minimum(owner, slots - 1)
    first = query_starts[owner] + (block - (ends - blocks)[owner]) * _CHUNK_BLOCK
    return owner, first.astype(jnp.int32), ends[-1]


def _dequantized(pages: jax.Array, scales: jax.Array) -> jax.Array:
    return pages.astype(jnp.float32) * scales[:, None, :, None]


def _attend(
    q: Float[Array, "T N H"],
    pages: tuple[jax.Array, ...],
    blocks: tuple[Int[Array, " X"], Int[Array, " X"], Int[Array, ""]],
    block_size: int,
    results: tuple[Float[Array, "T_plus_block N H"], Float[Array, "T_plus_block N"]],
    options: AttentionOptions,
) -> tuple[Float[Array, "T_plus_block N H"], Float[Array, "T_plus_block N"]]:
    """Attention of blocks of `block_size` queries, written to their rows of `results`.

    Blocks come in the order of their queries: what a block writes past its sequence's end is
    overwritten by the next one. Whatever does not depend on queries and keys is computed before the
    loops: it is the same in every layer, and computed once. Queries, keys and values are read as
    rows of one head, so that they come in the order of the products and are not transposed.
    """
    k_pages, v_pages, query_starts, kv_lengths, page_tables = pages
    block_sequence, block_first, num_blocks = blocks
    num_tokens, num_heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1], k_pages.shape[2]
    group = num_heads // kv_heads
    capacity = block_sequence.shape[0]
    at_once = min(_SINGLES_AT_ONCE if block_size == 1 else _BLOCKS_AT_ONCE, capacity)
    padding = -capacity % at_once
    chunk_pages = max(1, _KEYS_AT_ONCE // page_size)
    chunk = chunk_pages * page_size
    longest = page_tables.shape[1] * page_size
    scale, soft_cap = options.scale_of(head_dim), options.soft_cap

    sequence = jnp.pad(block_sequence, (0, padding))
    in_use = jnp.arange(capacity + padding) < num_blocks
    first = jnp.where(in_use, jnp.pad(block_first, (0, padding)), num_tokens)
    token = first[:, None] + jnp.arange(block_size)  # [X, Q]
    end = query_starts[sequence + 1][:, None]
    valid = (token < end) & in_use[:, None]
    length = jnp.where(valid[:, 0], kv_lengths[sequence], 0)  # [X]
    position = jnp.where(valid, length[:, None] - end + token, -1)
    row_position = jnp.repeat(position, group, axis=1)  # [X, Q*G]
    tables = jnp.pad(page_tables, ((0, 0), (0, -page_tables.shape[1] % chunk_pages)))[sequence]
    head = jnp.arange(num_heads).reshape(kv_heads, 1, group)
    query_rows = jnp.where(valid, token, 0)[:, None, :, None] * num_heads + head  # [X, K, Q, G]
    query_rows = query_rows.reshape(-1, kv_heads, block_size * group)
    key_heads = jnp.arange(kv_heads)[:, None, None]
    queries, keys_by_head, values_by_head = (x.reshape(-1, head_dim) for x in (q, k_pages, v_pages))

    def attend_some(i, results):
        def mine(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, i * at_once, at_once)

        own_queries = queries[mine(query_rows)]
        own_tables, own_length = mine(tables), mine(length)[:, None]
        own_position = mine(row_position)[:, None, :, None]
        first_key = options.first_keys(jnp.zeros_like(own_position), own_position)

        def chunk_of_keys(c, carry):
            total, maximum, accumulated = carry
            ids = lax.dynamic_slice_in_dim(own_tables, c * chunk_pages, chunk_pages, axis=1)
            slots = ids[:, None, :, None] * page_size + jnp.arange(page_size)
            rows = (slots * kv_heads + key_heads).reshape(at_once, kv_heads, chunk)
            keys, values = from_stored(keys_by_head[rows]), from_stored(values_by_head[rows])
            index = c * chunk + jnp.arange(chunk)
            # Slots past the sequence hold anything, NaN too, and 0 * NaN is NaN.
            values = jnp.where((index < own_length)[:, None, :, None], values, 0)
            scores = scale * jnp.einsum(
                "xkqh,xkch->xkqc", own_queries, keys, preferred_element_type=jnp.float32
            )
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            visible = (index <= own_position) & (index >= first_key)
            scores = jnp.where(visible, scores, _MASKED)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            weights = jnp.where(visible, weights, 0.0)
            correction = jnp.exp(maximum - new_maximum)
            accumulated = accumulated * correction[..., None] + jnp.einsum(
                "xkqc,xkch->xkqh",
                weights.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            return total * correction + weights.sum(axis=-1), new_maximum, accumulated

        rows = own_queries.shape[:3]
        earliest = jnp.min(jnp.where(own_position < 0, longest, first_key))
        total, maximum, accumulated = lax.fori_loop(
            0 if options.window is None else earliest // chunk,
            (jnp.max(own_length) + chunk - 1) // chunk,
            chunk_of_keys,
            (
                jnp.zeros(rows, jnp.float32),
                jnp.full(rows, _MASKED, jnp.float32),
                jnp.zeros((*rows, head_dim), jnp.float32),
            ),
        )
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        found = (accumulated / total[..., None], maximum + jnp.log(total))
        return tuple(
            write(result, x, mine(first)) for result, x in zip(results, found, strict=True)
        )

    def write(result: jax.Array, x: jax.Array, first: jax.Array) -> jax.Array:
        """Blocks [X, K, Q*G, ...] to their rows [Q, N, ...] of the result."""
        x = x.reshape(at_once, kv_heads, block_size, group, *x.shape[3:])
        x = jnp.moveaxis(x, 1, 2).reshape(at_once, block_size, num_heads, *x.shape[4:])
        for block, row in zip(x.astype(result.dtype), first, strict=True):
            result = lax.dynamic_update_slice_in_dim(result, block, row, axis=0)
        return result

    return lax.fori_loop(0, (num_blocks + at_once - 1) // at_once, attend_some, results)
