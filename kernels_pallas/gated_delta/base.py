"""The contract of the gated delta rule (arXiv 2412.06464), and its XLA reference.

Each value head has a state S [dk, dv], in float32. A token with key k, query q, value v, decay g
and beta moves it and reads it:

    S <- e^g S;   S <- S + k (x) beta (v - S^T k);   o = S^T q

Tokens are taken in chunks of up to 64. Within a chunk, u_i = beta_i (v_i - S_i^T k_i), with S_i the
decayed state before token i, solve a unit lower triangular system, from which the outputs and the
state after the chunk are products of matrices. Only chunks follow one another.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

CHUNK = 64
_DECODE_ROWS = 8  # at once
_ENDLESS = 1 << 30  # tokens of a "window" of what is not trained
_EXACT = lax.Precision.HIGHEST  # products of states, on GPUs too


def delta_rule(
    q: Float[Array, "T Hk dk"],
    k: Float[Array, "T Hk dk"],
    v: Float[Array, "T Hv dv"],
    log_decay: Float[Array, "T Hv"],
    beta: Float[Array, "T Hv"],
    state: Float[Array, "X Hv dk dv"],
    query_starts: Int[Array, " S_plus_1"],
    fresh: Bool[Array, " S"],
    read_slot: Int[Array, " S"],
    write_slot: Int[Array, " S"],
    num_decode: Int[Array, ""],
    num_sequences: Int[Array, ""],
    window_row: Int[Array, " T"],
    windows: Float[Array, "W Hv dk dv"] | None,
    *,
    unit_tokens: int,
) -> tuple[Float[Array, "T Hv dv"], Float[Array, "X Hv dk dv"], Float[Array, "W Hv dk dv"] | None]:
    """Move every sequence of a step over its tokens. Rows of no sequence may hold anything.

    Args:
        q: queries, normalized and scaled. Value head h has query and key head h // (Hv / Hk).
        k: keys, normalized.
        v: values.
        log_decay: g <= 0, float32.
        beta: float32.
        state: by slot; float32, updated in place when donated.
        query_starts: sequence s owns rows [query_starts[s], query_starts[s + 1]); int32.
        fresh: the sequence begins here, from zeros.
        read_slot: else from the state in this slot.
        write_slot: where the state after its last row goes; past the slots: nowhere. No two
            sequences write one slot, and none reads what another writes.
        num_decode: the first this many sequences have exactly one row each, and do not train.
        num_sequences: sequences in use; later rows of the tables are ignored.
        window_row: the place of each row in a microbatch of W windows, the rows of a sequence one
            after the other; past the microbatch: the row's sequence does not train.
        windows: the states before a microbatch's windows; float32, updated in place when donated.
            Written is that before each row whose place begins a window, but for the first row of a
            fresh sequence. None: the step trains nothing.
        unit_tokens: places of a window; static.

    Returns:
        o in v's dtype, anything in rows of no sequence; state; windows.
    """
    tokens, value_heads, dv = v.shape
    step = (q, k, v, log_decay, beta)
    slots, sequences = state.shape[0], fresh.shape[0]
    write_slot = jnp.where(write_slot < slots, write_slot, slots + jnp.arange(sequences))
    out = jnp.zeros((tokens, value_heads, dv), jnp.float32)

    rows_at_once = min(_DECODE_ROWS, tokens, sequences)

    def decode(block, carry):
        out, state = carry
        row = block * rows_at_once + jnp.arange(rows_at_once)
        live = row < num_decode
        place = jnp.minimum(row, min(tokens, sequences) - 1)
        before = _where(live & ~fresh[place], state[read_slot[place]])
        o, after = _one_token(before, *(_where(live, x[place]) for x in step))
        return (
            _set(out, jnp.where(live, row, tokens + row), o),
            _set(state, jnp.where(live, write_slot[place], slots + sequences + row), after),
        )

    blocks = (num_decode + rows_at_once - 1) // rows_at_once
    out, state = lax.fori_loop(0, blocks, decode, (out, state))

    trains = windows is not None
    size = min(CHUNK, tokens, unit_tokens if trains else CHUNK)
    microbatch = windows.shape[0] * unit_tokens if trains else 0
    cuts = cut(query_starts, num_decode, num_sequences, window_row, microbatch, unit_tokens, size)
    ends = jnp.cumsum(cuts.count)

    def walk(index, carry):
        out, state, windows, current = carry
        s = jnp.searchsorted(ends, index, side="right", method="compare_all")
        nth = index - (ends[s] - cuts.count[s])
        span = cuts.span(s, nth, size)
        row = span.first + jnp.arange(size)
        own = (row >= span.start) & (row < span.end)
        place = jnp.clip(row, 0, tokens - 1)
        start = jnp.where(fresh[s], 0, state[read_slot[s]])
        current = jnp.where(nth == 0, start, current)
        if windows is not None:
            begins = (span.window >= 0) & ~(fresh[s] & (span.first == query_starts[s]))
            target = jnp.where(begins, span.window, windows.shape[0])
            windows = _set(windows, target[None], current[None])
        segment = jnp.zeros(size, jnp.int32)
        o, current = _one_chunk(current, segment, *(_where(own, x[place]) for x in step))
        out = _set(out, jnp.where(own, row, tokens + jnp.arange(size)), o)
        target = jnp.where(nth == cuts.count[s] - 1, write_slot[s], slots + sequences)
        return out, _set(state, target[None], current[None]), windows, current

    current = jnp.zeros(state.shape[1:], jnp.float32)
    out, state, windows, _ = lax.fori_loop(0, ends[-1], walk, (out, state, windows, current))
    return out.astype(v.dtype), state, windows


def delta_window(
    q: Float[Array, "U Hk dk"],
    k: Float[Array, "U Hk dk"],
    v: Float[Array, "U Hv dv"],
    log_decay: Float[Array, "U Hv"],
    beta: Float[Array, "U Hv"],
    first: Bool[Array, " U"],
    is_token: Bool[Array, " U"],
    state: Float[Array, "Hv dk dv"],
) -> tuple[Float[Array, "U Hv dv"], Float[Array, "Hv dk dv"]]:
    """Move the state over a window of packed sequences.

    Args:
        q, k, v, log_decay, beta: as of `delta_rule`.
        first: rows that are the first of their sequence, before which the state is zero.
        is_token: other rows are padding, which may hold anything.
        state: that before the window; may hold anything where its first row begins a sequence.

    Returns:
        o in v's dtype, zeros in padding; the state after the window, of its last sequence.
    """
    tokens = v.shape[0]
    size = min(CHUNK, tokens)
    first = first & is_token
    rows = [_where(is_token, x) for x in (q, k, v, log_decay, beta)]

    def chunks(x):
        x = jnp.pad(x, ((0, -tokens % size), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(-1, size, *x.shape[1:])

    def over_chunk(state, chunk):
        *rows, first = chunk
        o, state = _one_chunk(state, jnp.cumsum(first), *rows)
        return state, o

    state = jnp.where(first[0], 0, state)
    state, out = lax.scan(
        jax.checkpoint(over_chunk), state, [chunks(x) for x in (*rows, first.astype(jnp.int32))]
    )
    return out.reshape(-1, *v.shape[1:])[:tokens].astype(v.dtype), state


def delta_window_backward(
    q: Float[Array, "U Hk dk"],
    k: Float[Array, "U Hk dk"],
    v: Float[Array, "U Hv dv"],
    log_decay: Float[Array, "U Hv"],
    beta: Float[Array, "U Hv"],
    first: Bool[Array, " U"],
    is_token: Bool[Array, " U"],
    state: Float[Array, "Hv dk dv"],
    d_out: Float[Array, "U Hv dv"],
    d_state: Float[Array, "Hv dk dv"],
) -> tuple[jax.Array, ...]:
    """Gradients of `delta_window`.

    Args:
        q, k, v, log_decay, beta, first, is_token, state: as of `delta_window`.
        d_out: gradient of its output; may hold anything in padding.
        d_state: gradient of the state after the window; float32.

    Returns:
        Gradients of q, k, v, log_decay, beta in their dtypes, zeros in padding; and that of the
        state before the window, zero where the first row begins a sequence.
    """

    def run(q, k, v, log_decay, beta, state):
        return delta_window(q, k, v, log_decay, beta, first, is_token, state)

    _, pull = jax.vjp(run, q, k, v, log_decay, beta, state)
    return pull((_where(is_token, d_out), d_state))


def _one_token(state, q, k, v, log_decay, beta):
    """One token of each of several sequences; state [B, Hv, dk, dv]."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q, k = (jnp.repeat(x, v.shape[1] // k.shape[1], axis=1) for x in (q, k))
    state = jnp.exp(log_decay)[..., None, None] * state
    read = jnp.einsum("bhkv,bhk->bhv", state, k, precision=_EXACT)
    state += k[..., None] * (beta[..., None] * (v - read))[..., None, :]
    return jnp.einsum("bhkv,bhk->bhv", state, q, precision=_EXACT), state


