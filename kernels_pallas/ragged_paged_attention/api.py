"""Ragged paged attention with a choice of implementation."""

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.ragged_paged_attention import base, pallas_triton
from kernels_pallas.sinks import join_sinks


def ragged_paged_attention(
    *arguments: jax.Array,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    sinks: jax.Array | None = None,
    options: AttentionOptions = FULL,
    backend: Backend = XLA,
) -> tuple[jax.Array, jax.Array]:
    """See `base.ragged_paged_attention`, which says what the arguments are. sinks: of each query
    head, a logit in its softmax [N] (`join_sinks`)."""
    keywords = {"k_scales": k_scales, "v_scales": v_scales, "options": options}
    if backend.implementation == "xla":
        out, lse = base.ragged_paged_attention(*arguments, **keywords)
    else:
        out, lse = pallas_triton.ragged_paged_attention(*arguments, **keywords, backend=backend)
    query_starts, num_sequences = arguments[3], arguments[7]
    live = jnp.arange(out.shape[0]) < query_starts[num_sequences]
    return join_sinks(out, lse, sinks, live)
