"""The contract of the attention backward of token-level finetuning (FlexLLM, section 6), and its
XLA reference; and of the forward for the same slice, where its output was not saved.

A microbatch's sequences lie one after the other, and its rows are cut in slices of U tokens. The
slices of one layer run from the last to the first; each adds into float32 accumulators of the
gradients of the keys and values that its queries read. When a slice has added its own share, its
rows of the accumulators are complete, because every later query has been there before.

Sequences that begin alike, as the answers to one prompt do, may share those tokens: they lie in the
microbatch once, before all that go on from them. Tokens p of a prompt and a, b of two answers (x:
sees; the gap of an answer is what lies between the prompt and itself):

               key p0 p1 a0 a1 b0 b1
         query a1   x  x  x  x
         query b1   x  x        x  x
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.attention_backward.visible import Visible, keys_seen
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.rows import from_stored

_QUERIES_AT_ONCE = 64  # at most
_KEYS_AT_ONCE = 64
_MASKED = -1e30  # finite, so that a row with no visible key gives zeros and not NaN


def attention_of_slice(
    q: Float[Array, "U N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    sequence_starts: Int[Array, " U"],
    shared: Int[Array, "2 U"],
    first_row: Int[Array, ""],
    options: AttentionOptions = FULL,
) -> tuple[Float[Array, "U N H"], Float[Array, "U N"]]:
    """Causal attention of one slice of queries: what the forward's ragged paged attention gave,
    from the arguments that the backward has (`attention_backward`).

    Returns:
        Attention output in q's dtype, and the float32 log-sum-exp of the scaled scores; zeros in
        padding. The formula is that of FlashAttention-2 (arXiv 2307.08691, algorithm 1).
    """
    blocks = _blocks(q, first_row, sequence_starts, *shared)
    out, lse = lax.map(lambda own: _block_forward(own, k_pages, v_pages, kv_slots, options), blocks)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _block_forward(
    own: tuple[jax.Array, ...],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    options: AttentionOptions,
) -> tuple[Float[Array, "U N H"], Float[Array, "U N"]]:
    """`attention_of_slice` of a block of U queries (`_blocks`)."""
    q, first_row, sequence_starts, *shared = own
    unit_tokens, num_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    scale = options.scale_of(head_dim)
    group = num_heads // kv_heads
    visible = Visible.of(first_row + jnp.arange(unit_tokens), sequence_starts, shared, options)
    attends = sequence_starts <= visible.token
    queries = _by_kv_head(jnp.where(attends[:, None, None], q, 0), kv_heads)
    rows = Visible(*jnp.repeat(jnp.stack(visible), group, axis=1)[:, :, None])  # [U*G, 1]
    chunks, read = _chunks(k_pages, v_pages, kv_slots, visible, attends)

    def chunk_of_keys(n, carry):
        total, maximum, accumulated = carry
        key_index, keys, values = read(n)
        scores = scale * jnp.einsum(
            "kqh,kch->kqc", queries, keys, preferred_element_type=jnp.float32
        )
        if options.soft_cap is not None:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        is_visible = rows.holds(key_index)  # [U*G, C]
        scores = jnp.where(is_visible, scores, _MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        weights = jnp.where(is_visible, jnp.exp(scores - new_maximum[..., None]), 0.0)
        correction = jnp.exp(maximum - new_maximum)
        accumulated = accumulated * correction[..., None] + jnp.einsum(
            "kqc,kch->kqh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
        )
        return total * correction + weights.sum(axis=-1), new_maximum, accumulated

    total, maximum, accumulated = lax.fori_loop(
        0,
        chunks,
        chunk_of_keys,
        (
            jnp.zeros(queries.shape[:2], jnp.float32),
            jnp.full(queries.shape[:2], _MASKED, jnp.float32),
            jnp.zeros(queries.shape, jnp.float32),
        ),
    )
    live = jnp.repeat(attends, group)
    out = jnp.where(live[:, None], accumulated / jnp.where(live, total, 1.0)[..., None], 0)
    lse = jnp.where(live, maximum + jnp.log(jnp.where(live, total, 1.0)), 0.0)
    out, lse = (
        jnp.moveaxis(x.reshape(kv_heads, unit_tokens, group, *x.shape[2:]), 0, 1)
        for x in (out, lse)
    )
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(unit_tokens, num_heads)


def attention_backward(
    q: Float[Array, "U N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    sequence_starts: Int[Array, " U"],
    shared: Int[Array, "2 U"],
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
        shared: the tokens [shared[0, i], shared[1, i]) come before each query's sequence, which
            goes on from them: query i attends to them and to [sequence_starts[i], first_row + i].
            None are shared where both are sequence_starts[i]; neither is ever larger, and in
            padding all three are alike. The sequences that go on from the same tokens lie right
            behind them, one after the other; padding comes last, and what lies in a gap holds
            numbers.
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
    blocks = _blocks(q, first_row, sequence_starts, *shared, out, lse, d_out)

    def add_block(carry, own):
        dk, dv = carry
        dq, dk, dv = _block_backward(own, dk, dv, k_pages, v_pages, kv_slots, options)
        return (dk, dv), dq

    (dk, dv), dq = lax.scan(add_block, (dk, dv), blocks)
    return dq.reshape(q.shape), dk, dv


def _block_backward(
    own: tuple[jax.Array, ...],
    dk: Float[Array, "S K H"],
    dv: Float[Array, "S K H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    options: AttentionOptions,
) -> tuple[Float[Array, "U N H"], Float[Array, "S K H"], Float[Array, "S K H"]]:
    """`attention_backward` of a block of U queries (`_blocks`), with `out`, `lse` and `d_out`."""
    q, first_row, sequence_starts, *shared, out, lse, d_out = own
    unit_tokens, num_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    group = num_heads // kv_heads
    scale, soft_cap = options.scale_of(head_dim), options.soft_cap
    visible = Visible.of(first_row + jnp.arange(unit_tokens), sequence_starts, shared, options)
    attends = sequence_starts <= visible.token
    # Padding holds anything, NaN too, and 0 * NaN is NaN.
    q, out, d_out = (jnp.where(attends[:, None, None], x, 0) for x in (q, out, d_out))
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    queries, d_outs = (_by_kv_head(x, kv_heads) for x in (q, d_out))
    lses, deltas = (_by_kv_head(x, kv_heads)[:, None] for x in (lse, delta))
    rows = Visible(*jnp.repeat(jnp.stack(visible), group, axis=1))  # [U*G]
    chunks, read = _chunks(k_pages, v_pages, kv_slots, visible, attends)

    def chunk_of_keys(n, carry):
        # Scores are [key, query], and dq is transposed, so that fewer products transpose what they
        # read: those of XLA's CPU that do are half as fast.
        dq, dk, dv = carry
        key_index, keys, values = read(n)
        scores = scale * jnp.einsum(
            "kch,kqh->kcq", keys, queries, preferred_element_type=jnp.float32
        )
        slope = scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
            slope = scale * (1.0 - (scores / soft_cap) ** 2)
        weights = jnp.where(rows.holds(key_index[:, None]), jnp.exp(scores - lses), 0.0)
        d_weights = jnp.einsum("kch,kqh->kcq", values, d_outs, preferred_element_type=jnp.float32)
        d_scores = (slope * weights * (d_weights - deltas)).astype(q.dtype)
        dq = dq + jnp.einsum("kch,kcq->khq", keys, d_scores, preferred_element_type=jnp.float32)
        add_k = jnp.einsum("kcq,kqh->kch", d_scores, queries, preferred_element_type=jnp.float32)
        add_v = jnp.einsum(
            "kcq,kqh->kch", weights.astype(q.dtype), d_outs, preferred_element_type=jnp.float32
        )
        return dq, _add_rows(dk, add_k, key_index[0]), _add_rows(dv, add_v, key_index[0])

    dq, dk, dv = lax.fori_loop(
        0,
        chunks,
        chunk_of_keys,
        (jnp.zeros((kv_heads, head_dim, unit_tokens * group), jnp.float32), dk, dv),
    )
    dq = dq.reshape(kv_heads, head_dim, unit_tokens, group).transpose(2, 0, 3, 1)
    return dq.reshape(q.shape).astype(q.dtype), dk, dv


def _blocks(q: Float[Array, "U N H"], first_row: jax.Array, *more: jax.Array):
    """A slice's queries in blocks: themselves, their first rows, and what else they have. Few of a
    block's keys are of none of its queries, however short their sequences are."""
    size = max(n for n in range(1, _QUERIES_AT_ONCE + 1) if q.shape[0] % n == 0)
    q, *others = (x.reshape(-1, size, *x.shape[1:]) for x in (q, *more))
    return q, first_row + size * jnp.arange(len(q)), *others


