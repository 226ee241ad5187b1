"""Sums y + s @ b of grouped LoRA that are not added up yet.

A layer's next pass over y (the gated activations, the rotation) adds them as it reads them
(`passes.py`): a launch less, and y is neither read nor written once more. Whoever else reads one
(`rows.as_array`) gets it from the expand kernel, which adds all of a call's at once.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.backend import Backend
from kernels_pallas.grouped_lora import pallas_triton
from kernels_pallas.grouped_lora.blocks import BlockMap, blocks_of_all
from kernels_pallas.rows import as_array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("ys", "shrunk", "b", "blocks", "layer"),
    meta_fields=("dtype", "backend", "merged"),
)
@dataclass(frozen=True)
class LowRankCall:
    """A call of `grouped_lora` of which the first half is done.

    shrunk: partial sums of s, of all projections side by side, by block (`pallas_triton.shrink`).
    dtype: that s is rounded to. merged: ys are columns of one array.
    """

    ys: tuple[Float[Array, "T E"], ...]
    shrunk: Float[Array, "splits B M ranks"]
    b: tuple[Float[Array, "L A R E"], ...]
    blocks: BlockMap
    layer: Int[Array, ""]
    dtype: Any
    backend: Backend
    merged: bool

    @property
    def sums(self) -> tuple["LowRankSum", ...]:
        """One for each of ys."""
        return tuple(LowRankSum(self, j, y.shape) for j, y in enumerate(self.ys))

    def keep(self) -> None:
        """Somebody wants the sums as arrays, too: the pass that adds them then writes them."""
        vars(self)["kept"] = True

    @property
    def is_kept(self) -> bool:
        """Whether somebody wants the arrays."""
        return "kept" in vars(self)

    def written(self, arrays: Sequence[Float[Array, "T E"]]) -> None:
        """The sums as a pass has written them: of ys, or if those are merged of their one array."""
        if self.merged:
            ends = [sum(y.shape[1] for y in self.ys[:j]) for j in range(1, len(self.ys))]
            arrays = jnp.split(arrays[0], ends, axis=1)
        vars(self)["arrays"] = tuple(arrays)

    @cached_property
    def arrays(self) -> tuple[Float[Array, "T E"], ...]:
        """All sums, added up once."""
        return pallas_triton.expand(
            *(self.shrunk, self.ys, self.b, self.blocks, self.layer, self.dtype, self.backend),
            merged=self.merged,
        )


@partial(jax.tree_util.register_dataclass, data_fields=("call",), meta_fields=("number", "shape"))
@dataclass(frozen=True)
class LowRankSum:
    """One of a call's sums, of that shape or another of as many numbers."""

    call: LowRankCall
    number: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> jnp.dtype:
        """Of y, and of the sum."""
        return self.call.ys[self.number].dtype

    def read(self) -> jax.Array:
        """The sum as an array."""
        return self.call.arrays[self.number].reshape(self.shape)

    def keep(self) -> None:
        """See `LowRankCall.keep`."""
        self.call.keep()

    def reshape(self, *shape: int) -> "LowRankSum":
        """As an array's."""
        return replace(
            self, shape=jax.eval_shape(lambda: jnp.zeros(self.shape).reshape(shape)).shape
        )


@dataclass(frozen=True)
class Ahead:
    """What LoRA does first with an array that is not there yet: it multiplies it by these. A pass
    that makes the array may begin with that."""

    a: tuple[Float[Array, "L A D R"], ...]
    scales: tuple[Float[Array, "L A"], ...]
    blocks: BlockMap
    layer: Int[Array, ""]
    backend: Backend

    def is_of(self, a: Sequence[jax.Array]) -> bool:
        """Whether these are the factors."""
        return len(a) == len(self.a) and all(map(operator.is_, a, self.a))


@dataclass(frozen=True)
class Shrunk:
    """An array, and the partial sums of what was ahead of it."""

    array: Float[Array, "T D"]
    ahead: Ahead
    partial_sums: Float[Array, "splits B M ranks"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the array."""
        return self.array.dtype

    def read(self) -> jax.Array:
        """The array."""
        return self.array


def begin(
    x: Float[Array, "T D"] | Shrunk,
    ys: Sequence[Float[Array, "T E"]],
    a: Sequence[Float[Array, "L A D R"]],
    b: Sequence[Float[Array, "L A R E"]],
    scales: Sequence[Float[Array, "L A"]],
    adapter: Int[Array, " T"],
    layer: Int[Array, ""],
    backend: Backend,
    *,
    merged: bool,
) -> LowRankCall:
    """`base.grouped_lora` up to its sums."""
    if isinstance(x, Shrunk) and x.ahead.is_of(a):
        blocks, shrunk = x.ahead.blocks, x.partial_sums
    else:
        blocks = blocks_of_all(adapter, a[0].shape[1])
        shrunk = pallas_triton.shrink(as_array(x), a, scales, blocks, layer, backend)
    merged = merged and len(ys) > 1
    return LowRankCall(tuple(ys), shrunk, tuple(b), blocks, layer, x.dtype, backend, merged)


def call_of(*sums: Any) -> LowRankCall | None:
    """The call whose sums these are, all of them and in their order; None: there is none."""
    first = sums[0]
    if not isinstance(first, LowRankSum) or len(first.call.ys) != len(sums):
        return None
    own = [isinstance(x, LowRankSum) and x.call is first.call for x in sums]
    in_order = all(own) and [x.number for x in sums] == list(range(len(sums)))
    # Added up already, for somebody else: then that is less to read.
    return first.call if in_order and "arrays" not in vars(first.call) else None