def _one_chunk(state, segment, q, k, v, log_decay, beta):
    """A chunk's tokens: float32 outputs [C, Hv, dv], and the state after it.

    segment [C], not decreasing: which of the chunk's sequences a token is of; the first, 0, goes on
    from `state`. What is no token has zeros everywhere, and so leaves the state alone.
    """
    group = v.shape[1] // k.shape[1]
    q, k, v = (jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (q, k, v))  # [H, C, ...]
    log_decay, beta = log_decay.T, beta.T  # [Hv, C]
    size = segment.shape[0]
    i, j = jnp.arange(size)[:, None], jnp.arange(size)
    # decay[i, j]: of what token j put into the state, by the time token i reads it. Its exponent is
    # summed from j on, as the difference of two sums from the chunk's start loses digits.
    exponent = jnp.cumsum(jnp.where(i > j, log_decay[..., None], 0), axis=1)
    visible = (i >= j) & (segment[:, None] == segment)
    decay = jnp.exp(jnp.where(visible, exponent, -jnp.inf))
    carried = jnp.exp(jnp.where(segment == 0, jnp.cumsum(log_decay, axis=1), -jnp.inf))

    def products(x, y):  # of all pairs of tokens, for every value head
        return jnp.repeat(jnp.einsum("hik,hjk->hij", x, y, precision=_EXACT), group, axis=0)

    q, scores = jnp.repeat(q, group, axis=0), products(q, k)
    likeness, k = products(k, k), jnp.repeat(k, group, axis=0)
    expected = carried[..., None] * jnp.einsum("hik,hkv->hiv", k, state, precision=_EXACT)
    # Not solved by LAPACK: on a CPU its calls wait for threads of the pool that they run on, and as
    # many at once as there are threads wait for ever.
    system = jnp.where(i > j, beta[..., None] * likeness * decay, 0)
    inverse = unit_lower_inverse(system, partial(jnp.matmul, precision=_EXACT))
    u = jnp.matmul(inverse, beta[..., None] * (v - expected), precision=_EXACT)
    out = carried[..., None] * jnp.einsum("hik,hkv->hiv", q, state, precision=_EXACT)
    out += jnp.einsum("hij,hjv->hiv", scores * decay, u, precision=_EXACT)
    last = decay[:, -1, :, None]
    state = carried[:, -1:, None] * state + jnp.einsum(
        "hjk,hjv->hkv", last * k, u, precision=_EXACT
    )
    return jnp.moveaxis(out, 0, 1), state


