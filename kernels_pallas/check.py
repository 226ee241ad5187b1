"""Comparing a kernel's outputs with its reference's in float32."""

from typing import Any

import jax
import jax.numpy as jnp


def widened(arguments: tuple) -> tuple:
    """The arguments with bfloat16 as float32; scales and stored 8-bit values stay."""
    wide = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x  # noqa: E731
    return jax.tree.map(wide, arguments)


def relative_error(actual: Any, expected: Any) -> float:
    """Largest error of any output, relative to the output's largest value; NaN counts as inf."""
    errors = []
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, want = (jnp.asarray(x, jnp.float32) for x in (got, want))
        scale = jnp.maximum(jnp.max(jnp.abs(want)), 1e-30)
        errors.append(float(jnp.nan_to_num(jnp.max(jnp.abs(got - want)) / scale, nan=jnp.inf)))
    return max(errors)
