"""Picks the implementation."""

import jax

from kernels_pallas.attention_backward import base, pallas_triton
from kernels_pallas.backend import XLA, Backend


def attention_backward(
    *arguments: jax.Array, backend: Backend = XLA
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `base.attention_backward`."""
    if backend.implementation == "pallas":
        return pallas_triton.attention_backward(*arguments, backend=backend)
    return base.attention_backward(*arguments)


def attention_of_slice(
    *arguments: jax.Array, backend: Backend = XLA
) -> tuple[jax.Array, jax.Array]:
    """See `base.attention_of_slice`."""
    if backend.implementation == "pallas":
        return pallas_triton.attention_of_slice(*arguments, backend=backend)
    return base.attention_of_slice(*arguments)
