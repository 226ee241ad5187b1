"""The depthwise causal convolution of the last K inputs, and silu: over a step's ragged batch,
where a sequence's last K - 1 inputs are kept in its slot, and over a window of training.

With K = 4, weight [w0 w1 w2 w3] and a sequence that begins with u0: its outputs are
silu(w3 u0), silu(w2 u0 + w3 u1), silu(w1 u0 + w2 u1 + w3 u2), silu(w0 u0 + ... + w3 u3), ...
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.rows import from_stored, set_rows


def causal_conv(
    u: Float[Array, "T C"],
    weight: Float[Array, "K C"],
    tail: Float[Array, "X K_minus_1 C"],
    query_starts: Int[Array, " S_plus_1"],
    fresh: Bool[Array, " S"],
    read_slot: Int[Array, " S"],
    write_slot: Int[Array, " S"],
    num_sequences: Int[Array, ""],
) -> tuple[Float[Array, "T C"], Float[Array, "X K_minus_1 C"], Float[Array, "S K_minus_1 C"]]:
    """Convolve every sequence of a step.

    Args:
        u: inputs of all sequences, one after the other; rows of none may hold anything.
        weight: of input t - K + 1 first, of input t last.
        tail: by slot, the last K - 1 inputs of its sequence, of a `rows.stored_dtype`; updated in
            place when donated.
        query_starts: sequence s owns rows [query_starts[s], query_starts[s + 1]).
        fresh: the sequence begins here: what is before it is zero.
        read_slot: else its last inputs are in this slot.
        write_slot: where its last inputs are then written; past the slots: nowhere. No two
            sequences write the same slot.
        num_sequences: sequences in use; later rows of the tables are ignored.

    Returns:
        silu of the convolution in u's dtype, summed in float32; the tails; and by sequence the
        inputs before the step, in u's dtype. Who read them from `tail` itself would have all of it
        copied, as it is written.
    """
    tokens, sequences, kept = u.shape[0], fresh.shape[0], weight.shape[0] - 1
    token = jnp.arange(tokens, dtype=jnp.int32)
    owner = jnp.searchsorted(query_starts[1:], token, side="right", method="compare_all")
    owner = jnp.minimum(owner, sequences - 1)
    offset = token - query_starts[owner]
    # Else XLA reads those of all layers at once, before the first.
    u, tail = jax.lax.optimization_barrier((u, tail))
    old = jnp.where(fresh[:, None, None], 0, from_stored(tail[read_slot])).astype(u.dtype)
    wide = weight.astype(jnp.float32)

    total = wide[kept] * u.astype(jnp.float32)
    for back in range(1, kept + 1):
        before = jnp.pad(u, ((back, 0), (0, 0)))[:tokens]
        from_tail = old[owner, jnp.clip(kept + offset - back, 0, kept - 1)]
        before = jnp.where((offset >= back)[:, None], before, from_tail)
        total += wide[kept - back] * before.astype(jnp.float32)
    out = jax.nn.silu(total).astype(u.dtype)

    new = inputs_before(u, old, query_starts[:-1], query_starts[1:])
    index = jnp.arange(sequences)
    written = (index < num_sequences) & (write_slot < tail.shape[0])
    slots = jnp.where(written, write_slot, tail.shape[0] + index)
    return out, set_rows(tail, slots, new), old


def inputs_before(
    u: Float[Array, "T C"],
    old: Float[Array, "N K_minus_1 C"],
    starts: Int[Array, " N"],
    ends: Int[Array, " N"],
) -> Float[Array, "N K_minus_1 C"]:
    """The last inputs of sequences before rows `ends` of a step: rows of u from `starts` on, and
    those before the step, `old`."""
    kept = old.shape[1]
    place = (ends - starts)[:, None] - kept + jnp.arange(kept)  # in the sequence's rows
    here = u[jnp.clip(starts[:, None] + place, 0, u.shape[0] - 1)]
    from_old = jnp.take_along_axis(old, jnp.clip(kept + place, 0, kept - 1)[..., None], axis=1)
    return jnp.where((place >= 0)[..., None], here, from_old)


def conv_window(
    u: Float[Array, "U C"],
    weight: Float[Array, "K C"],
    before: Float[Array, "K_minus_1 C"],
    first: Bool[Array, " U"],
) -> Float[Array, "U C"]:
    """Convolve a window of packed sequences; differentiable.

    Args:
        u: inputs. They must be finite in padding, too.
        weight: as of `causal_conv`.
        before: the K - 1 inputs before the window; zeros for those of another sequence than the
            window's first row is of, whose gradients the caller must drop. May hold anything where
            the first row begins a sequence.
        first: rows that are the first of their sequence: what is before them does not count.

    Returns:
        silu of the convolution in u's dtype, summed in float32.
    """
    tokens, kept = u.shape[0], before.shape[0]
    inputs = jnp.concatenate([before.astype(u.dtype), u])
    begins = jnp.pad(first, (kept, 0))
    wide = weight.astype(jnp.float32)
    total, reaches = wide[kept] * u.astype(jnp.float32), jnp.ones(tokens, bool)
    for back in range(1, kept + 1):
        reaches &= ~begins[kept - back + 1 :][:tokens]
        shifted = jnp.where(reaches[:, None], inputs[kept - back :][:tokens], 0)
        total += wide[kept - back] * shifted.astype(jnp.float32)
    return jax.nn.silu(total).astype(u.dtype)
