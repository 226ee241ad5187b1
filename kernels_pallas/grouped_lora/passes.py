"""A layer's passes that add grouped LoRA's sums as they read them, as Pallas-Triton kernels.

A program has a block of one adapter's tokens (`blocks.blocks_of_all`), or of tokens of none, and
some columns of their rows: y + s @ b there takes what the expand kernel would read, and the sum
goes on in registers. The low-rank products of the result, which the next projections' adapters
shrink, are begun there, too (`sums.Ahead`).
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

from kernels_pallas.grouped_lora.block_refs import Begun, Block, Factors, Sum, shrunk_of, store
from kernels_pallas.grouped_lora.pallas_triton import (
    compiler_params,
    over_columns,
    power_of_two,
    splits_of,
)
from kernels_pallas.grouped_lora.sums import Ahead, LowRankCall, Shrunk
from kernels_pallas.row_refs import gated_tile
from kernels_pallas.tuning import tiles

MOST_SPLITS = 32  # programs that share a block's rows


def gated(
    call: LowRankCall, ahead: Ahead | None = None
) -> tuple[Float[Array, "T F"], Float[Array, "T F"] | Shrunk]:
    """silu(gate) * up, of a call's two sums, for two readers, of which the second begins with what
    is `ahead`."""
    factors, blocks, y = Factors.of(call, ahead), call.blocks, call.ys[0]
    num_blocks, rows = blocks.tokens.shape
    tile = gated_tiles(call.backend.chip, rows, max(factors.ranks + factors.ahead), call.dtype)
    steps = pl.cdiv(y.shape[1], tile["columns"])
    splits, steps = splits_of(steps, num_blocks, tile["programs"], MOST_SPLITS)
    kept = [jax.ShapeDtypeStruct(y.shape, y.dtype)] * 2 if call.is_kept else []
    inner, *others = pl.pallas_call(
        partial(
            _gated_kernel,
            **factors.static,
            tile=tile["columns"],
            steps=steps,
            keep=call.is_kept,
            dtype=call.dtype,
        ),
        grid=(num_blocks, splits),
        out_shape=(jax.ShapeDtypeStruct(y.shape, y.dtype), *kept, *factors.begun(splits, blocks)),
        input_output_aliases={5 + j: 1 + j for j in range(len(kept))},
        compiler_params=compiler_params(tile),
        interpret=call.backend.interpret,
        name="grouped_lora_gated",
    )(*blocks[:2], *factors.firsts, call.shrunk, *call.ys, *factors.ends)
    if kept:
        call.written(others[:2])
    return inner, inner if ahead is None else Shrunk(inner, ahead, others[-1])


def _gated_kernel(
    *refs, num_adapters: int, ranks, ahead, tile: int, steps: int, keep: bool, dtype: Any
):
    """One block's tokens and `steps` tiles of columns."""
    *block_refs, shrunk_ref, gate_ref, up_ref, b_gate, b_up = refs[:9]
    a_refs, scale_refs, (inner_ref, *refs) = _cut(refs[9:], len(ahead), len(ahead))
    kept_refs, begun_refs = (refs[:2], refs[2:]) if keep else ((None, None), refs)
    block, split = Block.of(block_refs, gate_ref, num_adapters), pl.program_id(1)
    begun, width = Begun(block, a_refs, scale_refs, ahead), inner_ref.shape[1]

    @pl.when(block.is_live)
    def _():
        s = [shrunk_of(block, shrunk_ref, ranks, j, dtype) for j in (0, 1)]
        both = (
            Sum(gate_ref, 0, b_gate, s[0], kept_refs[0]),
            Sum(up_ref, 0, b_up, s[1], kept_refs[1]),
        )

        def add_tile(step, sums):
            columns, inside = _columns(step, tile, width)
            gate, up = (x.load(block, columns, inside) for x in both)
            inner = gated_tile(gate, up).astype(inner_ref.dtype)
            block.store(inner_ref, columns, inside, inner)
            return begun.add(sums, inner, columns)

        end = jnp.minimum((split + 1) * steps, pl.cdiv(width, tile))
        begun.store(begun_refs, split, lax.fori_loop(split * steps, end, add_tile, begun.zeros))


