"""Picks the implementation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention_backward import base, pallas_triton
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.rows import as_array
from kernels_pallas.sinks import join_sinks


def attention_backward(
    *arguments: Any, options: AttentionOptions = FULL, backend: Backend = XLA
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `base.attention_backward`; out and lse may be `rows.Rows`. Of attention with sinks, they
    are what it returned with them (`join_sinks`)."""
    if backend.implementation == "pallas":
        return _kernel(arguments, options, backend)(*arguments, options=options, backend=backend)
    shape = arguments[0].shape
    arrays = [as_array(x) for x in arguments]
    arrays[7] = arrays[7].reshape(shape)
    return base.attention_backward(*arrays, options=options)


def _kernel(arguments: tuple, options: AttentionOptions, backend: Backend) -> Callable:
    if backend.mosaic:
        # Whose compiler takes a second to import: not for those who do without it.
        from kernels_pallas.attention_backward import pallas_mosaic

        q, k_pages, _, kv_slots = arguments[:4]
        if pallas_mosaic.is_supported(q, k_pages, kv_slots, options):
            return pallas_mosaic.attention_backward
    return pallas_triton.attention_backward


def attention_of_slice(
    *arguments: jax.Array,
    sinks: jax.Array | None = None,
    options: AttentionOptions = FULL,
    backend: Backend = XLA,
) -> tuple[jax.Array, jax.Array]:
    """See `base.attention_of_slice`. sinks: as the forward had them."""
    if backend.implementation == "pallas":
        out, lse = pallas_triton.attention_of_slice(*arguments, options=options, backend=backend)
    else:
        out, lse = base.attention_of_slice(*arguments, options=options)
    sequence_starts, first_row = arguments[4], arguments[6]
    live = sequence_starts <= first_row + jnp.arange(out.shape[0])
    return join_sinks(out, lse, sinks, live)