def unit_lower_inverse(
    system: Float[Array, "*B C C"], product: Callable[[jax.Array, jax.Array], jax.Array]
) -> Float[Array, "*B C C"]:
    """The inverse of the identity plus a strictly lower triangular matrix.

    The inverses of the diagonal's blocks are merged, from one row up: (T - T M T) is the inverse of
    a block of twice the size if T is that of its halves and M what lies below them. Unlike powers
    of the matrix, which grow without bound where keys are alike, nothing in it is larger than the
    inverses are. product: of two matrices.
    """
    axes = system.ndim - 2, system.ndim - 1
    i, j = (lax.broadcasted_iota(jnp.int32, system.shape, axis) for axis in axes)
    inverse = jnp.where(i == j, 1.0, jnp.where(i // 2 == j // 2, -system, 0.0))
    half = 2
    while half < system.shape[-1]:
        below = (i // (2 * half) == j // (2 * half)) & (i // half != j // half)
        half_way = product(inverse, jnp.where(below, system, 0.0))
        inverse -= product(half_way, inverse)
        half *= 2
    return inverse


class Span(NamedTuple):
    """The rows of a chunk: those from `first` on that are in [start, end). window: which it begins,
    or less than 0."""

    first: jax.Array
    start: jax.Array
    end: jax.Array
    window: jax.Array


class Cuts(NamedTuple):
    """How the sequences of a step are cut in chunks: at the borders of windows, and every so many
    places from there. What does not train is one endless window.

    With windows of 6, chunks of 4, and a sequence in places 3..13:   ...3 45 | 6789 0 1 | 2 3
    Arrays by sequence. start, end: its rows. place: of its first row in the microbatch. unit:
    places of a window. first: its first chunk's number, counted from the microbatch's start. count:
    of chunks; 0 for sequences of one row and those that do not exist. trained: whether it is.
    """

    start: jax.Array
    end: jax.Array
    place: jax.Array
    unit: jax.Array
    first: jax.Array
    count: jax.Array
    trained: jax.Array

    def span(self, s, nth, size: int) -> Span:
        """Chunk `nth` of sequence s, of at most `size` rows."""
        unit = self.unit[s]
        a_window = (unit + size - 1) // size  # chunks
        window, within = jnp.divmod(self.first[s] + nth, a_window)
        first = self.start[s] + window * unit + within * size - self.place[s]
        end = first + jnp.minimum(size, unit - within * size)
        begins = self.trained[s] & (within == 0) & (first >= self.start[s])
        end = jnp.minimum(self.end[s], end)
        return Span(first, self.start[s], end, jnp.where(begins, window, -1))


def cut(
    query_starts, num_decode, num_sequences, window_row, microbatch: int, unit_tokens: int, size
) -> Cuts:
    """Cut the sequences of a step, but for the decoding ones, in chunks of at most `size` rows;
    `microbatch`: how many places there are."""
    start, end = query_starts[:-1], query_starts[1:]
    s = jnp.arange(start.shape[0])
    lives = (s >= num_decode) & (s < num_sequences) & (end > start)
    place = window_row[jnp.clip(start, 0, window_row.shape[0] - 1)]
    trained = place < microbatch
    place = jnp.where(trained, place, 0)
    unit = jnp.where(trained, unit_tokens, _ENDLESS)
    a_window = (unit + size - 1) // size

    def chunk_of(place):
        return place // unit * a_window + place % unit // size

    first = chunk_of(place)
    count = jnp.where(lives, chunk_of(place + end - start - 1) - first + 1, 0)
    return Cuts(start, end, place, unit, first, count, trained)


def _where(live, x):
    """x with zeros in the rows that are not live."""
    return jnp.where(live.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _set(array, rows, values):
    """Overwrite rows, no two of them the same; those past the end are dropped."""
    return array.at[rows].set(values, mode="drop", unique_indices=True)
