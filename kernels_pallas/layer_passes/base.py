"""The contracts of a layer's passes, and their XLA references.

XLA makes several kernels of each: a reduction, its reciprocal root and what is scaled by it; the
gradients of both factors; a write of keys, one of values, and queries. Where reading and writing
arrays is all that costs, each should be one.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.layer_options import Activation
from kernels_pallas.rows import set_rows

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}
Angles = tuple[Float[Array, "T 1 H"], Float[Array, "T 1 H"]]


def add_norm(
    x: Float[Array, "*B D"],
    y: Float[Array, "*B D"] | None,
    weight: Float[Array, " D"],
    eps: float,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """A residual and its root-mean-square norm (arXiv 1910.07467) over the last axis.

    Args:
        x: what came before.
        y: what is added to it; None: nothing.
        weight: of the norm.
        eps: added to the mean square.

    Returns:
        x + y, and (x + y) / sqrt(mean((x + y)^2) + eps) * weight. As in transformers the norm runs
        in float32 and is cast back before its weight is applied; after it, if the weight is
        float32 and x is not.
    """
    total = x if y is None else x + y
    wide = total.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return total, normed(wide, mean_square, weight, eps, total.dtype)


def normed(
    wide: Float[Array, "*B D"],
    mean_square: Float[Array, "*B 1"],
    weight: Float[Array, " D"],
    eps: float,
    dtype: DTypeLike,
) -> Float[Array, "*B D"]:
    """The norm of `add_norm` for float32 values whose mean square is known; in `dtype`."""
    wide = wide * jax.lax.rsqrt(mean_square + eps)
    if weight.dtype != dtype:
        return (weight * wide).astype(dtype)
    return weight * wide.astype(dtype)


def gated(
    gate: Float[Array, "T F"], up: Float[Array, "T F"], activation: Activation = "silu"
) -> Float[Array, "T F"]:
    """activation(gate) * up, the inner activations of a gated feed-forward network (arXiv
    2002.05202)."""
    return _ACTIVATIONS[activation](gate) * up


def rotate(x: Float[Array, "T N H"], angles: Angles) -> Float[Array, "T N H"]:
    """Rotate the two halves of each head by the angles, in x's dtype.

    One multiply-add over whole heads: XLA's CPU backend vectorizes it, and not a concatenation of
    rotated halves.
    """
    cos, sin = (angle.astype(x.dtype) for angle in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([second, first], axis=-1) * sin


def rotate_back_and_clear(
    dq: Float[Array, "U N H"],
    dk: Float[Array, "S K H"],
    dv: Float[Array, "S K H"],
    angles: Angles,
    start: Int[Array, ""],
) -> tuple[
    Float[Array, "U N H"],
    Float[Array, "U K H"],
    Float[Array, "U K H"],
    Float[Array, "S K H"],
    Float[Array, "S K H"],
]:
    """The gradients of what attention's inputs were before the rotation, and the accumulators ready
    for the next layer.

    Args:
        dq: gradients of a slice's rotated queries.
        dk: float32 accumulator of the gradients of rotated keys, in which the slice's rows, from
            `start` on, are complete; updated in place when donated.
        dv: that of the values.
        angles: as of `rotate_and_write`, of the slice.
        start: first row of the slice.

    Returns:
        Gradients of queries, keys and values in dq's dtype, and both accumulators with zeros in the
        slice's rows.
    """
    tokens, dtype = dq.shape[0], dq.dtype
    back = angles[0], -angles[1]

    def own(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, tokens).astype(dtype)

    def clear(x: jax.Array) -> jax.Array:
        zeros = jnp.zeros((tokens, *x.shape[1:]), x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(x, zeros, start, axis=0)

    return rotate(dq, back), rotate(own(dk), back), own(dv), clear(dk), clear(dv)


def rotate_and_write(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    angles: Angles,
    slots: Int[Array, " T"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
) -> tuple[Float[Array, "T N H"], Float[Array, "P B K H"], Float[Array, "P B K H"]]:
    """Rotate queries and keys, and put keys and values in their pages.

    Args:
        q: queries.
        k: keys.
        v: values.
        angles: cosines and sines of the rotary angles (RoFormer, arXiv 2104.09864), float32. Both
            halves of a head have the same, and the sine of the first half is negated.
        slots: page * B + offset of each token, no two the same; past the pages: written nowhere.
        k_pages: pages of a `rows.stored_dtype`; updated in place when donated.
        v_pages: the same.

    Returns:
        The rotated queries, and the pages.
    """

    def write(pages: jax.Array, values: jax.Array) -> jax.Array:
        flat = pages.reshape(-1, *pages.shape[2:])
        return set_rows(flat, slots, values).reshape(pages.shape)

    return rotate(q, angles), write(k_pages, rotate(k, angles)), write(v_pages, v)


def write_rows(
    arrays: Sequence[Shaped[Array, "S W"]],
    rows: Int[Array, " T"],
    values: Sequence[Sequence[Float[Array, "T X"]]],
) -> list[Shaped[Array, "S W"]]:
    """Overwrite rows of several arrays of a `rows.stored_dtype`, each with values that lie side by
    side in it; updated in place when donated.

    Args:
        arrays: what to write to.
        rows: no two the same; past the end: written nowhere.
        values: for each array, of all its columns.

    Returns:
        The arrays.
    """
    return [
        set_rows(array, rows, jnp.concatenate(own, axis=1))
        for array, own in zip(arrays, values, strict=True)
    ]
