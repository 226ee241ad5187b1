"""What the programs of `passes.py` have of a step: a block's tokens, low-rank sums over some
columns of their rows, and low-rank products begun there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.grouped_lora.pallas_triton import (
    dot,
    of_all_layers,
    over_columns,
    padded_rank,
    row_in,
    total_of,
)
from kernels_pallas.grouped_lora.sums import Ahead, LowRankCall


class Factors(NamedTuple):
    """What a kernel is given of low-rank factors: b of the sums that it adds, and a and scales of
    the products that it begins; of other layers, perhaps.

    ranks, ahead: those of b and of a, padded. firsts: rows [1] of the layers' first adapters in b
    and in a (of two numbers each XLA would make a kernel). ends: b, a and scales.
    """

    num_adapters: int
    ranks: tuple[int, ...]
    ahead: tuple[int, ...]
    firsts: list[jax.Array]
    ends: list[jax.Array]

    @classmethod
    def of(cls, call: LowRankCall | None, ahead: Ahead | None) -> "Factors":
        """Those of a call's sums and of what reads the result."""
        b, a, scales = (() if call is None else call.b), (), ()
        layers = [jnp.int32(0) if call is None else call.layer, jnp.int32(0)]
        if ahead is not None:
            a, scales, layers[1] = ahead.a, ahead.scales, ahead.layer
        num_adapters = (*b, *a)[0].shape[1]
        rows = [of_all_layers(w, jnp.int32(0), num_adapters)[0] for w in (*b, *a, *scales)]
        ranks = tuple(padded_rank(up.shape[2]) for up in b)
        next_ranks = tuple(padded_rank(down.shape[3]) for down in a)
        return cls(
            num_adapters,
            ranks,
            next_ranks,
            [jnp.reshape(x * num_adapters, 1) for x in layers],
            rows,
        )

    @property
    def static(self) -> dict[str, Any]:
        """What a kernel wants to know of them before it runs."""
        return {"num_adapters": self.num_adapters, "ranks": self.ranks, "ahead": self.ahead}

    def begun(self, splits: int, blocks: Any) -> list[jax.ShapeDtypeStruct]:
        """The products' partial sums, of all side by side, if there are some."""
        shape = (splits, *blocks.tokens.shape, sum(self.ahead))
        return [jax.ShapeDtypeStruct(shape, jnp.float32)] if self.ahead else []


class Block(NamedTuple):
    """A program's tokens. firsts: see `Factors`."""

    number: Any
    tokens: Any
    valid: Any
    adapter: Any
    firsts: Any
    num_adapters: int

    @classmethod
    def of(cls, refs: Sequence[Any], like: Any, num_adapters: int) -> "Block":
        """refs: tokens, adapter and both firsts; like: an array with a row for each token."""
        tokens_ref, adapter_ref, *firsts = refs
        number = pl.program_id(0)
        tokens, adapter = tokens_ref[number, :], adapter_ref[number]
        return cls(number, tokens, tokens < like.shape[0], adapter, firsts, num_adapters)

    @property
    def is_live(self) -> jax.Array:
        """There are tokens."""
        return self.adapter <= self.num_adapters

    @property
    def has_adapter(self) -> jax.Array:
        """Its tokens have one."""
        return self.adapter < self.num_adapters

    def load(self, ref, columns, inside=None) -> jax.Array:
        """Columns of the tokens' rows; zeros where there are none."""
        index, mask = _place(self.tokens, self.valid, columns, inside)
        return pltriton.load(ref.at[index], mask=mask, other=0.0)

    def store(self, ref, columns, inside, values) -> None:
        """Write columns of the tokens' rows."""
        store(ref, self.tokens, self.valid, columns, inside, values)

    def row_in(self, ref, which: int) -> jax.Array:
        """The adapter's row of a factor; which: 0 of a sum, 1 of what is begun."""
        return row_in(self.adapter, self.firsts[which][0], self.num_adapters, ref)

    def factor(self, ref, which: int, rows, columns, dtype, inside=None) -> jax.Array:
        """Rows and columns of the adapter's factor; zeros beyond them, and without an adapter.
        inside: columns to read."""
        shape = (rows.shape[0], columns.shape[0])
        index = over_columns(rows, shape[1]), over_rows(columns, shape[0])
        mask = jnp.full(shape, self.has_adapter)
        for place, own, size in zip(index, shape, ref.shape[1:], strict=True):
            if size % own:
                mask &= place < size
        if inside is not None:
            mask &= over_rows(inside, shape[0])
        index = (jnp.full(shape, self.row_in(ref, which)), *index)
        return pltriton.load(ref.at[index], mask=mask, other=0.0).astype(dtype)


