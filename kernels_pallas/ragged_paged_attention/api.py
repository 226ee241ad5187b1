"""Ragged paged attention with a choice of implementation."""

import jax

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.ragged_paged_attention import base, pallas_triton


def ragged_paged_attention(
    *arguments: jax.Array,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    backend: Backend = XLA,
) -> tuple[jax.Array, jax.Array]:
    """See `base.ragged_paged_attention`, which says what the arguments are."""
    options = {"sliding_window": sliding_window, "soft_cap": soft_cap}
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    if backend.implementation == "xla":
        return base.ragged_paged_attention(*arguments, **scales, **options)
    return pallas_triton.ragged_paged_attention(*arguments, **scales, **options, backend=backend)
