"""Picks the implementation."""

from typing import Any

import jax

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.gated_delta import base, conv, pallas_backward, pallas_triton

conv_window, inputs_before = conv.conv_window, conv.inputs_before


def delta_rule(
    *arguments: Any, unit_tokens: int, backend: Backend = XLA
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `base.delta_rule`, which says what the arguments are."""
    if backend.implementation == "pallas":
        return pallas_triton.delta_rule(*arguments, unit_tokens=unit_tokens, backend=backend)
    return base.delta_rule(*arguments, unit_tokens=unit_tokens)


def delta_window(*arguments: jax.Array, backend: Backend = XLA) -> tuple[jax.Array, jax.Array]:
    """See `base.delta_window`."""
    if backend.implementation == "pallas":
        return pallas_triton.delta_window(*arguments, backend=backend)
    return base.delta_window(*arguments)


def delta_window_backward(*arguments: jax.Array, backend: Backend = XLA) -> tuple[jax.Array, ...]:
    """See `base.delta_window_backward`."""
    if backend.implementation == "pallas":
        return pallas_backward.delta_window_backward(*arguments, backend=backend)
    return base.delta_window_backward(*arguments)


def causal_conv(*arguments: jax.Array, backend: Backend = XLA) -> tuple[jax.Array, ...]:
    """See `conv.causal_conv`. XLA fuses it on every device."""
    return conv.causal_conv(*arguments)
