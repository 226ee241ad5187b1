"""The collectives of a model that is sharded Megatron-style (arXiv 1909.08053), inside `shard_map`.

`axes` names the mesh axes that the model is split over; without axes (one device) every function
here does nothing, and leaves no trace in the program. Differentiation is written out: a sum's
gradient is whole on every device already, and the gradient of what all devices read is a sum.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Axes = tuple[str, ...]


def sum_outputs(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum of all devices' x; its gradient is each device's gradient of x."""
    return _sum_outputs(x, axes) if axes else x


def share_input(x: jax.Array, axes: Axes) -> jax.Array:
    """x, of which every device has the same and reads a part: its gradients are summed."""
    return _share_input(x, axes) if axes else x


def mean_of_devices(x: jax.Array, axes: Axes) -> jax.Array:
    """The mean of all devices' x, which each of them reads; so is its gradient."""
    return share_input(sum_outputs(x, axes), axes) / lax.axis_size(axes) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_outputs(x: jax.Array, axes: Axes) -> jax.Array:
    return lax.psum(x, axes)


_sum_outputs.defvjp(
    lambda x, axes: (lax.psum(x, axes), None), lambda axes, _, gradient: (gradient,)
)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _share_input(x: jax.Array, axes: Axes) -> jax.Array:
    return x


_share_input.defvjp(
    lambda x, axes: (x, None), lambda axes, _, gradient: (lax.psum(gradient, axes),)
)


def rows_of(table: Float[Array, "V D"], ids: Int[Array, " T"], axes: Axes) -> Float[Array, "T D"]:
    """Rows of a table that is split by rows."""
    if not axes:
        return table[ids]
    own = ids - lax.axis_index(axes) * len(table)
    inside = (own >= 0) & (own < len(table))
    rows = table[jnp.clip(own, 0, len(table) - 1)]
    return lax.psum(jnp.where(inside[:, None], rows, 0), axes)


def gather_columns(x: Float[Array, "T X"], axes: Axes) -> Float[Array, "T Y"]:
    """All devices' columns."""
    return lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


def argmax_columns(x: Float[Array, "T X"], axes: Axes) -> Int[Array, " T"]:
    """Index of the largest of all devices' columns, the first of equals."""
    own = jnp.argmax(x, axis=-1)
    if not axes:
        return own
    best = lax.all_gather(jnp.max(x, axis=-1), axes)
    where = lax.all_gather(own + lax.axis_index(axes) * x.shape[-1], axes)
    return jnp.take_along_axis(where, jnp.argmax(best, axis=0)[None], axis=0)[0]


def join_softmax(
    maximum: Float[Array, " T"],
    total: Float[Array, " T"],
    weighted: list[Float[Array, "T D"]],
    axes: Axes,
) -> tuple[Float[Array, " T"], Float[Array, " T"], list[Float[Array, "T D"]]]:
    """A softmax's maximum, denominator and weighted sums from those of each device's columns."""
    if not axes:
        return maximum, total, weighted
    joint = lax.pmax(maximum, axes)
    correction = jnp.exp(maximum - joint)
    sums = lax.psum((total * correction, [w * correction[:, None] for w in weighted]), axes)
    return joint, *sums
