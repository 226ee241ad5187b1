"""Grouped LoRA with a choice of implementation, and its derivative.

What a job trains is `job_lora`: one adapter, and gradients that are added to their sums. Of
`grouped_lora` with one adapter every backend takes the plain XLA products: there is nothing to
group.

Factors of many layers may be one array, of which a layer's are read in place: as an array of their
own they would be a copy.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import base, block_backward, one_adapter
from kernels_pallas.grouped_lora.blocks import blocks_of_all
from kernels_pallas.grouped_lora.sums import Ahead, LowRankSum, begin
from kernels_pallas.rows import as_array, computed_and_kept


def grouped_lora(
    x, ys, a, b, scales, adapter, backend: Backend = XLA, layer=None, *, merged: bool = False
):
    """See `base.grouped_lora`; without a `layer` a, b and scales have no leading axis of layers.
    Differentiable in x, ys, a and b; scales are constants. merged: whether ys are columns of one
    array (`backend.are_merged`)."""
    a, b, scales, layer = _of_layers(a, b, scales, layer)
    return _grouped_lora(x, ys, a, b, scales, adapter, layer, backend, merged)


def low_rank_sums(
    x, ys, a, b, scales, adapter, backend: Backend = XLA, layer=None, *, merged: bool = False
) -> tuple[jax.Array | LowRankSum, ...]:
    """`grouped_lora` for a forward alone, whose sums the passes that read them may add up. They
    cannot be differentiated. x: also what a pass made of an array and what was `ahead` of it."""
    a, b, scales, layer = _of_layers(a, b, scales, layer)
    if _takes_xla(backend, a):
        return base.grouped_lora(as_array(x), ys, a, b, scales, adapter, layer)
    return begin(x, ys, a, b, scales, adapter, layer, backend, merged=merged).sums


def ahead(a, scales, adapter, backend: Backend, layer) -> Ahead | None:
    """What `low_rank_sums` with these factors does first, for a pass that makes its x
    (`layer_passes`); None: no pass may begin with it."""
    if _takes_xla(backend, a):
        return None
    blocks = blocks_of_all(adapter, a[0].shape[1])
    return Ahead(tuple(a), tuple(scales), blocks, jnp.int32(layer), backend)


def _of_layers(a, b, scales, layer):
    """The factors with a leading axis of layers, and which of them is meant."""
    if layer is None:
        a, b, scales = jax.tree.map(lambda w: w[None], (tuple(a), tuple(b), tuple(scales)))
        layer = 0
    return a, b, scales, jnp.int32(layer)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _grouped_lora(x, ys, a, b, scales, adapter, layer, backend: Backend, merged: bool):
    if _takes_xla(backend, a):
        return base.grouped_lora(x, ys, a, b, scales, adapter, layer)
    return begin(x, ys, a, b, scales, adapter, layer, backend, merged=merged).arrays


def _forward(x, ys, a, b, scales, adapter, layer, backend, merged):
    sums = _grouped_lora(x, ys, a, b, scales, adapter, layer, backend, merged)
    return sums, (x, a, b, scales, adapter, layer)


def _backward(backend, merged, residuals, d_ys):
    x, a, b, scales, adapter, layer = residuals
    implementation = base if _takes_xla(backend, a) else block_backward
    own_a, own_b, own_scales = jax.tree.map(lambda w: base.of_layer(w, layer), (a, b, scales))
    dx, da, db = implementation.grouped_lora_backward(x, d_ys, own_a, own_b, own_scales, adapter)

    def of_stack(stack, gradient):
        if stack.shape[0] == 1:
            return gradient[None]
        return jnp.zeros(stack.shape, gradient.dtype).at[layer].set(gradient)

    da, db = jax.tree.map(of_stack, (a, b), (da, db))
    constants = jax.tree.map(jnp.zeros_like, scales)
    return dx, d_ys, da, db, constants, None, None


def _takes_xla(backend: Backend, a) -> bool:
    return backend.implementation == "xla" or a[0].shape[1] == 1


_grouped_lora.defvjp(_forward, _backward)


def job_lora(x, ys, a, b, scales, present, layer, sums, backend: Backend = XLA):
    """See `base.job_lora`; x may be `rows.Recalled`."""
    if backend.implementation == "xla":
        x = as_array(x)
    x, kept = computed_and_kept(x)
    return _job_lora(x, kept, tuple(ys), a, b, scales, present, layer, sums, backend)


@partial(jax.custom_vjp, nondiff_argnums=(9,))
def _job_lora(x, kept, ys, a, b, scales, present, layer, sums, backend):
    return _job_forward(x, kept, ys, a, b, scales, present, layer, sums, backend)[0]


def _job_forward(x, kept, ys, a, b, scales, present, layer, sums, backend):
    s, read = None, x if kept is None else kept
    if backend.implementation == "xla":
        out = base.job_lora(read, ys, a, b, scales, present, layer)
    else:
        out, s = one_adapter.forward(read, ys, a, b, scales, present, layer, backend)
    return out, (read, a, b, scales, present, layer, s, sums)


def _job_backward(backend, residuals, d_ys):
    x, a, b, scales, present, layer, s, sums = residuals
    shares = (x, d_ys, a, b, scales, present, layer)
    if backend.implementation == "xla":
        dx, sums = base.job_lora_backward(*shares, sums)
    else:
        dx, sums = one_adapter.backward(*shares, s, sums, backend)
    constants = jax.tree.map(jnp.zeros_like, (a, b, scales))
    return dx, None, d_ys, *constants, None, None, sums


_job_lora.defvjp(_job_forward, _job_backward)