def add_norm(
    x: Float[Array, "T D"],
    y: Float[Array, "T D"] | LowRankCall,
    weight: Float[Array, " D"],
    eps: float,
    ahead: Ahead,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"], Shrunk]:
    """`layer_passes.base.add_norm`, its norm for two readers, of which the second begins with what
    is `ahead`; y: or a call's one sum.

    In two passes. The first adds, and begins both what the norm is divided by and the low-rank
    products, of x + y times the weight: (x / r * w) @ a = (x * w) @ a / r. It has blocks and
    columns a program. The second, of a row a program, divides both by the root of the mean square.
    """
    call = y if isinstance(y, LowRankCall) else None
    factors, blocks, backend = Factors.of(call, ahead), ahead.blocks, ahead.backend
    num_blocks, rows = blocks.tokens.shape
    tile = add_tiles(backend.chip, rows, max(factors.ranks + factors.ahead), x.dtype)
    steps = pl.cdiv(x.shape[1], tile["columns"])
    splits, steps = splits_of(steps, num_blocks, tile["programs"], MOST_SPLITS)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, squares, begun = pl.pallas_call(
        partial(
            _add_kernel,
            **factors.static,
            tile=tile["columns"],
            steps=steps,
            dtype=x.dtype,
        ),
        grid=(num_blocks, splits),
        out_shape=(
            like,
            jax.ShapeDtypeStruct((splits, num_blocks, rows), jnp.float32),
            *factors.begun(splits, blocks),
        ),
        compiler_params=compiler_params(tile),
        interpret=backend.interpret,
        name="grouped_lora_add",
    )(
        *(*blocks[:2], *factors.firsts, x, weight),
        *((y,) if call is None else (call.ys[0], call.shrunk)),
        *factors.ends,
    )
    normed, shrunk = pl.pallas_call(
        partial(_norm_kernel, eps=eps),
        grid=x.shape[:1],
        out_shape=(like, jax.ShapeDtypeStruct((1, *begun.shape[1:]), jnp.float32)),
        compiler_params=compiler_params(norm_tiles(backend.chip, x.shape[1], x.dtype)),
        interpret=backend.interpret,
        name="grouped_lora_norm",
    )(blocks.place, total, weight, squares, begun)
    return total, normed, Shrunk(normed, ahead, shrunk)


def _add_kernel(*refs, num_adapters: int, ranks, ahead, tile: int, steps: int, dtype: Any):
    """One block's tokens and `steps` tiles of columns."""
    *block_refs, x_ref, weight_ref, y_ref = refs[:7]
    shrunk_ref, b_refs, rest = _cut(refs[7:], len(ranks), len(ranks))
    a_refs, scale_refs, (total_ref, squares_ref, *begun_refs) = _cut(rest, len(ahead), len(ahead))
    block, split = Block.of(block_refs, x_ref, num_adapters), pl.program_id(1)
    begun, width = Begun(block, a_refs, scale_refs, ahead), x_ref.shape[1]

    @pl.when(block.is_live)
    def _():
        y = Sum(y_ref)
        if ranks:
            y = Sum(y_ref, 0, b_refs[0], shrunk_of(block, shrunk_ref[0], ranks, 0, dtype))

        def add_tile(step, carry):
            squares, *sums = carry
            columns, inside = _columns(step, tile, width)
            x = block.load(x_ref, columns, inside).astype(jnp.float32)
            total = (x + y.load(block, columns, inside)).astype(total_ref.dtype)
            block.store(total_ref, columns, inside, total)
            total = total.astype(jnp.float32)  # rounded, as what reads it will read it
            weight = pltriton.load(
                weight_ref.at[columns], mask=inside, other=None if inside is None else 0.0
            ).astype(jnp.float32)
            weighted = (total * lax.broadcast_in_dim(weight, total.shape, (1,))).astype(dtype)
            squares += jnp.sum(total * total, axis=1)
            return squares, *begun.add(sums, weighted, columns)

        zeros = jnp.zeros(block.tokens.shape, jnp.float32), *begun.zeros
        end = jnp.minimum((split + 1) * steps, pl.cdiv(width, tile))
        squares, *sums = lax.fori_loop(split * steps, end, add_tile, zeros)
        squares_ref[split, block.number, :] = squares
        begun.store(begun_refs, split, sums)


def _norm_kernel(
    place_ref, total_ref, weight_ref, squares_ref, begun_ref, normed_ref, shrunk_ref, *, eps: float
):
    """A token's row."""
    row, (splits, _, rows, width) = pl.program_id(0), begun_ref.shape
    place = place_ref[row]
    block, at = lax.div(place, rows), lax.rem(place, rows)
    split, column = (lax.iota(jnp.int32, pl.next_power_of_2(n)) for n in (splits, width))
    squares = pltriton.load(squares_ref.at[split, block, at], mask=split < splits, other=0.0)
    root = lax.rsqrt(jnp.sum(squares) / total_ref.shape[1] + eps)

    shape = (split.shape[0], column.shape[0])
    index = over_columns(split, shape[1]), lax.broadcast_in_dim(column, shape, (1,))
    begun = pltriton.load(
        begun_ref.at[index[0], jnp.full(shape, block), jnp.full(shape, at), index[1]],
        mask=(index[0] < splits) & (index[1] < width),
        other=0.0,
    )
    inside = column < width
    own = shrunk_ref.at[jnp.full(column.shape, 0), block, at, column]
    pltriton.store(own, jnp.sum(begun, axis=0) * root, mask=inside)

    columns = lax.iota(jnp.int32, pl.next_power_of_2(total_ref.shape[1]))
    inside = None if columns.shape[0] == total_ref.shape[1] else columns < total_ref.shape[1]
    other = None if inside is None else 0.0
    total = pltriton.load(total_ref.at[row, columns], mask=inside, other=other)
    weight = pltriton.load(weight_ref.at[columns], mask=inside, other=other)
    normed = total.astype(jnp.float32) * root
    if weight.dtype == normed_ref.dtype:
        normed = normed.astype(normed_ref.dtype).astype(jnp.float32)
    weighted = (weight.astype(jnp.float32) * normed).astype(normed_ref.dtype)
    pltriton.store(normed_ref.at[row, columns], weighted, mask=inside)


def rotate_and_write(
    call: LowRankCall,
    angles: tuple[Float[Array, "T H_half"], Float[Array, "T H_half"]],
    slots: Int[Array, " T"],
    k_pages: Float[Array, "S K H"],
    v_pages: Float[Array, "S K H"],
) -> tuple[Float[Array, "T N H"], Float[Array, "S K H"], Float[Array, "S K H"]]:
    """`layer_passes.base.rotate_and_write` of a call's three sums; angles: of half a head, as both
    halves have the same. A program has some heads."""
    factors, blocks = Factors.of(call, None), call.blocks
    kv_heads, head_dim = k_pages.shape[1:]
    counts = (call.ys[0].shape[1] // head_dim, kv_heads, kv_heads)
    tile = rotate_tiles(call.backend.chip, blocks.tokens.shape[1], head_dim, call.dtype)
    merged = call.merged
    arrays = [jnp.concatenate(call.ys, axis=1)] if merged else call.ys
    inputs = [*blocks[:2], *factors.firsts, call.shrunk, *factors.ends, *arrays]
    inputs += [*angles, slots, k_pages, v_pages]
    queries = jax.ShapeDtypeStruct((len(slots), counts[0] * head_dim), call.ys[0].dtype)
    pages = [x.reshape(-1, kv_heads * head_dim) for x in (k_pages, v_pages)]
    inputs[-2:] = pages
    first_y = 5 + len(factors.ends)
    kept = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in arrays] if call.is_kept else []
    rotated, k_pages, v_pages, *sums = pl.pallas_call(
        partial(
            _rotate_and_write_kernel,
            **factors.static,
            counts=counts,
            heads=tile["heads"],
            head_dim=head_dim,
            merged=merged,
            keep=call.is_kept,
            dtype=call.dtype,
        ),
        grid=(len(blocks.tokens), sum(pl.cdiv(count, tile["heads"]) for count in counts)),
        out_shape=(queries, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages), *kept),
        input_output_aliases={len(inputs) - 2: 1, len(inputs) - 1: 2}
        | {first_y + j: 3 + j for j in range(len(kept))},
        compiler_params=compiler_params(tile),
        interpret=call.backend.interpret,
        name="grouped_lora_rotate",
    )(*inputs)
    if kept:
        call.written(sums)
    k_pages, v_pages = (x.reshape(-1, kv_heads, head_dim) for x in (k_pages, v_pages))
    return rotated.reshape(len(slots), -1, head_dim), k_pages, v_pages


