"""The contracts of a layer's passes, and their XLA references.

XLA makes several kernels of each: a reduction, its reciprocal root and what is scaled by it; the
gradients of both factors; a write of keys, one of values, and queries. Where reading and writing
arrays is all that costs, each should be one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.rows import set_rows

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
        in float32 and is cast back before its weight is applied.
    """
    total = x if y is None else x + y
    wide = total.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, weight * wide.astype(total.dtype)


def gated(gate: Float[Array, "T F"], up: Float[Array, "T F"]) -> Float[Array, "T F"]:
    """silu(gate) * up, the inner activations of a gated feed-forward network (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def rotate(x: Float[Array, "T N H"], angles: Angles) -> Float[Array, "T N H"]:
    """Rotate the two halves of each head by the angles, in x's dtype.

    One multiply-add over whole heads: XLA's CPU backend vectorizes it, and not a concatenation of
    rotated halves.
    """
    cos, sin = (angle.astype(x.dtype) for angle in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([second, first], axis=-1) * sin


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
