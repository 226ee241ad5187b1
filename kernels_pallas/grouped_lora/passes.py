"""A layer's passes that add grouped LoRA's sums as they read them, as Pallas-Triton kernels.

A program has a block of one adapter's tokens (`blocks.blocks_of_all`), or of tokens of none, and
some columns of their rows: y + s @ b there takes what the expand kernel would read, and the sum
goes on in registers. What is low-rank of the result (the next shrink) can be begun there, too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_lora.pallas_triton import (
    compiler_params,
    dot,
    of_all_layers,
    over_columns,
    padded_rank,
    power_of_two,
    row_in,
    splits_of,
    total_of,
)
from kernels_pallas.grouped_lora.sums import LowRankCall
from kernels_pallas.tuning import tiles


def gated(call: LowRankCall) -> Float[Array, "T F"]:
    """silu(gate) * up, of a call's two sums."""
    b, first, num_adapters, ranks = _factors(call)
    tile = gated_tiles(call.backend.chip, call.blocks.tokens.shape[1], max(ranks), call.dtype)
    num_blocks, width = len(call.blocks.tokens), call.ys[0].shape[1]
    steps = pl.cdiv(width, tile["columns"])
    splits, steps_each = splits_of(steps, num_blocks, tile["programs"])
    return pl.pallas_call(
        partial(
            _gated_kernel,
            num_adapters=num_adapters,
            ranks=ranks,
            tile=tile["columns"],
            steps=steps_each,
            dtype=call.dtype,
        ),
        grid=(num_blocks, splits),
        out_shape=jax.ShapeDtypeStruct(call.ys[0].shape, call.ys[0].dtype),
        compiler_params=compiler_params(tile),
        interpret=call.backend.interpret,
        name="grouped_lora_gated",
    )(call.blocks.tokens, call.blocks.adapter, first, call.shrunk, *b, *call.ys)


def _gated_kernel(
    *refs, num_adapters: int, ranks: Sequence[int], tile: int, steps: int, dtype: Any
):
    """One block's tokens and `steps` tiles of columns."""
    *block_refs, shrunk_ref, b_gate, b_up, gate_ref, up_ref, inner_ref = refs
    own, split = _Block.of(block_refs, gate_ref, num_adapters), pl.program_id(1)
    width = inner_ref.shape[1]

    @pl.when(own.is_live)
    def _():
        gates, ups = (
            _Sum(y_ref, 0, b_ref, own.shrunk(shrunk_ref, column, rank, dtype))
            for y_ref, b_ref, column, rank in (
                (gate_ref, b_gate, 0, ranks[0]),
                (up_ref, b_up, ranks[0], ranks[1]),
            )
        )

        def add_tile(step, _):
            columns = step * tile + lax.iota(jnp.int32, tile)
            inside = None if width % tile == 0 else columns < width
            gate, up = (x.load(own, columns, inside) for x in (gates, ups))
            own.store(inner_ref, columns, inside, gate / (1.0 + jnp.exp(-gate)) * up)

        end = jnp.minimum((split + 1) * steps, pl.cdiv(width, tile))
        lax.fori_loop(split * steps, end, add_tile, None)


def rotate_and_write(
    call: LowRankCall,
    angles: tuple[Float[Array, "T H_half"], Float[Array, "T H_half"]],
    slots: Int[Array, " T"],
    k_pages: Float[Array, "S K H"],
    v_pages: Float[Array, "S K H"],
) -> tuple[Float[Array, "T N H"], Float[Array, "S K H"], Float[Array, "S K H"]]:
    """`layer_passes.base.rotate_and_write` of a call's three sums; angles: of half a head, as both
    halves have the same. A program has some heads."""
    b, first, num_adapters, ranks = _factors(call)
    kv_heads, head_dim = k_pages.shape[1:]
    counts = (call.ys[0].shape[1] // head_dim, kv_heads, kv_heads)
    tile = rotate_tiles(call.backend.chip, call.blocks.tokens.shape[1], head_dim, call.dtype)
    merged = call.merged
    arrays = [jnp.concatenate(call.ys, axis=1)] if merged else call.ys
    inputs = [call.blocks.tokens, call.blocks.adapter, first, call.shrunk, *b, *arrays]
    inputs += [*angles, slots, k_pages, v_pages]
    queries = jax.ShapeDtypeStruct((len(slots), counts[0] * head_dim), call.ys[0].dtype)
    pages = [x.reshape(-1, kv_heads * head_dim) for x in (k_pages, v_pages)]
    inputs[-2:] = pages
    rotated, *written = pl.pallas_call(
        partial(
            _rotate_and_write_kernel,
            num_adapters=num_adapters,
            ranks=ranks,
            counts=counts,
            heads=tile["heads"],
            head_dim=head_dim,
            merged=merged,
            dtype=call.dtype,
        ),
        grid=(len(call.blocks.tokens), sum(pl.cdiv(count, tile["heads"]) for count in counts)),
        out_shape=(queries, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages)),
        input_output_aliases={len(inputs) - 2: 1, len(inputs) - 1: 2},
        compiler_params=compiler_params(tile),
        interpret=call.backend.interpret,
        name="grouped_lora_rotate",
    )(*inputs)
    k_pages, v_pages = (x.reshape(-1, kv_heads, head_dim) for x in written)
    return rotated.reshape(len(slots), -1, head_dim), k_pages, v_pages