def _rotate_and_write_kernel(
    *refs,
    num_adapters: int,
    ranks: Sequence[int],
    ahead: Sequence[int],
    counts: Sequence[int],
    heads: int,
    head_dim: int,
    merged: bool,
    keep: bool,
    dtype: Any,
):
    """One block's tokens and `heads` heads of queries, of keys or of values."""
    *block_refs, shrunk_ref, b_q, b_k, b_v = refs[:8]
    refs = refs[8:]
    y_refs, refs = (refs[:1] * 3, refs[1:]) if merged else (refs[:3], refs[3:])
    cos_ref, sin_ref, slots_ref, _, _, *refs = refs
    out_refs, kept_refs = refs[:3], refs[3:] * (3 if merged else 1) if keep else [None] * 3
    block, half = Block.of(block_refs, y_refs[0], num_adapters), head_dim // 2
    column, number = lax.iota(jnp.int32, pl.next_power_of_2(half)), pl.program_id(1)

    def add_heads(j: int, group):
        kept, row = block.valid, block.tokens
        if j > 0:
            nowhere = out_refs[j].shape[0]
            row = pltriton.load(slots_ref.at[block.tokens], mask=block.valid, other=nowhere)
            kept &= row < nowhere
        out_dtype = out_refs[j].dtype
        first = head_dim * sum(counts[:j]) if merged else 0
        shrunk = shrunk_of(block, shrunk_ref, ranks, j, dtype)
        sums = Sum(y_refs[j], first, (b_q, b_k, b_v)[j], shrunk, kept_refs[j])
        for i in range(heads):
            head = group * heads + i
            inside = (column < half) & (head < counts[j])
            places = [head * head_dim + side * half + column for side in (0, 1)]
            halves = [sums.load(block, place, inside) for place in places]
            if j < 2:
                halves = [x.astype(out_dtype).astype(jnp.float32) for x in halves]
                cos, sin = (
                    block.load(ref, column, column < half).astype(out_dtype).astype(jnp.float32)
                    for ref in (cos_ref, sin_ref)
                )
                (one, two) = halves
                halves = [one * cos - two * sin, two * cos + one * sin]
            for place, values in zip(places, halves, strict=True):
                store(out_refs[j], row, kept, place, inside, values)

    first = 0
    for j, count in enumerate(counts):
        groups = pl.cdiv(count, heads)
        mine = block.is_live & (number >= first) & (number < first + groups)
        pl.when(mine)(partial(add_heads, j, number - first))
        first += groups


