"""Attention sinks: a logit of each query head that joins the softmax and has no value (gpt-oss).

With l the log-sum-exp of a query's scores and s the sink, all weights shrink by e^l / (e^l + e^s) =
sigmoid(l - s), and the softmax's denominator is e^l + e^s. So no kernel knows of sinks: what it
returned is joined with them. The backward is exact if it is given the joined pair: its weights
exp(score - lse) are then those that the output was made with, and the sink, whose value is zero,
adds nothing to sum(out * d_out).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def join_sinks(
    out: Float[Array, "T N H"],
    lse: Float[Array, "T N"],
    sinks: Float[Array, " N"] | None,
    live: Bool[Array, " T"],
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """What attention returned, with a sink of each head in its softmax; None: there are none.
    live: rows of a sequence; the others stay as they are."""
    if sinks is None:
        return out, lse
    sinks = sinks.astype(jnp.float32)
    share = jnp.where(live[:, None], jax.nn.sigmoid(lse - sinks), 1.0)
    joined = jnp.where(live[:, None], jnp.logaddexp(lse, sinks), lse)
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype), joined
