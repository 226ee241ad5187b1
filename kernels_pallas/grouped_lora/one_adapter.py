"""LoRA of one adapter in training, in Pallas-Triton kernels: forward, and a backward that adds to
the gradients' sums in place.

1. Shrink: s_j = scale_j x a_j^T of every projection j in one launch; or d_s_j = scale_j d_y_j b_j.
   Long rows are split over programs, whose partial sums XLA adds up: in a fixed order, in one pass
   over little.
2. Expand: y_j += s_j b_j in place, a launch for each j, so that XLA drops those that nobody reads;
   or dx, the sum of all d_s_j a_j^T.
3. Gradients: a program owns a tile of one sum, walks all tokens and adds to it.

Factors are read as they are kept, float32 of many layers in one array, and rounded in registers; x
may be rows of a large array.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.backend import Backend
from kernels_pallas.row_refs import RowRefs
from kernels_pallas.tuning import tiles

MOST_SPLITS = 16


class Columns(NamedTuple):
    """Where projections lie in s, whose ranks are padded: a product's sizes are powers of two from
    16 up."""

    starts: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, a: Sequence[jax.Array]) -> "Columns":
        """Those of the factors [L, D, R]."""
        ranks = tuple(max(16, pl.next_power_of_2(w.shape[2])) for w in a)
        return cls(tuple(sum(ranks[:j]) for j in range(len(ranks))), ranks)

    @property
    def width(self) -> int:
        """Of s."""
        return sum(self.ranks)


def forward(x, ys, a, b, scales, present, layer, backend: Backend):
    """The sums, and s [T, columns]."""
    columns = Columns.of(a)
    s = _shrink([x], [a], scales, columns, present, layer, backend)
    sums = []
    for j, (y, up) in enumerate(zip(ys, b, strict=True)):
        own = Columns(columns.starts[j : j + 1], columns.ranks[j : j + 1])
        sums.append(_expand(s, [up], own, y, y.shape[1], layer, backend, transposed=False))
    return tuple(sums), s


def backward(x, d_ys, a, b, scales, present, layer, s, sums, backend: Backend):
    """dx, and `sums` (of the gradients of a, and of b) with this share added."""
    columns = Columns.of(a)
    d_s = _shrink(d_ys, [[up] for up in b], scales, columns, present, layer, backend)
    dx = _expand(d_s, a, columns, None, x.shape[1], layer, backend, transposed=True)
    return dx, _add_gradients(x, d_ys, s, d_s, sums, columns, layer, backend)


def _shrink(xs, factors, scales, columns: Columns, present, layer, backend: Backend) -> jax.Array:
    """scale_j x_j w_j of all projections, zeros for tokens that are none of the adapter's; the
    factors [L, D, R] of each x, or [L, R, E] of each of several."""
    tokens, transposed = xs[0].shape[0], len(xs) > 1 or factors[0][0].shape[1] != xs[0].shape[1]
    tile = _tile_sizes("shrink", backend, columns.width, xs[0].dtype, tokens)
    blocks = pl.cdiv(tokens, tile["rows"])
    longest = max(pl.cdiv(x.shape[1], tile["columns"]) for x in xs)
    splits = max(1, min(tile["programs"] // blocks, MOST_SPLITS, longest))
    partial_sums = pl.pallas_call(
        partial(
            _shrink_kernel,
            layouts=[RowRefs.layout(x) for x in xs],
            counts=[len(own) for own in factors],
            columns=columns,
            rows=tile["rows"],
            size=tile["columns"],
            transposed=transposed,
        ),
        grid=(blocks, splits),
        out_shape=jax.ShapeDtypeStruct((splits, tokens, columns.width), jnp.float32),
        compiler_params=_options(tile),
        interpret=backend.interpret,
        name="job_lora_shrink",
    )(
        _one(layer),
        *[argument for x in xs for argument in RowRefs.arguments(x)],
        *[w for own in factors for w in own],
        *scales,
    )
    total = jnp.where(present[:, None], jnp.sum(partial_sums, axis=0), 0.0)
    return total.astype(xs[0].dtype)


def _shrink_kernel(layer_ref, *refs, layouts, counts, columns: Columns, rows, size, transposed):
    """A block of rows, one split of each x."""
    refs = list(refs)
    xs = [RowRefs.take(refs, layout) for layout in layouts]
    w_refs, scale_refs, out_ref = refs[: sum(counts)], refs[sum(counts) : -1], refs[-1]
    block, split, splits = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    row = block * rows + _iota(rows)
    layer = layer_ref[0]
    first = 0
    for own, count in zip(xs, counts, strict=True):
        numbers = range(first, first + count)
        first += count
        steps = pl.cdiv(own.shape[1], size)

        def add_step(step, totals, own=own, numbers=numbers):
            place = step * size + _iota(size)
            x = own.load_tile(row, place)
            products = []
            for total, j in zip(totals, numbers, strict=True):
                rank = _iota(columns.ranks[j])
                if transposed:
                    w = _load(w_refs[j], rank, place, layer).astype(x.dtype).T
                else:
                    w = _load(w_refs[j], place, rank, layer).astype(x.dtype)
                products.append(total + _dot(x, w))
            return tuple(products)

        zeros = tuple(jnp.zeros((rows, columns.ranks[j]), jnp.float32) for j in numbers)
        begin, end = lax.div(steps * split, splits), lax.div(steps * (split + 1), splits)
        for total, j in zip(lax.fori_loop(begin, end, add_step, zeros), numbers, strict=True):
            scale = scale_refs[j][layer]
            at = columns.starts[j] + _iota(columns.ranks[j])
            _store(out_ref, row, at, scale * total, split)


def _expand(
    s, factors, columns: Columns, y, width: int, layer, backend: Backend, *, transposed: bool
) -> jax.Array:
    """y, if there is one, in place, and s_j w_j of all projections; w is [L, R, width], or
    transposed."""
    tile = _tile_sizes("expand", backend, sum(columns.ranks), s.dtype, s.shape[0])
    inputs = [_one(layer), s, *factors, *([] if y is None else [y])]
    return pl.pallas_call(
        partial(
            _expand_kernel,
            columns=columns,
            rows=tile["rows"],
            size=tile["columns"],
            transposed=transposed,
        ),
        grid=(pl.cdiv(s.shape[0], tile["rows"]), pl.cdiv(width, tile["columns"])),
        out_shape=jax.ShapeDtypeStruct((s.shape[0], width), s.dtype if y is None else y.dtype),
        input_output_aliases={} if y is None else {len(inputs) - 1: 0},
        compiler_params=_options(tile),
        interpret=backend.interpret,
        name="job_lora_expand",
    )(*inputs)


def _expand_kernel(layer_ref, s_ref, *refs, columns: Columns, rows, size, transposed):
    """One tile of the output."""
    w_refs, *y_refs, out_ref = refs[: len(columns.ranks)], *refs[len(columns.ranks) :]
    row = pl.program_id(0) * rows + _iota(rows)
    place = pl.program_id(1) * size + _iota(size)
    layer = layer_ref[0]
    total = jnp.zeros((rows, size), jnp.float32)
    if y_refs:
        total = _load(y_refs[0], row, place).astype(jnp.float32)
    for w_ref, start, rank in zip(w_refs, *columns, strict=True):
        s = _load(s_ref, row, start + _iota(rank))
        if transposed:
            w = _load(w_ref, place, _iota(rank), layer).astype(s.dtype).T
        else:
            w = _load(w_ref, _iota(rank), place, layer).astype(s.dtype)
        total += _dot(s, w)
    _store(out_ref, row, place, total)


def _add_gradients(x, d_ys, s, d_s, sums, columns: Columns, layer, backend: Backend):
    """sums_a_j += x^T d_s_j and sums_b_j += s_j^T d_y_j at the layer, in place."""
    tile = _tile_sizes("gradients", backend, columns.width, x.dtype, x.shape[0])
    of_a, of_b = sums
    inputs = [_one(layer), s, d_s, *RowRefs.arguments(x), *d_ys]
    counts = [pl.cdiv(array.shape[1], tile["columns"]) for array in (x, *d_ys)]
    added = pl.pallas_call(
        partial(
            _gradients_kernel,
            layout=RowRefs.layout(x),
            counts=counts,
            columns=columns,
            rows=tile["rows"],
            size=tile["columns"],
        ),
        grid=(sum(counts),),
        out_shape=[jax.ShapeDtypeStruct(w.shape, w.dtype) for w in (*of_a, *of_b)],
        input_output_aliases={len(inputs) + i: i for i in range(2 * len(of_a))},
        compiler_params=_options(tile),
        interpret=backend.interpret,
        name="job_lora_gradients",
    )(*inputs, *of_a, *of_b)
    return tuple(added[: len(of_a)]), tuple(added[len(of_a) :])


def _gradients_kernel(
    layer_ref, s_ref, d_s_ref, *refs, layout, counts, columns: Columns, rows, size
):
    """One tile: of the gradients of all a, or of that of one b."""
    refs = list(refs)
    x = RowRefs.take(refs, layout)
    number, layer, projections = pl.program_id(0), layer_ref[0], len(columns.ranks)
    d_y_refs, refs = refs[:projections], refs[projections:]
    old_refs, new_refs = refs[: 2 * projections], refs[2 * projections :]
    steps = pl.cdiv(x.shape[0], rows)

    def add(load_wide, low_ref, place, numbers, transposed: bool):
        """Products of columns of a wide array and of some projections' columns of s or d_s."""

        def add_rows(step, totals):
            row = step * rows + _iota(rows)
            wide = load_wide(row, place)
            products = []
            for total, j in zip(totals, numbers, strict=True):
                low = _load(low_ref, row, columns.starts[j] + _iota(columns.ranks[j]))
                products.append(total + (_dot(low.T, wide) if transposed else _dot(wide.T, low)))
            return tuple(products)

        def shape(j: int) -> tuple[int, int]:
            rank = columns.ranks[j]
            return (rank, size) if transposed else (size, rank)

        zeros = tuple(jnp.zeros(shape(j), jnp.float32) for j in numbers)
        for total, j in zip(lax.fori_loop(0, steps, add_rows, zeros), numbers, strict=True):
            at = (
                (_iota(columns.ranks[j]), place) if transposed else (place, _iota(columns.ranks[j]))
            )
            i = j + projections * transposed
            _store(new_refs[i], *at, total + _load(old_refs[i], *at, layer), layer)

    @pl.when(number < counts[0])
    def _():
        add(x.load_tile, d_s_ref, number * size + _iota(size), range(projections), False)

    first = counts[0]
    for j, d_y_ref in enumerate(d_y_refs):
        own = number - first

        @pl.when((own >= 0) & (own < counts[1 + j]))
        def _(j=j, d_y_ref=d_y_ref, own=own):
            add(partial(_load, d_y_ref), s_ref, own * size + _iota(size), [j], True)

        first += counts[1 + j]


