"""Ragged paged attention with a choice of implementation."""

import jax

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.ragged_paged_attention import base, pallas_triton


def ragged_paged_attention(
    *arguments: jax.Array,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    options: AttentionOptions = FULL,
    backend: Backend = XLA,
) -> tuple[jax.Array, jax.Array]:
    """See `base.ragged_paged_attention`, which says what the arguments are."""
    keywords = {"k_scales": k_scales, "v_scales": v_scales, "options": options}
    if backend.implementation == "xla":
        return base.ragged_paged_attention(*arguments, **keywords)
    return pallas_triton.ragged_paged_attention(*arguments, **keywords, backend=backend)
