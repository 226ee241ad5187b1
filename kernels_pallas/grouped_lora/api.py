"""Grouped LoRA with a choice of implementation, and its derivative."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import base


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def grouped_lora(x, ys, a, b, scales, adapter, backend: Backend = XLA):
    """See `base.grouped_lora`. Differentiable in x, ys, a and b; scales are constants."""
    return base.grouped_lora(x, ys, a, b, scales, adapter)


def _forward(x, ys, a, b, scales, adapter, backend):
    return grouped_lora(x, ys, a, b, scales, adapter, backend), (x, a, b, scales, adapter)


def _backward(backend, residuals, d_ys):
    x, a, b, scales, adapter = residuals
    dx, da, db = base.grouped_lora_backward(x, d_ys, a, b, scales, adapter)
    constants = jax.tree.map(jnp.zeros_like, scales)
    return dx, d_ys, da, db, constants, None


grouped_lora.defvjp(_forward, _backward)
