"""Grouped LoRA in two Pallas-Triton kernels for all projections of one input.

1. Shrink: s_j = scale_j * x @ a_j for every projection j, in one pass over x and a. A decode step
   has few blocks and a long D, which is therefore split over programs; each writes a partial sum.
2. Expand: y_j += s_j @ b_j in place. One grid covers the output tiles of every projection, and each
   program adds up the partial sums of its rows: always in the same order.

Both work on the blocks of `blocks_of_all`: a program gathers its block's tokens, reads its
adapter's factors (of a stack of many layers, those of the layer) and nothing else. Blocks of no
adapter leave at once, so rows of their tokens are never touched.

What reads the sums next may add them itself (`sums.py`, `passes.py`), and expand is not run.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from kernels_pallas.backend import Backend
from kernels_pallas.grouped_lora.blocks import BlockMap
from kernels_pallas.tuning import tiles

MOST_SPLITS = 16


def shrink(
    x: Float[Array, "T D"],
    a: Sequence[Float[Array, "L A D R"]],
    scales: Sequence[Float[Array, "L A"]],
    blocks: BlockMap,
    layer: Int[Array, ""],
    backend: Backend,
) -> Float[Array, "splits B M ranks"]:
    """scale * x @ a by block, as partial sums over D, of all projections side by side."""
    num_adapters = a[0].shape[1]
    (a, scales), first = of_all_layers((a, scales), layer, num_adapters)
    num_blocks, rows = blocks.tokens.shape
    ranks = [padded_rank(down.shape[2]) for down in a]
    tile = shrink_tiles(backend.chip, rows, sum(ranks), x.dtype)
    steps = pl.cdiv(x.shape[1], tile["columns"])
    splits, steps_each = splits_of(steps, num_blocks, tile["programs"])
    return pl.pallas_call(
        partial(
            _shrink_kernel,
            num_adapters=num_adapters,
            ranks=ranks,
            tile=tile["columns"],
            steps=steps_each,
        ),
        grid=(num_blocks, splits),
        out_shape=jax.ShapeDtypeStruct((splits, num_blocks, rows, sum(ranks)), jnp.float32),
        compiler_params=compiler_params(tile),
        interpret=backend.interpret,
        name="grouped_lora_shrink",
    )(blocks.tokens, blocks.adapter, first, x, *a, *scales)


def of_all_layers(factors: Any, layer: Int[Array, ""], num_adapters: int) -> tuple[Any, jax.Array]:
    """Factors [L, A, ...] as rows [L A, ...], and which row [1] is the layer's first adapter's."""
    rows = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), factors)
    return rows, jnp.reshape(layer * num_adapters, 1)


def splits_of(
    steps: int, num_blocks: int, programs: int, most: int = MOST_SPLITS
) -> tuple[int, int]:
    """How many programs share the steps over a row, `most` or where so many programs in all are
    enough, and the steps of each."""
    steps_each = pl.cdiv(steps, max(1, min(programs // num_blocks, most)))
    return pl.cdiv(steps, steps_each), steps_each


def tuning_key(kernel: str, rows: int, columns: int, dtype) -> str:
    """What the tiles of "shrink" or "expand" depend on: rows of a block, columns of s (of all
    projections together in shrink, of the widest in expand) and the dtype of x."""
    return f"{kernel}/m{rows}/r{columns}/{jnp.dtype(dtype).name}"


def padded_rank(rank: int) -> int:
    """A product's sizes are powers of two from 16 up."""
    return max(16, pl.next_power_of_2(rank))


def _shrink_kernel(
    tokens_ref, adapter_ref, first_ref, x_ref, *refs, num_adapters, ranks, tile, steps
):
    """One block's sum over `steps` tiles of D."""
    a_refs, scale_refs, out_ref = refs[: len(ranks)], refs[len(ranks) : -1], refs[-1]
    d_model = a_refs[0].shape[1]
    block, split = pl.program_id(0), pl.program_id(1)
    adapter = adapter_ref[block]

    @pl.when(adapter < num_adapters)
    def _():
        tokens = tokens_ref[block, :]
        rows = tokens.shape[0]
        own_row = partial(row_in, adapter, first_ref[0], num_adapters)

        def add_tile(step, sums):
            start = step * tile
            x = _load_rows(x_ref, tokens, start, tile)
            return tuple(
                total + dot(x, _load_factor(a_ref, own_row(a_ref), start, 0, tile, rank, x.dtype))
                for total, a_ref, rank in zip(sums, a_refs, ranks, strict=True)
            )

        begin = split * steps
        end = jnp.minimum(begin + steps, pl.cdiv(d_model, tile))
        zeros = tuple(jnp.zeros((rows, rank), jnp.float32) for rank in ranks)
        sums = lax.fori_loop(begin, end, add_tile, zeros)
        column = 0
        for total, scale_ref, rank in zip(sums, scale_refs, ranks, strict=True):
            out_ref[split, block, :, pl.ds(column, rank)] = scale_ref[own_row(scale_ref)] * total
            column += rank


