"""A layer's passes with a choice of implementation, and their derivatives.

Kernels are for GPUs; elsewhere XLA differentiates its own references.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.layer_passes import base, pallas_triton


def add_norm(
    x, y, weight, eps: float, backend: Backend = XLA, readers: int = 1
) -> tuple[jax.Array, ...]:
    """See `base.add_norm`. Differentiable in x and y; the weight is a constant.

    The normed array is returned once for each of `readers`: their gradients then come one by one,
    and the pass that reads them adds them up.
    """
    if backend.implementation == "xla":
        total, normed = base.add_norm(x, y, weight, eps)
        return total, *[normed] * readers
    return _add_norm(x, y, weight, eps, backend, readers)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _add_norm(x, y, weight, eps, backend, readers):
    return _add_norm_forward(x, y, weight, eps, backend, readers)[0]


def _add_norm_forward(x, y, weight, eps, backend, readers):
    total, normed = pallas_triton.add_norm(x, y, weight, eps, backend)
    return (total, *[normed] * readers), (total, weight, y is None)


def _add_norm_backward(eps, backend, readers, residuals, gradients):
    total, weight, alone = residuals
    d_total, *d_normed = gradients
    d = pallas_triton.add_norm_backward(total, weight, d_total, d_normed, eps, backend)
    return d, None if alone else d, jnp.zeros_like(weight)


_add_norm.defvjp(_add_norm_forward, _add_norm_backward)


def gated(
    gate: jax.Array,
    up: jax.Array,
    backend: Backend = XLA,
    readers: int = 1,
    activation: base.Activation = "silu",
) -> tuple[jax.Array, ...]:
    """See `base.gated`; once for each of `readers`, as in `add_norm`. Its gradients are one pass;
    XLA's own forward is one, too. There is a kernel for silu alone."""
    if backend.implementation == "xla" or activation != "silu":
        return (base.gated(gate, up, activation),) * readers
    return _gated(gate, up, backend, readers)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated(gate, up, backend, readers):
    return (base.gated(gate, up),) * readers


_gated.defvjp(
    lambda gate, up, backend, readers: ((base.gated(gate, up),) * readers, (gate, up)),
    lambda backend, _, kept, d_inner: pallas_triton.gated_backward(
        kept[0], kept[1], d_inner, backend
    ),
)


def rotate_back_and_clear(*arguments, backend: Backend = XLA):
    """See `base.rotate_back_and_clear`, which says what the arguments are."""
    if backend.implementation == "xla":
        return base.rotate_back_and_clear(*arguments)
    return pallas_triton.rotate_back_and_clear(*arguments, backend=backend)


def rotate_and_write(*arguments, backend: Backend = XLA):
    """See `base.rotate_and_write`, which says what the arguments are."""
    if backend.implementation == "xla":
        return base.rotate_and_write(*arguments)
    return pallas_triton.rotate_and_write(*arguments, backend=backend)
