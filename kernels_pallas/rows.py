"""Large arrays that stay on the device and of which a program touches a few rows: KV pages, what
finetuning keeps of each token, the adapter bank.

XLA's backend for CPUs (up to jaxlib 0.11) converts a whole bfloat16 array to float32, and back,
around every row that it writes, and so a step costs what the array costs. With the XLA kernels such
arrays therefore hold the bits of bfloat16 as uint16: only rows that are read or written are floats.
Pallas kernels take floats, and GPUs write them as they are.

A kernel also reads a part of such an array where it lies (`Rows`), which XLA would copy for it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("array", "start", "live"),
    meta_fields=("columns",),
)
@dataclass(frozen=True)
class Rows:
    """A part of an array that stays on the device: as many rows from `start` on as `live` has, and
    columns from the first up to the second. Rows that are not live read as zeros: whatever they
    hold, which may be NaN."""

    array: Shaped[Array, "S W"]
    start: Int[Array, ""]
    live: Bool[Array, " U"]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is read."""
        return self.live.shape[0], self.columns[1] - self.columns[0]

    @property
    def dtype(self) -> jnp.dtype:
        """Of what is read."""
        return jnp.dtype(jnp.bfloat16) if self.array.dtype == jnp.uint16 else self.array.dtype

    def read(self) -> jax.Array:
        """The rows as an array of their own."""
        rows = lax.dynamic_slice_in_dim(self.array, self.start, self.live.shape[0])
        return jnp.where(self.live[:, None], from_stored(rows[:, slice(*self.columns)]), 0)


@partial(jax.tree_util.register_dataclass, data_fields=("gate", "up"), meta_fields=())
@dataclass(frozen=True)
class GatedRows:
    """silu(gate) * up, which kernels compute as they read both."""

    gate: jax.Array | Rows
    up: jax.Array | Rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Of both."""
        return self.gate.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of both."""
        return self.gate.dtype

    def read(self) -> jax.Array:
        """The products as an array of their own."""
        return jax.nn.silu(as_array(self.gate)) * as_array(self.up)


@partial(jax.tree_util.register_dataclass, data_fields=("computed", "kept"), meta_fields=())
@dataclass(frozen=True)
class Recalled:
    """What was kept of an array: who reads it takes `kept`, and its gradient is that of
    `computed`, whose value is then needed for its own gradient at most."""

    computed: jax.Array
    kept: Rows | GatedRows

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.computed.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the array."""
        return self.computed.dtype

    def reshape(self, *shape: int) -> "Recalled":
        """As an array's; what is kept stays as it lies."""
        return Recalled(self.computed.reshape(*shape), self.kept)

    def read(self) -> jax.Array:
        """What was kept, as an array whose gradient is that of `computed`."""
        return _recall(self.computed, self.kept.read().reshape(self.shape))


@runtime_checkable
class Readable(Protocol):
    """What kernels read where it lies, or as it is computed; `read` makes it an array."""

    def read(self) -> jax.Array:
        """For those who read arrays alone."""
        ...


def as_array(x: jax.Array | Readable) -> jax.Array:
    """x for those who read arrays alone."""
    return x.read() if isinstance(x, Readable) else x


def recall(x: Any) -> Any:
    """x for those who read what is `Recalled` as an array, and anything else as it is."""
    return as_array(x) if isinstance(x, Recalled) else x


@jax.custom_vjp
def _recall(computed: jax.Array, saved: jax.Array) -> jax.Array:
    return saved


_recall.defvjp(lambda computed, saved: (saved, None), lambda _, gradient: (gradient, None))


def computed_and_kept(x: jax.Array | Recalled) -> tuple[jax.Array, Rows | GatedRows | None]:
    """What gradients go to, and what is read in its place if that was kept."""
    return (x.computed, x.kept) if isinstance(x, Recalled) else (x, None)
