"""Large arrays that stay on the device and of which a program touches a few rows: KV pages, what
finetuning keeps of each token, the adapter bank.

XLA's backend for CPUs (up to jaxlib 0.11) converts a whole bfloat16 array to float32, and back,
around every row that it writes, and so a step costs what the array costs. With the XLA kernels such
arrays therefore hold the bits of bfloat16 as uint16: only rows that are read or written are floats.
Pallas kernels take floats, and GPUs write them as they are.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kernels_pallas.backend import Backend


def stored_dtype(dtype: jnp.dtype, backend: Backend) -> jnp.dtype:
    """What an array of rows of `dtype` is made of."""
    as_bits = dtype == jnp.bfloat16 and backend.implementation == "xla"
    return jnp.dtype(jnp.uint16 if as_bits else dtype)


def to_stored(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Values as an array of `dtype`, a `stored_dtype`, holds them."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), dtype)
    return values.astype(dtype)


def from_stored(rows: jax.Array) -> jax.Array:
    """Rows as floats, from an array of a `stored_dtype`."""
    return lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def set_rows(array: jax.Array, rows: Int[Array, " T"], values: jax.Array) -> jax.Array:
    """Overwrite rows, no two of them the same; those past the end are dropped."""
    values = to_stored(values, array.dtype)
    return array.at[rows].set(values, mode="drop", unique_indices=True)
