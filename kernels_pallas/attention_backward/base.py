"""The contract of the attention backward of token-level finetuning (FlexLLM, section 6), and its
XLA reference; and of the forward for the same slice, where its output was not saved.

A microbatch's sequences lie one after the other, and its rows are cut in slices of U tokens. The
slices of one layer run from the last to the first; each adds into float32 accumulators of the
gradients of the keys and values that its queries read. When a slice has added its own share, its
rows of the accumulators are complete, because every later query has been there before.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.rows import from_stored

_KEYS_AT_ONCE = 128
_MASKED = -1e30  # finite, so that a row with no visible key gives zeros and not NaN


def attention_of_slice(
    q: Float[Array, "U N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    sequence_starts: Int[Array, " U"],
    first_row: Int[Array, ""],
    options: AttentionOptions = FULL,
) -> tuple[Float[Array, "U N H"], Float[Array, "U N"]]:
    """Causal attention of one slice of queries: what the forward's ragged paged attention gave,
    from the arguments that the backward has (`attention_backward`).

    Returns:
        Attention output in q's dtype, and the float32 log-sum-exp of the scaled scores; zeros in
        padding. The formula is that of FlashAttention-2 (arXiv 2307.08691, algorithm 1).
    """
    unit_tokens, num_heads, head_dim = q.shape
    kv_heads, num_slots = k_pages.shape[2], kv_slots.shape[0]
    scale = options.scale_of(head_dim)
    group = num_heads // kv_heads
    chunk = num_slots if num_slots <= _KEYS_AT_ONCE else math.gcd(num_slots, _KEYS_AT_ONCE)
    flat_keys = k_pages.reshape(-1, kv_heads, head_dim)
    flat_values = v_pages.reshape(-1, kv_heads, head_dim)
    token = first_row + jnp.arange(unit_tokens)
    attends = sequence_starts <= token
    starts = options.first_keys(sequence_starts, token)
    first_key = jnp.min(jnp.where(attends, starts, num_slots))
    last_key = jnp.max(jnp.where(attends, token, -1))
    queries = jnp.where(attends[:, None, None], q, 0).reshape(
        unit_tokens, kv_heads, group, head_dim
    )

    def chunk_of_keys(c, carry):
        total, maximum, accumulated = carry
        slots = lax.dynamic_slice_in_dim(kv_slots, c * chunk, chunk)
        index = c * chunk + jnp.arange(chunk)
        read = ((index >= first_key) & (index <= last_key))[:, None, None]
        keys, values = (jnp.where(read, from_stored(x[slots]), 0) for x in (flat_keys, flat_values))
        scores = scale * jnp.einsum(
            "ukgh,ckh->ukgc", queries, keys, preferred_element_type=jnp.float32
        )
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        visible = (index >= starts[:, None]) & (index <= token[:, None])  # [U, C]
        visible = visible[:, None, None]
        scores = jnp.where(visible, scores, _MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_maximum[..., None]), 0.0)
        correction = jnp.exp(maximum - new_maximum)
        accumulated = accumulated * correction[..., None] + jnp.einsum(
            "ukgc,ckh->ukgh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
        )
        return total * correction + weights.sum(axis=-1), new_maximum, accumulated

    total, maximum, accumulated = lax.fori_loop(
        first_key // chunk,
        last_key // chunk + 1,
        chunk_of_keys,
        (
            jnp.zeros(queries.shape[:3], jnp.float32),
            jnp.full(queries.shape[:3], _MASKED, jnp.float32),
            jnp.zeros(queries.shape, jnp.float32),
        ),
    )
    live = attends[:, None, None]
    out = jnp.where(live[..., None], accumulated / jnp.where(live, total, 1.0)[..., None], 0)
    lse = jnp.where(live, maximum + jnp.log(jnp.where(live, total, 1.0)), 0.0)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(unit_tokens, num_heads)


def attention_backward(
    q: Float[Array, "U N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    sequence_starts: Int[Array, " U"],
    first_row: Int[Array, ""],
    out: Float[Array, "U N H"],
    lse: Float[Array, "U N"],
    d_out: Float[Array, "U N H"],
    dk: Float[Array, "S K H"],
    dv: Float[Array, "S K H"],
    options: AttentionOptions = FULL,
) -> tuple[Float[Array, "U N H"], Float[Array, "S K H"], Float[Array, "S K H"]]:
    """Gradients of causal attention for one slice of queries.

    Args:
        q: the slice's queries; query i is row first_row + i of the microbatch.
        k_pages: pages of B keys, as `rows.stored_dtype` says.
        v_pages: pages of values.
        kv_slots: where each of the microbatch's S tokens keeps its key and value: page * B +
            offset; int32. Any slot does for a token that is padding.
        sequence_starts: for each query, the first token of its sequence: it attends to the tokens
            [sequence_starts[i], first_row + i]. A row that is padding starts past itself,
            attends to nothing, and changes nothing whatever its other arguments hold.
        first_row: the slice's first row in the microbatch; int32 scalar.
        out: the forward's output rows.
        lse: the forward's log-sum-exp of the scaled scores; float32.
        d_out: gradient of `out`.
        dk: float32 accumulator of the keys' gradients; added to in place when donated.
        dv: float32 accumulator of the values' gradients.
        options: how scores are made, as the forward had it; static.

    Returns:
        dq in q's dtype, and the accumulators with this slice's share added.

    The formula is that of FlashAttention-2 (arXiv 2307.08691, algorithm 2). With a cap c the scores
    are c tanh(s / c), whose derivative is 1 - (score / c)^2.
    """
    unit_tokens, num_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    group = num_heads // kv_heads
    num_slots = kv_slots.shape[0]
    chunk = num_slots if num_slots <= _KEYS_AT_ONCE else math.gcd(num_slots, _KEYS_AT_ONCE)
    scale, soft_cap = options.scale_of(head_dim), options.soft_cap
    flat_keys = k_pages.reshape(-1, kv_heads, head_dim)
    flat_values = v_pages.reshape(-1, kv_heads, head_dim)

    def by_kv_head(x):  # [U, N, ...] -> [K, U*G, ...]
        x = x.reshape(unit_tokens, kv_heads, group, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0).reshape(kv_heads, unit_tokens * group, *x.shape[3:])

    token = first_row + jnp.arange(unit_tokens)
    attends = sequence_starts <= token
    # Padding holds anything, NaN too, and 0 * NaN is NaN.
    q, out, d_out = (jnp.where(attends[:, None, None], x, 0) for x in (q, out, d_out))
    starts = options.first_keys(sequence_starts, token)
    # Sequences follow each other, so all keys from the first to the last are some query's.
    first_key = jnp.min(jnp.where(attends, starts, num_slots))
    last_key = jnp.max(jnp.where(attends, token, -1))
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    queries, d_outs, lses, deltas = (
        by_kv_head(q),
        by_kv_head(d_out),
        by_kv_head(lse),
        by_kv_head(delta),
    )
    index = jnp.repeat(token, group)[:, None]  # [U*G, 1]
    start = jnp.repeat(starts, group)[:, None]

    def chunk_of_keys(c, carry):
        dq, dk, dv = carry
        slots = lax.dynamic_slice_in_dim(kv_slots, c * chunk, chunk)
        key_index = c * chunk + jnp.arange(chunk)
        read = ((key_index >= first_key) & (key_index <= last_key))[:, None, None]
        keys = jnp.where(read, from_stored(flat_keys[slots]), 0)  # [C, K, H]
        values = jnp.where(read, from_stored(flat_values[slots]), 0)
        visible = (key_index >= start) & (key_index <= index)
        scores = scale * jnp.einsum(
            "kqh,ckh->kqc", queries, keys, preferred_element_type=jnp.float32
        )
        slope = scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
            slope = scale * (1.0 - (scores / soft_cap) ** 2)
        weights = jnp.where(visible, jnp.exp(scores - lses[..., None]), 0.0)
        d_weights = jnp.einsum("kqh,ckh->kqc", d_outs, values, preferred_element_type=jnp.float32)
        d_scores = (slope * weights * (d_weights - deltas[..., None])).astype(q.dtype)
        dq = dq + jnp.einsum("kqc,ckh->kqh", d_scores, keys, preferred_element_type=jnp.float32)
        add_k = jnp.einsum("kqc,kqh->ckh", d_scores, queries, preferred_element_type=jnp.float32)
        add_v = jnp.einsum(
            "kqc,kqh->ckh", weights.astype(q.dtype), d_outs, preferred_element_type=jnp.float32
        )
        return dq, _add_rows(dk, add_k, c * chunk), _add_rows(dv, add_v, c * chunk)

    dq, dk, dv = lax.fori_loop(
        first_key // chunk,
        last_key // chunk + 1,
        chunk_of_keys,
        (jnp.zeros(queries.shape, jnp.float32), dk, dv),
    )
    dq = jnp.moveaxis(dq.reshape(kv_heads, unit_tokens, group, head_dim), 0, 1)
    return dq.reshape(q.shape).astype(q.dtype), dk, dv


def _add_rows(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """Add `rows` to x[start:start + len(rows)]."""
    old = lax.dynamic_slice_in_dim(x, start, rows.shape[0])
    return lax.dynamic_update_slice_in_dim(x, old + rows, start, axis=0)