def _by_kv_head(x: Float[Array, "U N ..."], kv_heads: int) -> Float[Array, "K UG ..."]:
    """What every query head has, by the key head that it reads."""
    tokens, num_heads, *rest = x.shape
    x = jnp.moveaxis(x.reshape(tokens, kv_heads, num_heads // kv_heads, *rest), 1, 0)
    return x.reshape(kv_heads, -1, *rest)


def _chunks(
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    visible: Visible,
    attends: Bool[Array, " U"],
) -> tuple[jax.Array, Callable]:
    """How many chunks of keys some query reads, and a function from the n-th of them to its keys'
    places in the microbatch [C], keys and values [K, C, H] (zeros where none is read: padding holds
    anything). First those of shared tokens, then, past the gap that all queries have, their own.
    """
    num_slots, (kv_heads, head_dim) = kv_slots.shape[0], k_pages.shape[2:]
    chunk = num_slots if num_slots <= _KEYS_AT_ONCE else math.gcd(num_slots, _KEYS_AT_ONCE)
    span, seen = keys_seen(visible, attends, chunk)
    heads = jnp.arange(kv_heads)[:, None]

    def read(n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = seen.block(n)
        index = c * chunk + jnp.arange(chunk)
        live = span.holds(index)[:, None]
        rows = lax.dynamic_slice_in_dim(kv_slots, c * chunk, chunk) * kv_heads + heads
        keys, values = (
            jnp.where(live, from_stored(pages.reshape(-1, head_dim)[rows]), 0)
            for pages in (k_pages, v_pages)
        )
        return index, keys, values

    return seen.size, read


def _add_rows(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """Add `rows` [K, C, H] to x[start:start + C]."""
    old = lax.dynamic_slice_in_dim(x, start, rows.shape[1])
    return lax.dynamic_update_slice_in_dim(x, old + rows.swapaxes(0, 1), start, axis=0)
