"""The contract of ragged paged attention, and its XLA reference.

One call serves every kind of token of a step: decode (one query), prefill chunks and finetuning
windows (many queries). The reference works on blocks of queries of one sequence, a few blocks at a
time, and walks the keys in chunks with an online softmax, so its work follows the lengths in the
batch and not the largest lengths possible. A query's result depends on nothing but its own
sequence: chunks start at fixed positions.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_MASKED = -1e30  # finite, so that a row with no visible key gives zeros and not NaN
_BLOCKS_AT_ONCE = 8
_CHUNK_BLOCK = 32  # queries a block of a prefill chunk or finetuning window holds
_KEYS_AT_ONCE = 128


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    query_starts: Int[Array, "S_plus_1"],
    kv_lengths: Int[Array, " S"],
    page_tables: Int[Array, "S M"],
    num_decode: Int[Array, ""],
    num_sequences: Int[Array, ""],
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Causal softmax attention, scaled by 1/sqrt(H), over keys and values kept in pages.

    Args:
        q: queries of all sequences, one after the other.
        k_pages: pages of B keys; this call's own keys are already in their pages.
        v_pages: pages of values.
        query_starts: sequence s owns queries [query_starts[s], query_starts[s + 1]), the last ones
            of its kv_lengths[s] tokens; int32, not decreasing.
        kv_lengths: tokens of each sequence that have keys, its queries included; int32.
        page_tables: pages of each sequence, in order; entries past its length are ignored; int32.
        num_decode: the first this many sequences have exactly one query each.
        num_sequences: sequences in use; later rows of the tables are ignored.

    Returns:
        Attention output in q's dtype, and the float32 log-sum-exp of the scaled scores. Rows of no
        sequence are zero.

    Products accumulate in float32. N must be a multiple of K: query head n reads key head n // (N /
    K).
    """
    num_tokens = q.shape[0]
    pages = (k_pages, v_pages, kv_lengths, page_tables, query_starts)

    decode_slots = min(num_tokens, kv_lengths.shape[0])
    one_each = jnp.arange(decode_slots, dtype=jnp.int32)
    decoded = _attend(q, pages, one_each, query_starts[:decode_slots], num_decode, 1)
    if num_tokens == 1:
        return decoded
    sequence, first_query, num_blocks, row_of_token = _query_blocks(
        query_starts, num_decode, num_sequences, num_tokens
    )
    chunked = _attend(q, pages, sequence, first_query, num_blocks, _CHUNK_BLOCK)

    token = jnp.arange(num_tokens)
    decodes, padding = token < num_decode, token >= query_starts[num_sequences]

    def select(decoded: jax.Array, chunked: jax.Array) -> jax.Array:
        ones = decoded[jnp.minimum(token, decode_slots - 1)]
        where = (slice(None),) + (None,) * (decoded.ndim - 1)
        result = jnp.where(decodes[where], ones, chunked[row_of_token])
        return jnp.where(padding[where], 0, result)

    return select(decoded[0], chunked[0]), select(decoded[1], chunked[1])


