"""Grouped LoRA with a choice of implementation, and its derivative.

With one adapter, which is how finetuning calls it, every backend takes the plain XLA products:
there is nothing to group, the shrink of all projections is one product over the concatenated `a`,
and XLA fuses each expand with the addition to y. Compiled for q, k and v on an H200 that is six
launches and no array of y's size beside y; the backward shares the shrink, and a kernel could save
no more than launches.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import base, block_backward, pallas_triton


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def grouped_lora(x, ys, a, b, scales, adapter, backend: Backend = XLA):
    """See `base.grouped_lora`. Differentiable in x, ys, a and b; scales are constants."""
    if _takes_xla(backend, a):
        return base.grouped_lora(x, ys, a, b, scales, adapter)
    return pallas_triton.grouped_lora(x, ys, a, b, scales, adapter, backend)


def _forward(x, ys, a, b, scales, adapter, backend):
    return grouped_lora(x, ys, a, b, scales, adapter, backend), (x, a, b, scales, adapter)


def _backward(backend, residuals, d_ys):
    x, a, b, scales, adapter = residuals
    implementation = base if _takes_xla(backend, a) else block_backward
    dx, da, db = implementation.grouped_lora_backward(x, d_ys, a, b, scales, adapter)
    constants = jax.tree.map(jnp.zeros_like, scales)
    return dx, d_ys, da, db, constants, None


def _takes_xla(backend: Backend, a) -> bool:
    return backend.implementation == "xla" or a[0].shape[0] == 1


grouped_lora.defvjp(_forward, _backward)
