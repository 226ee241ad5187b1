"""A layer's passes with a choice of implementation, and their derivatives.

Kernels are for GPUs; elsewhere XLA differentiates its own references.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.layer_passes import base, pallas_triton


def add_norm(x, y, weight, eps: float, backend: Backend = XLA) -> tuple[jax.Array, jax.Array]:
    """See `base.add_norm`. Differentiable in x and y; the weight is a constant."""
    if backend.implementation == "xla":
        return base.add_norm(x, y, weight, eps)
    return _add_norm(x, y, weight, eps, backend)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _add_norm(x, y, weight, eps, backend):
    return pallas_triton.add_norm(x, y, weight, eps, backend)


def _add_norm_forward(x, y, weight, eps, backend):
    results = pallas_triton.add_norm(x, y, weight, eps, backend)
    return results, (results[0], weight, y is None)


def _add_norm_backward(eps, backend, residuals, gradients):
    total, weight, alone = residuals
    d_total, d_normed = gradients
    d = pallas_triton.add_norm_backward(total, weight, d_total, d_normed, eps, backend)
    return d, None if alone else d, jnp.zeros_like(weight)


_add_norm.defvjp(_add_norm_forward, _add_norm_backward)


def gated(gate: jax.Array, up: jax.Array, backend: Backend = XLA) -> jax.Array:
    """See `base.gated`. Its gradients are one pass; XLA's own forward is one, too."""
    return base.gated(gate, up) if backend.implementation == "xla" else _gated(gate, up, backend)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gated(gate, up, backend):
    return base.gated(gate, up)


_gated.defvjp(
    lambda gate, up, backend: (base.gated(gate, up), (gate, up)),
    lambda backend, kept, d_inner: pallas_triton.gated_backward(kept[0], kept[1], d_inner, backend),
)


def rotate_and_write(*arguments, backend: Backend = XLA):
    """See `base.rotate_and_write`, which says what the arguments are."""
    if backend.implementation == "xla":
        return base.rotate_and_write(*arguments)
    return pallas_triton.rotate_and_write(*arguments, backend=backend)