def expand(
    shrunk: Float[Array, "splits B M ranks"],
    ys: Sequence[Float[Array, "T E"]],
    b: Sequence[Float[Array, "L A R E"]],
    blocks: BlockMap,
    layer: Int[Array, ""],
    dtype: jnp.dtype,
    backend: Backend,
    *,
    merged: bool,
) -> tuple[Float[Array, "T E"], ...]:
    """ys + s @ b in place, s the total of the partial sums, in `dtype`. merged: ys are columns of
    one array, and would else be copies."""
    num_adapters = b[0].shape[1]
    b, first = of_all_layers(b, layer, num_adapters)
    num_blocks, rows = blocks.tokens.shape
    ranks = [padded_rank(up.shape[1]) for up in b]
    tile = expand_tiles(backend.chip, rows, max(ranks), dtype)
    widths = [y.shape[1] for y in ys]
    outputs = [jnp.concatenate(ys, axis=1)] if merged else list(ys)
    counts = [pl.cdiv(width, tile["columns"]) for width in widths]
    first_y = 4 + len(b)
    sums = pl.pallas_call(
        partial(
            _expand_kernel,
            num_adapters=num_adapters,
            ranks=ranks,
            counts=counts,
            widths=widths,
            tile=tile["columns"],
            dtype=dtype,
        ),
        grid=(num_blocks, sum(counts)),
        out_shape=tuple(jax.ShapeDtypeStruct(y.shape, y.dtype) for y in outputs),
        input_output_aliases={first_y + j: j for j in range(len(outputs))},
        compiler_params=compiler_params(tile),
        interpret=backend.interpret,
        name="grouped_lora_expand",
    )(blocks.tokens, blocks.adapter, first, shrunk, *b, *outputs)
    if merged:
        return tuple(jnp.split(sums[0], [sum(widths[:j]) for j in range(1, len(ys))], axis=1))
    return tuple(sums)


def _expand_kernel(
    tokens_ref,
    adapter_ref,
    first_ref,
    sums_ref,
    *refs,
    num_adapters,
    ranks,
    counts,
    widths,
    tile,
    dtype,
):
    """One tile of one projection's output, at one block's tokens."""
    b_refs, refs = refs[: len(ranks)], refs[len(ranks) :]
    y_refs, out_refs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    merged = len(y_refs) < len(ranks)
    block, number = pl.program_id(0), pl.program_id(1)
    adapter = adapter_ref[block]
    used = adapter < num_adapters

    def add_product(j, column, rank, start):
        b_ref, y_ref, out_ref = b_refs[j], y_refs[0 if merged else j], out_refs[0 if merged else j]
        tokens = tokens_ref[block, :]
        index, mask = _rows_index(y_ref, tokens, start, tile, widths[j])
        if merged:
            index = index[0], sum(widths[:j]) + index[1]
        y = pltriton.load(y_ref.at[index], mask=mask, other=0.0)
        row = row_in(adapter, first_ref[0], num_adapters, b_ref)
        up = _load_factor(b_ref, row, 0, start, rank, tile, dtype)
        s = total_of(sums_ref, block, tokens < y_ref.shape[0], column, rank).astype(dtype)
        total = y.astype(jnp.float32) + dot(s, up)
        pltriton.store(out_ref.at[index], total.astype(y.dtype), mask=mask)

    first, column = 0, 0
    for j, (count, rank) in enumerate(zip(counts, ranks, strict=True)):
        mine = used & (number >= first) & (number < first + count)
        start = (number - first) * tile
        pl.when(mine)(partial(add_product, j, column, rank, start))
        first, column = first + count, column + rank


