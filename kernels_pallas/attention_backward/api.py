"""Picks the implementation."""

from typing import Any

import jax

from kernels_pallas.attention_backward import base, pallas_triton
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.rows import as_array


def attention_backward(
    *arguments: Any, options: AttentionOptions = FULL, backend: Backend = XLA
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `base.attention_backward`; out and lse may be `rows.Rows`."""
    if backend.implementation == "pallas":
        return pallas_triton.attention_backward(*arguments, options=options, backend=backend)
    shape = arguments[0].shape
    arrays = [as_array(x) for x in arguments]
    arrays[6] = arrays[6].reshape(shape)
    return base.attention_backward(*arrays, options=options)


def attention_of_slice(
    *arguments: jax.Array, options: AttentionOptions = FULL, backend: Backend = XLA
) -> tuple[jax.Array, jax.Array]:
    """See `base.attention_of_slice`."""
    if backend.implementation == "pallas":
        return pallas_triton.attention_of_slice(*arguments, options=options, backend=backend)
    return base.attention_of_slice(*arguments, options=options)