class Sum(NamedTuple):
    """y + s @ b over a block's rows: y is columns of an array, from `first_column` on; without b,
    y alone. kept_ref: where to write it, as y lies."""

    y_ref: Any
    first_column: int = 0
    b_ref: Any = None
    shrunk: Any = None
    kept_ref: Any = None

    def load(self, block: Block, columns, inside=None) -> jax.Array:
        """Columns of it in float32, rounded as an array of it would be."""
        y = block.load(self.y_ref, self.first_column + columns, inside)
        if self.b_ref is None:
            return y.astype(jnp.float32)
        rank = lax.iota(jnp.int32, self.shrunk.shape[1])
        up = block.factor(self.b_ref, 0, rank, columns, self.shrunk.dtype, inside)
        total = (y.astype(jnp.float32) + dot(self.shrunk, up)).astype(y.dtype)
        if self.kept_ref is not None:
            block.store(self.kept_ref, self.first_column + columns, inside, total)
        return total.astype(jnp.float32)


def shrunk_of(block: Block, ref, ranks: Sequence[int], j: int, dtype) -> jax.Array:
    """The j-th projection's s [M, rank]; zeros where there is none."""
    valid = block.valid & jnp.full(block.valid.shape, block.has_adapter)
    return total_of(ref, block.number, valid, sum(ranks[:j]), ranks[j]).astype(dtype)


class Begun(NamedTuple):
    """Low-rank products of what a program has computed, a few columns at a time."""

    block: Block
    a_refs: Sequence[Any]
    scale_refs: Sequence[Any]
    ranks: Sequence[int]

    @property
    def zeros(self) -> tuple[jax.Array, ...]:
        """Of no columns."""
        rows = self.block.tokens.shape[0]
        return tuple(jnp.zeros((rows, rank), jnp.float32) for rank in self.ranks)

    def add(self, sums: Sequence[jax.Array], values, columns) -> tuple[jax.Array, ...]:
        """The sums with those columns' products; values beyond the last column are zeros."""
        return tuple(
            total + dot(values, self.block.factor(ref, 1, columns, _iota(rank), values.dtype))
            for total, ref, rank in zip(sums, self.a_refs, self.ranks, strict=True)
        )

    def store(self, out_refs: Sequence[Any], split, sums: Sequence[jax.Array]) -> None:
        """Write the sums, times scale."""
        if not self.ranks:
            return

        @pl.when(self.block.has_adapter)
        def _():
            column = 0
            for total, ref, rank in zip(sums, self.scale_refs, self.ranks, strict=True):
                scale = ref[self.block.row_in(ref, 1)]
                out_refs[0][split, self.block.number, :, pl.ds(column, rank)] = scale * total
                column += rank


def store(ref, rows, kept, columns, inside, values) -> None:
    """Write columns of rows, where they are to be kept."""
    index, mask = _place(rows, kept, columns, inside)
    pltriton.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def over_rows(vector, height: int) -> jax.Array:
    """A number of each column in all of so many rows."""
    return lax.broadcast_in_dim(vector, (height, vector.shape[0]), (1,))


def _place(rows, valid, columns, inside):
    """Index arrays of a tile, and its mask."""
    shape = (rows.shape[0], columns.shape[0])
    mask = over_columns(valid, shape[1])
    if inside is not None:
        mask &= over_rows(inside, shape[0])
    return (over_columns(rows, shape[1]), over_rows(columns, shape[0])), mask


def _iota(size: int) -> jax.Array:
    return lax.iota(jnp.int32, size)