def _rotate_and_write_kernel(
    *refs,
    num_adapters: int,
    ranks: Sequence[int],
    counts: Sequence[int],
    heads: int,
    head_dim: int,
    merged: bool,
    dtype: Any,
):
    """One block's tokens and `heads` heads of queries, of keys or of values."""
    *block_refs, shrunk_ref, b_q, b_k, b_v = refs[:7]
    refs = refs[7:]
    y_refs, refs = (refs[:1] * 3, refs[1:]) if merged else (refs[:3], refs[3:])
    cos_ref, sin_ref, slots_ref, _, _, *out_refs = refs
    own, half = _Block.of(block_refs, y_refs[0], num_adapters), head_dim // 2
    column, number = lax.iota(jnp.int32, pl.next_power_of_2(half)), pl.program_id(1)

    def add_heads(j: int, group):
        kept, row = own.valid, own.tokens
        if j > 0:
            nowhere = out_refs[j].shape[0]
            row = pltriton.load(slots_ref.at[own.tokens], mask=own.valid, other=nowhere)
            kept &= row < nowhere
        out_dtype = out_refs[j].dtype
        first = head_dim * sum(counts[:j]) if merged else 0
        shrunk = own.shrunk(shrunk_ref, sum(ranks[:j]), ranks[j], dtype)
        sums = _Sum(y_refs[j], first, (b_q, b_k, b_v)[j], shrunk)
        for i in range(heads):
            head = group * heads + i
            inside = (column < half) & (head < counts[j])
            places = [head * head_dim + side * half + column for side in (0, 1)]
            halves = [sums.load(own, place, inside) for place in places]
            if j < 2:
                halves = [x.astype(out_dtype).astype(jnp.float32) for x in halves]
                cos, sin = (
                    own.load(ref, column, column < half).astype(out_dtype).astype(jnp.float32)
                    for ref in (cos_ref, sin_ref)
                )
                (one, two) = halves
                halves = [one * cos - two * sin, two * cos + one * sin]
            for place, values in zip(places, halves, strict=True):
                _store(out_refs[j], row, kept, place, inside, values)

    first = 0
    for j, count in enumerate(counts):
        groups = pl.cdiv(count, heads)
        mine = own.is_live & (number >= first) & (number < first + groups)
        pl.when(mine)(partial(add_heads, j, number - first))
        first += groups