def _query_blocks(
    query_starts: Int[Array, "S_plus_1"],
    num_decode: Int[Array, ""],
    num_sequences: Int[Array, ""],
    num_tokens: int,
) -> tuple[Int[Array, " X"], Int[Array, " X"], Int[Array, ""], Int[Array, " T"]]:
    """Cut the queries of every sequence after the decoding ones into blocks of `_CHUNK_BLOCK`.

    Returns each block's sequence and first query, the number of blocks in use, and the row of each
    token in the blocks laid one after the other.
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
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    of_token = jnp.searchsorted(query_starts[1:], token, side="right", method="compare_all")
    of_token = jnp.minimum(of_token, slots - 1)
    row = (ends - blocks)[of_token] * _CHUNK_BLOCK + token - query_starts[of_token]
    row = jnp.clip(row, 0, capacity * _CHUNK_BLOCK - 1)
    return owner, first.astype(jnp.int32), ends[-1], row


def _attend(q, pages, block_sequence, block_first, num_blocks, block_size):
    """Attention of blocks of `block_size` queries: output and log-sum-exp of their rows."""
    k_pages, v_pages, kv_lengths, page_tables, query_starts = pages
    num_tokens, num_heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1], k_pages.shape[2]
    group = num_heads // kv_heads
    at_once = min(_BLOCKS_AT_ONCE, block_sequence.shape[0])
    chunk_pages = max(1, _KEYS_AT_ONCE // page_size)
    chunk = chunk_pages * page_size
    page_tables = jnp.pad(page_tables, ((0, 0), (0, -page_tables.shape[1] % chunk_pages)))
    padding = -block_sequence.shape[0] % at_once
    block_sequence = jnp.pad(block_sequence, (0, padding))
    block_first = jnp.pad(block_first, (0, padding))
    scale = head_dim**-0.5

    def attend_some(i, results):
        out, lse = results
        block = i * at_once + jnp.arange(at_once)
        sequence = lax.dynamic_slice_in_dim(block_sequence, i * at_once, at_once)
        first = lax.dynamic_slice_in_dim(block_first, i * at_once, at_once)
        end = query_starts[sequence + 1]
        token = first[:, None] + jnp.arange(block_size)  # [X, Q]
        valid = (token < end[:, None]) & (block < num_blocks)[:, None]
        position = kv_lengths[sequence][:, None] - end[:, None] + token
        position = jnp.where(valid, position, -1)
        queries = q[jnp.where(valid, token, 0)]  # [X, Q, N, H]
        queries = queries.reshape(at_once, block_size, kv_heads, group, head_dim)
        queries = queries.transpose(0, 2, 1, 3, 4).reshape(at_once, kv_heads, -1, head_dim)
        row_position = jnp.repeat(position, group, axis=1)  # [X, Q*G]
        tables = page_tables[sequence]
        length = kv_lengths[sequence]

        def chunk_of_keys(c, carry):
            total, maximum, accumulated = carry
            ids = lax.dynamic_slice_in_dim(tables, c * chunk_pages, chunk_pages, axis=1)
            keys = k_pages[ids].reshape(at_once, chunk, kv_heads, head_dim)
            values = v_pages[ids].reshape(at_once, chunk, kv_heads, head_dim)
            scores = scale * jnp.einsum(
                "xkqh,xckh->xkqc", queries, keys, preferred_element_type=jnp.float32
            )
            index = c * chunk + jnp.arange(chunk)
            # Slots past the sequence hold anything, NaN too, and 0 * NaN is NaN.
            values = jnp.where((index < length[:, None])[:, :, None, None], values, 0)
            visible = (index <= row_position[:, :, None])[:, None]
            scores = jnp.where(visible, scores, _MASKED)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - new_maximum[..., None]), 0.0)
            correction = jnp.exp(maximum - new_maximum)
            accumulated = accumulated * correction[..., None] + jnp.einsum(
                "xkqc,xckh->xkqh",
                weights.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            return total * correction + weights.sum(axis=-1), new_maximum, accumulated

        rows = (at_once, kv_heads, block_size * group)
        last = jnp.max(position) + 1
        total, maximum, accumulated = lax.fori_loop(
            0,
            (last + chunk - 1) // chunk,
            chunk_of_keys,
            (
                jnp.zeros(rows, jnp.float32),
                jnp.full(rows, _MASKED, jnp.float32),
                jnp.zeros((*rows, head_dim), jnp.float32),
            ),
        )
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        attended = accumulated / total[..., None]

        def to_rows(x):  # [X, K, Q*G, ...] -> [X*Q, N, ...]
            x = x.reshape(at_once, kv_heads, block_size, group, *x.shape[3:])
            x = jnp.moveaxis(x, 1, 2)
            return x.reshape(at_once * block_size, num_heads, *x.shape[4:])

        row = i * at_once * block_size
        update = lax.dynamic_update_slice_in_dim
        out = update(out, to_rows(attended).astype(out.dtype), row, axis=0)
        lse = update(lse, to_rows(maximum + jnp.log(total)), row, axis=0)
        return out, lse

    rows = block_sequence.shape[0] * block_size
    results = (
        jnp.zeros((rows, num_heads, head_dim), q.dtype),
        jnp.zeros((rows, num_heads), jnp.float32),
    )
    return lax.fori_loop(0, (num_blocks + at_once - 1) // at_once, attend_some, results)
