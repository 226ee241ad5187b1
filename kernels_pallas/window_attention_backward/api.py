"""Picks the implementation."""

import jax

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.window_attention_backward import base, pallas_triton


def window_attention_backward(
    *arguments: jax.Array, backend: Backend = XLA
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `base.window_attention_backward`."""
    if backend.implementation == "pallas":
        return pallas_triton.window_attention_backward(*arguments, backend=backend)
    return base.window_attention_backward(*arguments)


def window_attention(*arguments: jax.Array, backend: Backend = XLA) -> tuple[jax.Array, jax.Array]:
    """See `base.window_attention`."""
    if backend.implementation == "pallas":
        return pallas_triton.window_attention(*arguments, backend=backend)
    return base.window_attention(*arguments)