class _Block(NamedTuple):
    """A program's tokens. is_live: there are some; used: they have an adapter; first: row of the
    layer's first adapter in a stack of all layers'."""

    number: Any
    tokens: Any
    valid: Any
    adapter: Any
    first: Any
    num_adapters: int

    @classmethod
    def of(cls, refs: Sequence[Any], like: Any, num_adapters: int) -> "_Block":
        """refs: tokens, adapter and first; like: an array with a row for each token."""
        tokens_ref, adapter_ref, first_ref = refs
        number = pl.program_id(0)
        tokens = tokens_ref[number, :]
        valid = tokens < like.shape[0]
        return cls(number, tokens, valid, adapter_ref[number], first_ref[0], num_adapters)

    @property
    def is_live(self):
        return self.adapter <= self.num_adapters

    def used(self, shape: tuple[int, ...]):
        return jnp.full(shape, self.adapter < self.num_adapters)

    def shrunk(self, ref, column: int, rank: int, dtype) -> jax.Array:
        """A projection's s [M, rank]; zeros where there is none."""
        valid = self.valid & self.used(self.valid.shape)
        return total_of(ref, self.number, valid, column, rank).astype(dtype)

    def factor(self, ref, rows, columns, inside, dtype) -> jax.Array:
        """Rows and columns of the adapter's factor; zeros beyond them, and without an adapter."""
        shape = (rows.shape[0], columns.shape[0])
        row = row_in(self.adapter, self.first, self.num_adapters, ref)
        index = (jnp.full(shape, row), over_columns(rows, shape[1]), _over_rows(columns, shape[0]))
        mask = self.used(shape)
        for place, size, axis in ((index[1], ref.shape[1], 0), (index[2], ref.shape[2], 1)):
            if size % shape[axis]:
                mask &= place < size
        if inside is not None:
            mask &= _over_rows(inside, shape[0])
        return pltriton.load(ref.at[index], mask=mask, other=0.0).astype(dtype)

    def load(self, ref, columns, inside=None) -> jax.Array:
        """Columns of the tokens' rows; zeros where there are none."""
        index, mask = _place(self.tokens, self.valid, columns, inside)
        return pltriton.load(ref.at[index], mask=mask, other=0.0)

    def store(self, ref, columns, inside, values) -> None:
        """Write columns of the tokens' rows."""
        _store(ref, self.tokens, self.valid, columns, inside, values)


class _Sum(NamedTuple):
    """y + s @ b: y is columns of an array, from `first_column` on."""

    y_ref: Any
    first_column: int
    b_ref: Any
    shrunk: jax.Array

    def load(self, own: _Block, columns, inside=None) -> jax.Array:
        """Columns of it in float32, rounded as an array of it would be."""
        y = own.load(self.y_ref, self.first_column + columns, inside)
        rank = lax.iota(jnp.int32, self.shrunk.shape[1])
        up = own.factor(self.b_ref, rank, columns, inside, self.shrunk.dtype)
        return (y.astype(jnp.float32) + dot(self.shrunk, up)).astype(y.dtype).astype(jnp.float32)


def _factors(call: LowRankCall) -> tuple[list, jax.Array, int, list[int]]:
    """All b as rows, the layer's first, adapters of a layer, and the padded ranks."""
    num_adapters = call.b[0].shape[1]
    b, first = of_all_layers(list(call.b), call.layer, num_adapters)
    return b, first, num_adapters, [padded_rank(up.shape[1]) for up in b]


def _place(rows, valid, columns, inside):
    """Index arrays of a tile, and its mask."""
    shape = (rows.shape[0], columns.shape[0])
    mask = over_columns(valid, shape[1])
    if inside is not None:
        mask &= _over_rows(inside, shape[0])
    return (over_columns(rows, shape[1]), _over_rows(columns, shape[0])), mask


def _store(ref, rows, kept, columns, inside, values) -> None:
    index, mask = _place(rows, kept, columns, inside)
    pltriton.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def _over_rows(vector, height: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, (height, vector.shape[0]), (1,))


def gated_tiles(chip: str, rows: int, rank: int, dtype) -> dict[str, int]:
    """columns: of one step; programs: how many to split a row for. Unless measured otherwise, as in
    expand (`pallas_triton.expand_tiles`), of half the columns, as there are two sums."""
    wide = jnp.dtype(dtype) == jnp.float32
    num_warps = 8 if rows == 64 else 4
    most = 1024 // rank if wide else min(8192 // rank, 1024 * num_warps // rows)
    default = {"columns": power_of_two(most, 32, 32 if wide else 256), "programs": 528}
    default |= {"num_warps": num_warps, "num_stages": 1}
    return tiles("grouped_lora", chip, pass_key("gated", rows, rank, dtype), default)


def rotate_tiles(chip: str, rows: int, head_dim: int, dtype) -> dict[str, int]:
    """heads: of one program. Products of float32 keep their factors in registers."""
    wide = jnp.dtype(dtype) == jnp.float32
    default = {"heads": 1 if wide else 2, "num_warps": 8 if wide or rows == 64 else 4}
    default |= {"num_stages": 1}
    return tiles("grouped_lora", chip, pass_key("rotate", rows, head_dim, dtype), default)


def pass_key(kernel: str, rows: int, size: int, dtype) -> str:
    """What the tiles of "gated" or "rotate" depend on: rows of a block, and the padded rank or the
    size of a head."""
    return f"{kernel}/m{rows}/r{size}/{jnp.dtype(dtype).name}"
