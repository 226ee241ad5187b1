"""Picks the implementation."""

import jax

from kernels_pallas.attention_backward import base, pallas_triton
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.layer_options import FULL, AttentionOptions


def attention_backward(
    *arguments: jax.Array, options: AttentionOptions = FULL, backend: Backend = XLA
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `base.attention_backward`."""
    if backend.implementation == "pallas":
        return pallas_triton.attention_backward(*arguments, options=options, backend=backend)
    return base.attention_backward(*arguments, options=options)


def attention_of_slice(
    *arguments: jax.Array, options: AttentionOptions = FULL, backend: Backend = XLA
) -> tuple[jax.Array, jax.Array]:
    """See `base.attention_of_slice`."""
    if backend.implementation == "pallas":
        return pallas_triton.attention_of_slice(*arguments, options=options, backend=backend)
    return base.attention_of_slice(*arguments, options=options)