def _cut(refs: Sequence[Any], *counts: int) -> tuple[Any, ...]:
    """So many first, so many then, and the rest."""
    parts, at = [], 0
    for count in counts:
        parts.append(refs[at : at + count])
        at += count
    return *parts, refs[at:]


def _columns(step, tile: int, width: int):
    """A tile's columns, and which of them there are; None: all."""
    columns = step * tile + lax.iota(jnp.int32, tile)
    return columns, None if width % tile == 0 else columns < width


def gated_tiles(chip: str, rows: int, rank: int, dtype) -> dict[str, int]:
    """columns: of one step; programs: how many to split a row for. Unless measured otherwise, 16
    values of a sum for each thread, beside their addresses."""
    return _tiles_of_sums("gated", chip, rows, rank, dtype)


def add_tiles(chip: str, rows: int, rank: int, dtype) -> dict[str, int]:
    """columns: of one step; programs: how many to split a row for. As `gated_tiles`."""
    return _tiles_of_sums("add", chip, rows, rank, dtype)


def norm_tiles(chip: str, size: int, dtype) -> dict[str, int]:
    """Of programs that have a row of so many columns."""
    default = {"num_warps": min(16, max(1, pl.next_power_of_2(size) // 512)), "num_stages": 1}
    return tiles("grouped_lora", chip, norm_key(size, dtype), default)


def norm_key(size: int, dtype) -> str:
    """What the tiles of "norm" depend on: a row's columns."""
    return f"norm/{size}/{jnp.dtype(dtype).name}"


def rotate_tiles(chip: str, rows: int, head_dim: int, dtype) -> dict[str, int]:
    """heads: of one program. Products of float32 keep their factors in registers."""
    wide = jnp.dtype(dtype) == jnp.float32
    default = {"heads": 1 if wide else 2, "num_warps": 8 if wide or rows == 64 else 4}
    default |= {"num_stages": 1}
    return tiles("grouped_lora", chip, pass_key("rotate", rows, head_dim, dtype), default)


def pass_key(kernel: str, rows: int, size: int, dtype) -> str:
    """What the tiles of "gated", "add" or "rotate" depend on: rows of a block, and the largest
    padded rank or the size of a head."""
    return f"{kernel}/m{rows}/r{size}/{jnp.dtype(dtype).name}"


def _tiles_of_sums(kernel: str, chip: str, rows: int, rank: int, dtype) -> dict[str, int]:
    wide = jnp.dtype(dtype) == jnp.float32
    num_warps = 4 if rows < 64 and not wide else 8
    most = 1024 // rank if wide else min(4096 // rank, 512 * num_warps // rows)
    default = {"columns": power_of_two(most, 32, 32 if wide else 128), "num_warps": num_warps}
    default |= {"programs": 1056 if rows == 16 else 528, "num_stages": 1}
    return tiles("grouped_lora", chip, pass_key(kernel, rows, rank, dtype), default)
