"""The backward of the gated delta rule over a window, in Pallas-Triton kernels.

1. The states before all chunks, and u, by the kernels of the forward.
2. reverse: a program has columns of the gradient of one head's state, and walks the chunks from the
   last to the first; it leaves the gradient after each.
3. gradients: a program has a chunk of one head, and from the state before it and the gradient of
   that after it computes those of its rows.

With R = beta (V - c K S), u = T R, O = c Q S + P u and S' = c_C S + (l K)^T u, where T is the
chunk's inverse, P its scores, c what is carried to a row and l what is kept of it:

    du = P^T dO + l K dS';   dR = T^T du;   dS = c_C dS' + (c Q)^T dO - (c beta K)^T dR
    dV = beta dR;   dM = -dR u^T below the diagonal;   dP = dO u^T up to it
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.backend import Backend
from kernels_pallas.gated_delta.pallas_triton import (
    Chunk,
    Decays,
    dot,
    iota,
    load_matrix,
    load_numbers,
    load_rows,
    options,
    prepare_window,
    store_matrix,
    store_numbers,
    store_rows,
    tuning_key,
    walk_window,
    window_chunks,
)
from kernels_pallas.tuning import tiles


def delta_window_backward(
    q, k, v, log_decay, beta, first, is_token, state, d_out, d_state, *, backend: Backend
) -> tuple[jax.Array, ...]:
    """See `base.delta_window_backward`."""
    rows = (q, k, v, log_decay, beta)
    chunks = window_chunks(first, is_token)
    prepared = prepare_window(chunks, rows, backend)
    states = jnp.zeros((chunks.table.shape[0], *state.shape), jnp.float32)
    u, _, states = walk_window(chunks, rows, prepared, first, state, states, backend)

    d_read, d_states, d_before = _reverse(chunks, rows, prepared, d_out, d_state, backend)
    dq, dk_, *others = _gradients(chunks, rows, u, d_out, d_read, states, d_states, backend)

    def of_key_heads(x, dtype):
        return x.reshape(*k.shape[:2], -1, k.shape[2]).sum(axis=2).astype(dtype)

    dq, dk_ = of_key_heads(dq, q.dtype), of_key_heads(dk_, k.dtype)
    return dq, dk_, *others, d_before


def _reverse(chunks, rows, prepared, d_out, d_state, backend: Backend):
    """Gradients of what the states are read with, of the states after chunks, and of that before
    the window."""
    q, k, v, _, beta = rows
    dk, dv = d_state.shape[1:]
    count = chunks.table.shape[0]
    tile = reverse_tiles(backend.chip, dk, v.dtype)
    columns = min(tile["columns"], max(16, pl.next_power_of_2(dv)))
    d_read, d_states, d_before = pl.pallas_call(
        partial(_reverse_kernel, size=chunks.size, columns=columns),
        grid=(v.shape[1], pl.cdiv(dv, columns)),
        out_shape=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((count, *d_state.shape), jnp.float32),
            jax.ShapeDtypeStruct((1, *d_state.shape), jnp.float32),
        ),
        compiler_params=options(tile),
        interpret=backend.interpret,
        name="delta_reverse",
    )(chunks.table, chunks.segment, q, k, beta, *prepared, d_out, d_state[None])
    return d_read, d_states, d_before[0]


def _gradients(chunks, rows, u, d_out, d_read, states, d_states, backend: Backend):
    """Gradients of q and k for each value head, and of v, log_decay and beta."""
    tokens, value_heads, dv = rows[2].shape
    dk, dtype = rows[1].shape[2], rows[2].dtype
    tile = gradients_tiles(backend.chip, dk, dtype)
    columns = min(tile["columns"], max(16, pl.next_power_of_2(dv)))
    wide = jax.ShapeDtypeStruct((tokens, value_heads, dk), jnp.float32)
    number = jax.ShapeDtypeStruct((tokens, value_heads), jnp.float32)
    return pl.pallas_call(
        partial(_gradients_kernel, size=chunks.size, columns=columns),
        grid=(chunks.table.shape[0], value_heads),
        out_shape=(wide, wide, jax.ShapeDtypeStruct(d_out.shape, dtype), number, number),
        compiler_params=options(tile),
        interpret=backend.interpret,
        name="delta_gradients",
    )(chunks.table, chunks.segment, *rows, u, d_out, d_read, states, d_states)


def _reverse_kernel(
    table_ref, segment_ref, q_ref, k_ref, beta_ref, inverse_ref, scores_ref, carried_ref, kept_ref,
    d_out_ref, d_state_ref, d_read_ref, d_states_ref, d_before_ref, *, size: int, columns: int,
):  # fmt: skip
    head = pl.program_id(0)
    key_head = lax.div(head, d_out_ref.shape[1] // k_ref.shape[1])
    dk = iota(pl.next_power_of_2(k_ref.shape[2]))
    dv = pl.program_id(1) * columns + iota(columns)
    dtype = d_out_ref.dtype
    chunks = table_ref.shape[0]

    def over_chunk(nth, d_state):
        n = chunks - 1 - nth
        chunk = Chunk.load(table_ref, n, segment_ref, size)
        store_matrix(d_states_ref, n, head, dk, dv, d_state, True)
        q, k = (load_rows(ref, chunk.row, key_head, dk, chunk.live) for ref in (q_ref, k_ref))
        d_out = load_rows(d_out_ref, chunk.row, head, dv, chunk.live)
        inverse, scores = (
            load_rows(ref, chunk.row, head, iota(size), chunk.inside)
            for ref in (inverse_ref, scores_ref)
        )
        beta = load_numbers(beta_ref, chunk.row, head, chunk.live)
        carried, kept = (
            load_numbers(ref, chunk.row, head, chunk.inside) for ref in (carried_ref, kept_ref)
        )
        du = dot(scores.T, d_out) + kept[:, None] * dot(k, d_state.astype(dtype))
        d_read = dot(inverse.T, du.astype(dtype))
        store_rows(d_read_ref, chunk.row, head, dv, d_read, chunk.inside)
        through_q = dot(q.T, (carried[:, None] * d_out.astype(jnp.float32)).astype(dtype))
        through_k = dot(k.T, ((carried * beta)[:, None] * d_read).astype(dtype))
        return carried_ref[chunk.last, head] * d_state + through_q - through_k

    d_state = load_matrix(d_state_ref, 0, head, dk, dv, True)
    d_state = lax.fori_loop(0, chunks, over_chunk, d_state)
    store_matrix(d_before_ref, 0, head, dk, dv, d_state, True)


def _gradients_kernel(
    table_ref, segment_ref, q_ref, k_ref, v_ref, decay_ref, beta_ref, u_ref, d_out_ref,
    d_read_ref, states_ref, d_states_ref, dq_ref, dk_ref, dv_ref, d_decay_ref, d_beta_ref,
    *, size: int, columns: int,
):  # fmt: skip
    n, head = pl.program_id(0), pl.program_id(1)
    key_head = lax.div(head, v_ref.shape[1] // k_ref.shape[1])
    column = iota(pl.next_power_of_2(k_ref.shape[2]))
    dtype = v_ref.dtype
    chunk = Chunk.load(table_ref, n, segment_ref, size)
    q, k = (load_rows(ref, chunk.row, key_head, column, chunk.live) for ref in (q_ref, k_ref))
    log_decay, beta = (
        load_numbers(ref, chunk.row, head, chunk.live) for ref in (decay_ref, beta_ref)
    )
    decays = Decays.of(chunk, log_decay)
    parts = pl.cdiv(v_ref.shape[2], columns)

    def load(ref, dv):
        return load_rows(ref, chunk.row, head, dv, chunk.live)

    def over_pairs(part, carry):
        """What is of pairs of rows."""
        d_scores, d_system, d_beta = carry
        dv = part * columns + iota(columns)
        u, d_out, d_read = (load(ref, dv) for ref in (u_ref, d_out_ref, d_read_ref))
        wide = d_read.astype(jnp.float32)
        store_rows(dv_ref, chunk.row, head, dv, beta[:, None] * wide, chunk.inside)
        d_beta += jnp.sum(wide * load(v_ref, dv).astype(jnp.float32), axis=1)
        return d_scores + dot(d_out, u.T), d_system - dot(d_read, u.T), d_beta

    square, zeros = jnp.zeros((size, size), jnp.float32), jnp.zeros((size,), jnp.float32)
    carry = lax.fori_loop(0, parts, over_pairs, (square, square, zeros))
    d_scores, d_system, d_beta = carry
    # Through the scores, decay q k, and below the diagonal through the system, beta decay k k.
    alike = dot(k, k.T)
    d_scores *= decays.between
    d_system = jnp.where(decays.lower, d_system * decays.between, 0.0)
    d_beta += jnp.sum(d_system * alike, axis=1)
    d_system *= beta[:, None]
    d_exponent = d_scores * dot(q, k.T) + d_system * alike
    d_total = jnp.sum(d_exponent, axis=1) - jnp.sum(d_exponent, axis=0)
    d_scores, d_system = d_scores.astype(dtype), d_system.astype(dtype)

    def through_state(part, carry):
        """What comes through the state before the chunk, before it is carried."""
        to_q, from_read = carry
        dv = part * columns + iota(columns)
        state = load_matrix(states_ref, n, head, column, dv, True).astype(dtype).T
        to_q += dot(load(d_out_ref, dv), state)
        return to_q, from_read + dot(load(d_read_ref, dv), state)

    wide, carried = jnp.zeros(q.shape, jnp.float32), decays.carried
    to_q, from_read = lax.fori_loop(0, parts, through_state, (wide, wide))
    d_total += carried * jnp.sum(q.astype(jnp.float32) * to_q, axis=1)
    dq = carried[:, None] * to_q + dot(d_scores, k)
    store_rows(dq_ref, chunk.row, head, column, dq, chunk.inside)
    expected = carried * jnp.sum(k.astype(jnp.float32) * from_read, axis=1)
    d_total -= beta * expected
    store_numbers(d_beta_ref, chunk.row, head, d_beta - expected, chunk.inside)
    d_k = dot(d_scores.T, q) + dot(d_system, k) + dot(d_system.T, k)
    d_k -= (carried * beta)[:, None] * from_read

    def through_next(part, carry):
        """What comes through the state after the chunk, before it is what was kept."""
        to_k, d_whole = carry
        dv = part * columns + iota(columns)
        state = load_matrix(states_ref, n, head, column, dv, True)
        d_state = load_matrix(d_states_ref, n, head, column, dv, True)
        to_k += dot(load(u_ref, dv), d_state.astype(dtype).T)
        return to_k, d_whole + jnp.sum(state * d_state)

    to_k, d_whole = lax.fori_loop(0, parts, through_next, (wide, jnp.float32(0)))
    to_k *= decays.kept[:, None]
    store_rows(dk_ref, chunk.row, head, column, d_k + to_k, chunk.inside)
    # Of the sums of g up to each row, and then of g.
    d_kept = jnp.sum(k.astype(jnp.float32) * to_k, axis=1)
    d_total -= d_kept
    whole = jnp.sum(jnp.where(chunk.row == chunk.last, carried, 0.0))
    d_last = jnp.sum(d_kept) + whole * d_whole
    i, j = (lax.broadcasted_iota(jnp.int32, square.shape, axis) for axis in (0, 1))
    d_decay = jnp.sum(jnp.where(i >= j, d_total[:, None], 0.0), axis=0) + d_last
    store_numbers(d_decay_ref, chunk.row, head, jnp.where(chunk.live, d_decay, 0), chunk.inside)


def reverse_tiles(chip: str, dk: int, dtype) -> dict[str, int]:
    """columns: of a program's part of a state's gradient."""
    default = {"columns": 32, "num_warps": 4, "num_stages": 1}
    return tiles("gated_delta", chip, tuning_key("reverse", dk, dtype), default)


def gradients_tiles(chip: str, dk: int, dtype) -> dict[str, int]:
    """columns: of values, in one step of the loop."""
    default = {"columns": 32, "num_warps": 8, "num_stages": 1}
    return tiles("gated_delta", chip, tuning_key("gradients", dk, dtype), default)
