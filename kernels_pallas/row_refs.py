"""How Triton kernels read rows: of an array of their own, or where they lie in a large one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.rows import GatedRows, Rows


class RowRefs(NamedTuple):
    """References to rows [U, W], and where in their array they are.

    array: the rows, or with `start` what they are a part of. start: [1], the first of them. live:
    [U], other than zero where a row is read.
    """

    array: Any
    start: Any
    live: Any
    first_column: int
    shape: tuple[int, ...]

    @staticmethod
    def arguments(x: jax.Array | Rows | GatedRows) -> list[jax.Array]:
        """What a kernel is given of x."""
        if isinstance(x, GatedRows):
            return [*RowRefs.arguments(x.gate), *RowRefs.arguments(x.up)]
        if isinstance(x, Rows):
            start = jnp.reshape(x.start, (1,)).astype(jnp.int32)
            return [x.array, start, x.live.astype(jnp.int32)]
        return [x]

    @staticmethod
    def layout(x: jax.Array | Rows | GatedRows) -> tuple[Any, ...]:
        """What `take` wants to know of x: static."""
        if isinstance(x, GatedRows):
            return RowRefs.layout(x.gate), RowRefs.layout(x.up)
        return isinstance(x, Rows), x.columns[0] if isinstance(x, Rows) else 0, x.shape

    @classmethod
    def take(cls, refs: list, layout: tuple[Any, ...]) -> Any:
        """References to `arguments`, taken from the front of a kernel's; of both factors
        `GatedRefs`."""
        if len(layout) == 2:
            return GatedRefs(*(cls.take(refs, own) for own in layout))
        in_place, column, shape = layout
        others = (refs.pop(1), refs.pop(1)) if in_place else (None, None)
        return cls(refs.pop(0), *others, column, shape)

    def load_row(self, row, column, mask=None) -> jax.Array:
        """Columns of one row; zeros where masked."""
        if self.start is not None:
            live = jnp.full(column.shape, self.live[row] != 0)
            mask = live if mask is None else mask & live
            row = self.start[0] + row
        index = (jnp.full(column.shape, row), self.first_column + column)
        return _load(self.array, index, mask)

    def load_tile(self, row, column) -> jax.Array:
        """Columns of rows; zeros beyond the last of both."""
        read = row < self.shape[0]
        if self.start is not None:
            read = pltriton.load(self.live.at[row], mask=read, other=0) != 0
            row = self.start[0] + row
        shape = (row.shape[0], column.shape[0])
        rows, read = (lax.broadcast_in_dim(x, shape, (0,)) for x in (row, read))
        columns = lax.broadcast_in_dim(column, shape, (1,))
        index = (rows, self.first_column + columns)
        return _load(self.array, index, read & (columns < self.shape[1]))


class GatedRefs(NamedTuple):
    """References to `rows.GatedRows`."""

    gate: RowRefs
    up: RowRefs

    @property
    def shape(self) -> tuple[int, ...]:
        """Of both."""
        return self.gate.shape

    def load_tile(self, row, column) -> jax.Array:
        """Columns of rows of the products; zeros beyond the last of both."""
        gate, up = (x.load_tile(row, column) for x in self)
        return gated_tile(*(x.astype(jnp.float32) for x in (gate, up))).astype(gate.dtype)


def gated_tile(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, of float32 tiles in a kernel."""
    return gate / (1.0 + jnp.exp(-gate)) * up


def _load(ref, index, mask) -> jax.Array:
    return pltriton.load(ref.at[index], mask=mask, other=None if mask is None else 0.0)