def row_in(adapter, first, num_adapters: int, ref):
    """An adapter's row in a stack of a layer's, or of many layers'."""
    return adapter if ref.shape[0] == num_adapters else first + adapter


def total_of(sums_ref, block, valid, column: int, rank: int) -> jax.Array:
    """One projection's s of a block: its partial sums, first to last; zeros in empty rows."""
    splits, _, rows, _ = sums_ref.shape
    shape = (rows, rank)
    row, rank_index = iota(shape, 0), column + iota(shape, 1)
    total = jnp.zeros(shape, jnp.float32)
    for split in range(splits):
        index = (jnp.full(shape, split), jnp.full(shape, block), row, rank_index)
        total += pltriton.load(sums_ref.at[index], mask=over_columns(valid, rank), other=0.0)
    return total


def _load_rows(ref, tokens, start, width: int) -> jax.Array:
    """Columns from `start` of the tokens' rows; zeros in empty rows and beyond the last column."""
    index, mask = _rows_index(ref, tokens, start, width, ref.shape[1])
    return pltriton.load(ref.at[index], mask=mask, other=0.0)


def _rows_index(ref, tokens, start, width: int, columns_of_all: int):
    shape = (tokens.shape[0], width)
    columns = start + iota(shape, 1)
    mask = over_columns(tokens < ref.shape[0], width)
    if columns_of_all % width:
        mask &= columns < columns_of_all
    return (over_columns(tokens, width), columns), mask


def _load_factor(ref, adapter, row, column, height: int, width: int, dtype) -> jax.Array:
    """A tile of one adapter's factor, with zeros beyond its last row and column."""
    shape = (height, width)
    rows, columns = row + iota(shape, 0), column + iota(shape, 1)
    mask = None
    for place, tile, size in ((rows, height, ref.shape[1]), (columns, width, ref.shape[2])):
        if size % tile:
            mask = place < size if mask is None else mask & (place < size)
    index = (jnp.full(shape, adapter), rows, columns)
    other = None if mask is None else 0.0
    return pltriton.load(ref.at[index], mask=mask, other=other).astype(dtype)


def over_columns(vector, width: int) -> jax.Array:
    """A number of each row in all of so many columns."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], width), (0,))


def iota(shape: tuple[int, int], dimension: int) -> jax.Array:
    """The rows' or the columns' numbers."""
    return lax.broadcasted_iota(jnp.int32, shape, dimension)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y in float32, without TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, precision=precision)


def shrink_tiles(chip: str, rows: int, columns: int, dtype) -> dict[str, int]:
    """columns: of x in one step of the loop; programs: how many to split D for.

    Unless measured otherwise: steps that read about 12 KiB of factors and 64 bytes or more of each
    row of x, and enough programs for three or four on each SM, or two where a step reads many rows.
    """
    itemsize = jnp.dtype(dtype).itemsize
    many_sums = rows * columns * itemsize > 16384 or (itemsize == 4 and rows == 64)
    default = {
        "columns": power_of_two(
            12288 // (columns * itemsize), 64 // itemsize, 64 if rows == 64 else 128
        ),
        "programs": 512 if rows == 16 else 264,
        "num_warps": 8 if many_sums else 4,
        "num_stages": 4,
    }
    return tiles("grouped_lora", chip, tuning_key("shrink", rows, columns, dtype), default)


def expand_tiles(chip: str, rows: int, rank: int, dtype) -> dict[str, int]:
    """columns: of y in one program.

    Unless measured otherwise: up to 16 KiB of factors, and at most 64 values of y for each thread;
    less in float32, whose products run without tensor cores and keep their factors in registers.
    """
    num_warps = 8 if rows == 64 else 4
    if jnp.dtype(dtype) == jnp.float32:
        columns = power_of_two(2048 // rank, 32, 64)
    else:
        columns = power_of_two(min(8192 // rank, 2048 * num_warps // rows), 32, 256)
    default = {"columns": columns, "num_warps": num_warps, "num_stages": 1}
    return tiles("grouped_lora", chip, tuning_key("expand", rows, rank, dtype), default)


def power_of_two(size: int, least: int, most: int) -> int:
    """The largest power of two up to size, between two others."""
    return min(max(1 << max(size, 1).bit_length() - 1, least), most)


def compiler_params(tile: dict[str, int]):
    """A tile's, for Triton."""
    return pltriton.CompilerParams(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
