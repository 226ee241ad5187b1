"""Top-k, top-p and min-p without sorting the vocabulary.

Each keeps the tokens whose logit is at least some cutoff. That is searched among all float32 values
in their order, bit by bit: the least value above which lie fewer than k tokens, or less than
`top_p` of the probability. Each pass reads the logits and writes nothing; a sort on a GPU has a
hundred that also write. All bits are found, so the cutoff is the one that a sort would give, and
tokens of equal logits are kept or dropped together.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_MINUS_INFINITY = 0x007FFFFF  # its place in the order of `_float_at`


def kept(
    logits: Float[Array, "R V"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    min_p: Float[Array, " R"],
) -> Bool[Array, "R V"]:
    """Which tokens may be drawn; the most likely one always.

    Of the distribution that the logits give, in this order:

    min_p: those at least `min_p` times as likely as the most likely one.
    top_k: the `top_k` most likely, and those as likely as the last of them; 0 or less: all.
    top_p: of the tokens left, those before which, by likelihood, comes less than `top_p` of their
        probability; 1: all.
    """
    greatest = jnp.max(logits, axis=-1, keepdims=True)

    def count(value: jax.Array) -> jax.Array:
        return jnp.sum(logits > value, axis=-1, dtype=jnp.int32)

    def mass(which: jax.Array) -> jax.Array:
        # Computed anew in every pass: to read it from memory takes as long as to read the logits.
        return jnp.sum(jnp.where(which, jnp.exp(logits - greatest), 0), axis=-1)

    least_k = _cutoff(count, jnp.where(top_k > 0, top_k, jnp.iinfo(jnp.int32).max))
    left = logits >= least_k[:, None]
    left &= jnp.exp(logits - greatest) >= min_p[:, None]
    # Never 0: nothing lies above the most likely token. Tokens that are not left need no care in
    # the search: if there are any above a value, all that are left lie there.
    part = jnp.maximum(top_p * mass(left), jnp.finfo(jnp.float32).tiny)
    least_p = _cutoff(lambda value: mass(logits > value), jnp.where(top_p < 1, part, jnp.inf))
    return left & (logits >= least_p[:, None])


def _cutoff(above: Callable[[jax.Array], jax.Array], limit: jax.Array) -> Float[Array, " R"]:
    """The least float32, from -inf on, of which `above` is less than the limit, row by row.

    above: of a column of values [R, 1], something that decreases as they grow, like the number of
        logits above them. Float sums do: the order of the additions is the same for all values.
    """
    # A GPU compares with several values in one pass over the memory, a CPU reads it for each.
    places = lax.platform_dependent(
        limit, cpu=partial(_places, above, 1), default=partial(_places, above, 2)
    )
    return _float_at(places)


def _places(
    above: Callable[[jax.Array], jax.Array], bits: int, limit: jax.Array
) -> Int[Array, " R"]:
    """The places of `_cutoff`'s values in the order of `_float_at`; finds so many bits in a
    pass."""
    first = jnp.uint32(_MINUS_INFINITY)

    def narrow(i: jax.Array, too_low: jax.Array) -> jax.Array:
        """Add the next bits of how many values are too low."""
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        digit = jnp.zeros_like(too_low)
        for more in range(1, 2**bits):  # unrolled: they share the pass
            last = too_low + (jnp.uint32(more) << shift) - 1
            value = _float_at(first + last)
            digit += (above(value[:, None]) >= limit).astype(jnp.uint32)
        return too_low + (digit << shift)

    return first + lax.fori_loop(0, 32 // bits, narrow, jnp.zeros(limit.shape, jnp.uint32))


def _float_at(place: jax.Array) -> jax.Array:
    """The float32 at a place in the order of all of them, as uint32; NaNs are at both ends."""
    sign = jnp.uint32(1 << 31)
    return lax.bitcast_convert_type(jnp.where(place >= sign, place ^ sign, ~place), jnp.float32)