def _load(ref, row, column, lead=None) -> jax.Array:
    """A tile of an array, or of its part `lead`; zeros beyond its last row and column."""
    index, mask = _place(ref, row, column, lead)
    return pltriton.load(ref.at[index], mask=mask, other=0.0)


def _store(ref, row, column, values, lead=None) -> None:
    index, mask = _place(ref, row, column, lead)
    pltriton.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def _place(ref, row, column, lead):
    shape = (row.shape[0], column.shape[0])
    rows, columns = (lax.broadcast_in_dim(x, shape, (i,)) for i, x in enumerate((row, column)))
    height, width = ref.shape[-2:]
    index = (rows, columns) if lead is None else (jnp.full(shape, lead), rows, columns)
    return index, (rows < height) & (columns < width)


def _one(layer) -> jax.Array:
    return jnp.reshape(layer, (1,)).astype(jnp.int32)


def _iota(size: int) -> jax.Array:
    return lax.iota(jnp.int32, size)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y in float32, without TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, precision=precision)


def _tile_sizes(kernel: str, backend: Backend, width: int, dtype, tokens: int) -> dict[str, int]:
    """rows: of tokens; columns: of what is wide; programs (shrink): how many to split for."""
    wide = jnp.dtype(dtype) == jnp.float32  # products of which run without tensor cores
    columns = {"shrink": 64, "expand": 128, "gradients": 64}[kernel]
    default = {"rows": 32 if wide else 64, "columns": 32 if wide else columns, "num_warps": 4}
    default |= {"num_stages": 1 if kernel == "expand" else 3}
    if width > 256:  # less of each at once, for shared memory and registers
        default |= {"columns": 32, "num_warps": 8, "num_stages": min(2, default["num_stages"])}
    if kernel == "shrink":
        default["programs"] = 264
    tile = tiles("grouped_lora", backend.chip, tuning_key(kernel, width, dtype), default)
    return tile | {"rows": min(tile["rows"], max(16, pl.next_power_of_2(tokens)))}


def tuning_key(kernel: str, width: int, dtype) -> str:
    """What the tiles of "shrink", "expand" or "gradients" depend on; width: of s."""
    return f"job-{kernel}/r{width}/{jnp.dtype(dtype).name}"


def _options(tile: dict[str, int]):
    return pltriton.CompilerParams(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
