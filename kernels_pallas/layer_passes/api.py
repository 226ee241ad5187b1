"""A layer's passes with a choice of implementation, and their derivatives.

Kernels are for GPUs; elsewhere XLA differentiates its own references.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import Ahead, LowRankSum, passes
from kernels_pallas.grouped_lora.sums import call_of
from kernels_pallas.layer_passes import base, pallas_triton
from kernels_pallas.rows import GatedRows, Recalled, as_array, computed_and_kept


def add_norm(
    x, y, weight, eps: float, backend: Backend = XLA, readers: int = 1, ahead: Ahead | None = None
) -> tuple[Any, ...]:
    """See `base.add_norm`. Differentiable in x and y; the weight is a constant.

    The normed array is returned once for each of `readers`: their gradients then come one by one,
    and the pass that reads them adds them up. x may be `rows.Recalled`; y a sum of grouped LoRA,
    which is added here, if there is something `ahead` that the last reader begins with.
    """
    if ahead is not None and y is not None:
        call = call_of(y)
        x, *both = passes.add_norm(x, as_array(y) if call is None else call, weight, eps, ahead)
        return x, *both[:1] * (readers - 1), both[1]
    y = y.read() if isinstance(y, LowRankSum) else y
    if backend.implementation == "xla":
        total, normed = base.add_norm(as_array(x), y, weight, eps)
        return total, *[normed] * readers
    return _add_norm(*computed_and_kept(x), y, weight, eps, backend, readers)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _add_norm(x, kept, y, weight, eps, backend, readers):
    return _add_norm_forward(x, kept, y, weight, eps, backend, readers)[0]


def _add_norm_forward(x, kept, y, weight, eps, backend, readers):
    read = x if kept is None else kept
    total, normed = pallas_triton.add_norm(read, y, weight, eps, backend)
    return (total, *[normed] * readers), (read if y is None else total, weight, y is None)


def _add_norm_backward(eps, backend, readers, residuals, gradients):
    total, weight, alone = residuals
    d_total, *d_normed = gradients
    d = pallas_triton.add_norm_backward(total, weight, d_total, d_normed, eps, backend)
    return d, None, None if alone else d, jnp.zeros_like(weight)


_add_norm.defvjp(_add_norm_forward, _add_norm_backward)


def gated(
    gate: jax.Array | Recalled | LowRankSum,
    up: jax.Array | Recalled | LowRankSum,
    backend: Backend = XLA,
    readers: int = 1,
    activation: base.Activation = "silu",
    ahead: Ahead | None = None,
) -> tuple[Any, ...]:
    """See `base.gated`; once for each of `readers`, as in `add_norm`. Its gradients are one pass;
    XLA's own forward is one, too. There is a kernel for silu alone. Both factors may be
    `rows.Recalled`, or sums of grouped LoRA, which are added here; the last
    reader then begins with what is `ahead`."""
    if activation == "silu" and (call := call_of(gate, up)) is not None:
        inner, last = passes.gated(call, ahead)
        return *[inner] * (readers - 1), last
    gate, up = (x.read() if isinstance(x, LowRankSum) else x for x in (gate, up))
    if backend.implementation == "xla" or activation != "silu":
        return (base.gated(as_array(gate), as_array(up), activation),) * readers
    (gate, kept_gate), (up, kept_up) = map(computed_and_kept, (gate, up))
    results: Any = _gated(gate, up, kept_gate, kept_up, backend, readers)
    *inner, last = results
    read: Any = gate if kept_gate is None else kept_gate, up if kept_up is None else kept_up
    # A kernel reads both factors, and nobody writes their products for it.
    return *inner, last if readers == 1 else Recalled(last, GatedRows(*read))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gated(gate, up, kept_gate, kept_up, backend, readers):
    return _gated_forward(gate, up, kept_gate, kept_up, backend, readers)[0]


def _gated_forward(gate, up, kept_gate, kept_up, backend, readers):
    read = gate if kept_gate is None else kept_gate, up if kept_up is None else kept_up
    return (base.gated(as_array(read[0]), as_array(read[1])),) * readers, read


def _gated_backward(backend, readers, read, d_inner):
    gate, up = read
    return *pallas_triton.gated_backward(gate, up, d_inner, backend), None, None


_gated.defvjp(_gated_forward, _gated_backward)


def rotate_back_and_clear(*arguments, backend: Backend = XLA):
    """See `base.rotate_back_and_clear`, which says what the arguments are."""
    if backend.implementation == "xla":
        return base.rotate_back_and_clear(*arguments)
    return pallas_triton.rotate_back_and_clear(*arguments, backend=backend)


def rotate_and_write(q, k, v, *arguments, backend: Backend = XLA, merged: bool = False):
    """See `base.rotate_and_write`, which says what the arguments are; merged: whether q, k and v
    are columns of one array. They may be sums of grouped LoRA, which are added here."""
    if (call := call_of(q, k, v)) is not None:
        angles, slots, *pages = arguments
        flat = [x.reshape(-1, *x.shape[2:]) for x in pages]
        angles = pallas_triton.of_one_half(angles)
        rotated, *written = passes.rotate_and_write(call, angles, slots, *flat)
        return rotated, *(x.reshape(pages[0].shape) for x in written)
    q, k, v = map(as_array, (q, k, v))
    if backend.implementation == "xla":
        return base.rotate_and_write(q, k, v, *arguments)
    return pallas_triton.rotate_and_write(q, k, v, *arguments, backend=backend, merged=merged)


def write_rows(arrays, rows, values, backend: Backend = XLA) -> list[jax.Array]:
    """See `base.write_rows`: in one launch."""
    if backend.implementation == "xla":
        return base.write_rows(arrays, rows, values)
    return pallas_triton.write_rows(arrays, rows, values, backend)
