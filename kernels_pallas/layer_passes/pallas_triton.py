"""A layer's passes as Pallas-Triton kernels: a program has a row, or a piece of an array, loads it
once, computes in float32 and stores it."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.backend import Backend
from kernels_pallas.row_refs import RowRefs
from kernels_pallas.rows import as_array
from kernels_pallas.tuning import tiles


def add_norm(x, y, weight, eps: float, backend: Backend) -> tuple[jax.Array, jax.Array]:
    """See `base.add_norm`; x is [T, D], an array or rows of one. A program has a row."""
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    arguments = (weight,) if y is None else (weight, y)
    *total, normed = pl.pallas_call(
        partial(_add_norm_kernel, layout=RowRefs.layout(x), eps=eps),
        grid=x.shape[:1],
        out_shape=[like] * len(arguments),
        compiler_params=_row_options(backend, x),
        interpret=backend.interpret,
        name="add_norm",
    )(*RowRefs.arguments(x), *arguments)
    return (total[0] if total else as_array(x)), normed


def _add_norm_kernel(*refs, layout, eps: float):
    refs = list(refs)
    x_refs = RowRefs.take(refs, layout)
    weight_ref, *sum_refs, normed_ref = refs
    size = x_refs.shape[1]
    row, columns, mask = _row(size)
    total = x_refs.load_row(row, columns, mask).astype(jnp.float32)
    if sum_refs:
        y_ref, sum_ref = sum_refs
        # Rounded, as what reads the sum will read it.
        total = (total + _load(y_ref.at[row, columns], mask)).astype(sum_ref.dtype)
        pltriton.store(sum_ref.at[row, columns], total, mask=mask)
        total = total.astype(jnp.float32)
    normed = total * _root(total, size, eps)
    if weight_ref.dtype == normed_ref.dtype:
        normed = normed.astype(normed_ref.dtype)
    weighted = _load(weight_ref.at[columns], mask) * normed.astype(jnp.float32)
    pltriton.store(normed_ref.at[row, columns], weighted.astype(normed_ref.dtype), mask=mask)


def add_norm_backward(total, weight, d_total, d_normed, eps: float, backend: Backend) -> jax.Array:
    """The gradient of x and of y, given that of the sum, an array or rows of one, and those that
    add up to that of the norm."""
    return pl.pallas_call(
        partial(_add_norm_backward_kernel, layout=RowRefs.layout(total), eps=eps),
        grid=total.shape[:1],
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        compiler_params=_row_options(backend, total),
        interpret=backend.interpret,
        name="add_norm_backward",
    )(*RowRefs.arguments(total), weight, d_total, *d_normed)


def _add_norm_backward_kernel(*refs, layout, eps: float):
    """With n = x / rms(x) and g the gradient of n: (g - n mean(g n)) / rms(x)."""
    refs = list(refs)
    total_refs = RowRefs.take(refs, layout)
    weight_ref, d_total_ref, *d_normed_refs, d_ref = refs
    size = total_refs.shape[1]
    row, columns, mask = _row(size)
    total = total_refs.load_row(row, columns, mask).astype(jnp.float32)
    root = _root(total, size, eps)
    normed = total * root
    d_normed = sum(_load(ref.at[row, columns], mask) for ref in d_normed_refs)
    gradient = _load(weight_ref.at[columns], mask) * d_normed
    mean = jnp.sum(gradient * normed) / size
    through_norm = root * (gradient - normed * mean)
    d_total = _load(d_total_ref.at[row, columns], mask)
    pltriton.store(d_ref.at[row, columns], (d_total + through_norm).astype(d_ref.dtype), mask=mask)


def _root(total, size: int, eps: float):
    """The reciprocal of the row's root mean square."""
    return lax.rsqrt(jnp.sum(total * total) / size + eps)


def _row(width: int):
    """A program's row, the index array of its columns, and their mask."""
    size = pl.next_power_of_2(width)
    columns = lax.iota(jnp.int32, size)
    return pl.program_id(0), columns, None if size == width else columns < width


def gated_backward(gate, up, d_inner, backend: Backend) -> tuple[jax.Array, jax.Array]:
    """Gradients of `base.gated`, of arrays or rows of some, given those that add up to its own; a
    program has a piece of a row."""
    like = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
    tile = gated_tiles(backend.chip, gate.dtype)
    return pl.pallas_call(
        partial(
            _gated_backward_kernel,
            layouts=[RowRefs.layout(x) for x in (gate, up)],
            size=tile["size"],
        ),
        grid=(pl.cdiv(gate.shape[1], tile["size"]), gate.shape[0]),
        out_shape=(like, like),
        compiler_params=_options(tile),
        interpret=backend.interpret,
        name="gated_backward",
    )(*RowRefs.arguments(gate), *RowRefs.arguments(up), *d_inner)


def _gated_backward_kernel(*refs, layouts, size: int):
    """With s = sigmoid(gate): the derivative of gate s is s (1 + gate (1 - s))."""
    refs = list(refs)
    both = [RowRefs.take(refs, layout) for layout in layouts]
    *d_inner_refs, d_gate_ref, d_up_ref = refs
    row, width = pl.program_id(1), both[0].shape[1]
    columns = pl.program_id(0) * size + lax.iota(jnp.int32, size)
    mask = None if width % size == 0 else columns < width
    gate, up = (x.load_row(row, columns, mask).astype(jnp.float32) for x in both)
    d_inner = sum(_load(ref.at[row, columns], mask) for ref in d_inner_refs)
    sigmoid = 1.0 / (1.0 + jnp.exp(-gate))
    d_gate = d_inner * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = d_inner * gate * sigmoid
    for ref, gradient in ((d_gate_ref, d_gate), (d_up_ref, d_up)):
        pltriton.store(ref.at[row, columns], gradient.astype(ref.dtype), mask=mask)


def rotate_and_write(q, k, v, angles, slots, k_pages, v_pages, backend: Backend, *, merged: bool):
    """See `base.rotate_and_write`; a program has the heads of a token. merged: q, k and v are
    columns of one array, and would else be copies."""
    tokens, num_heads, head_dim = q.shape
    cos, sin = of_one_half(angles)
    flat = [pages.reshape(-1, *pages.shape[2:]) for pages in (k_pages, v_pages)]
    heads, arrays = (0, 0, 0), [q, k, v]
    if merged:
        heads = (0, num_heads, num_heads + k.shape[1])
        arrays = [jnp.concatenate([x.reshape(tokens, -1) for x in arrays], axis=1)]
        arrays = [x.reshape(tokens, -1, head_dim) for x in arrays]
    inputs = [*arrays, cos, sin, slots, *flat]
    rotated, *written = pl.pallas_call(
        partial(_rotate_and_write_kernel, first_heads=heads),
        grid=(tokens,),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *flat)),
        input_output_aliases={len(inputs) - 2: 1, len(inputs) - 1: 2},
        compiler_params=_options(rotate_tiles(backend.chip, head_dim, q.dtype)),
        interpret=backend.interpret,
        name="rotate_and_write",
    )(*inputs)
    return rotated, *(x.reshape(k_pages.shape) for x in written)


def _rotate_and_write_kernel(*refs, first_heads: tuple[int, int, int]):
    *heads_refs, cos_ref, sin_ref, slots_ref, _, _, rotated_ref, k_pages_ref, v_pages_ref = refs
    q_ref, k_ref, v_ref = heads_refs if len(heads_refs) == 3 else heads_refs * 3
    token = pl.program_id(0)
    slot = slots_ref[token]
    angles = (token, cos_ref, sin_ref, 1.0)
    kept = slot < k_pages_ref.shape[0]
    _rotate(q_ref, token, rotated_ref, token, angles, True, first_heads[0])
    _rotate(k_ref, token, k_pages_ref, slot, angles, kept, first_heads[1])
    head, column, inside = _heads(v_pages_ref, v_pages_ref.shape[2])
    at = v_ref.at[token, first_heads[2] + head, column]
    value = pltriton.load(at, mask=inside, other=0.0).astype(v_pages_ref.dtype)
    pltriton.store(v_pages_ref.at[slot, head, column], value, mask=inside & kept)


def rotate_back_and_clear(dq, dk, dv, angles, start, backend: Backend):
    """See `base.rotate_back_and_clear`; a program has the heads of a token."""
    tokens, _, head_dim = dq.shape
    cos, sin = of_one_half(angles)
    own = (tokens, *dk.shape[1:])
    return pl.pallas_call(
        partial(_rotate_back_and_clear_kernel, interpret=backend.interpret),
        grid=(tokens,),
        out_shape=(
            jax.ShapeDtypeStruct(dq.shape, dq.dtype),
            jax.ShapeDtypeStruct(own, dq.dtype),
            jax.ShapeDtypeStruct(own, dq.dtype),
            jax.ShapeDtypeStruct(dk.shape, dk.dtype),
            jax.ShapeDtypeStruct(dv.shape, dv.dtype),
        ),
        input_output_aliases={4: 3, 5: 4},
        compiler_params=_options(rotate_tiles(backend.chip, head_dim, dq.dtype)),
        interpret=backend.interpret,
        name="rotate_back_and_clear",
    )(jnp.reshape(start, (1,)).astype(jnp.int32), dq, cos, sin, dk, dv)


def _rotate_back_and_clear_kernel(
    start_ref, dq_ref, cos_ref, sin_ref, dk_ref, dv_ref,
    d_q_ref, d_k_ref, d_v_ref, clear_k_ref, clear_v_ref, *, interpret: bool,
):  # fmt: skip
    token = pl.program_id(0)
    slot = start_ref[0] + token
    angles = (token, cos_ref, sin_ref, -1.0)
    _rotate(dq_ref, token, d_q_ref, token, angles, True)
    _rotate(dk_ref, slot, d_k_ref, token, angles, True)
    head, column, inside = _heads(dv_ref, dv_ref.shape[2])
    value = _load(dv_ref.at[slot, head, column], inside).astype(d_v_ref.dtype)
    pltriton.store(d_v_ref.at[token, head, column], value, mask=inside)
    if not interpret:  # one thread may clear what another reads
        pltriton.debug_barrier()
    half_head, half_column, half_inside = _heads(dk_ref, dk_ref.shape[2] // 2)
    for i in (0, 1):
        at = (slot, half_head, half_column + i * (dk_ref.shape[2] // 2))
        zeros = jnp.zeros(half_head.shape, clear_k_ref.dtype)
        pltriton.store(clear_k_ref.at[at], zeros, mask=half_inside)
    zeros = jnp.zeros(head.shape, clear_v_ref.dtype)
    pltriton.store(clear_v_ref.at[slot, head, column], zeros, mask=inside)


def _rotate(
    ref, row, out_ref, out_row, angles, kept: bool | jax.Array, first_head: int = 0
) -> None:
    """Rotate the heads of a row, from one of them on, by a token's angles, or (-1) back."""
    token, cos_ref, sin_ref, sign = angles
    half = ref.shape[2] // 2
    head, column, inside = _heads(out_ref, half)
    rounded = out_ref.dtype
    first, second = (
        _load(ref.at[row, first_head + head, column + i * half], inside, rounded) for i in (0, 1)
    )
    cos, sin = (_load(a.at[token, column], inside, rounded) for a in (cos_ref, sin_ref))
    sin *= sign
    for i, rotated in enumerate((first * cos - second * sin, second * cos + first * sin)):
        at = out_ref.at[out_row, head, column + i * half]
        pltriton.store(at, rotated.astype(out_ref.dtype), mask=inside & kept)


def write_rows(arrays, rows, values, backend: Backend) -> list[jax.Array]:
    """See `base.write_rows`; a program has a token, and leaves if it is written nowhere."""
    counts = [len(own) for own in values]
    flat = [x for own in values for x in own]
    tile = write_tiles(backend.chip, arrays[0].dtype)
    return pl.pallas_call(
        partial(_write_rows_kernel, counts=counts, size=tile["size"]),
        grid=(rows.shape[0],),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays],
        input_output_aliases={1 + len(flat) + i: i for i in range(len(arrays))},
        compiler_params=_options(tile),
        interpret=backend.interpret,
        name="write_rows",
    )(rows, *flat, *arrays)


def _write_rows_kernel(rows_ref, *refs, counts, size: int):
    value_refs, out_refs = list(refs[: sum(counts)]), refs[-len(counts) :]
    token = pl.program_id(0)
    row = rows_ref[token]

    @pl.when(row < out_refs[0].shape[0])
    def _():
        for count, out_ref in zip(counts, out_refs, strict=True):
            first = 0
            for _ in range(count):
                ref = value_refs.pop(0)
                width = ref.shape[1]
                piece = min(size, pl.next_power_of_2(width))
                for start in range(0, width, piece):
                    column = start + lax.iota(jnp.int32, piece)
                    mask = None if start + piece <= width else column < width
                    value = pltriton.load(
                        ref.at[token, column], mask=mask, other=None if mask is None else 0.0
                    )
                    at = out_ref.at[row, first + column]
                    pltriton.store(at, value.astype(out_ref.dtype), mask=mask)
                first += width


def of_one_half(angles) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [T, H / 2]: XLA then makes no arrays of both halves."""
    cos, sin = angles
    half = cos.shape[-1] // 2
    return cos[:, 0, :half], sin[:, 0, half:]


def _heads(ref, width: int):
    """Index arrays of `width` columns of all heads, and which of them there are."""
    shape = (pl.next_power_of_2(ref.shape[1]), pl.next_power_of_2(width))
    head, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return head, column, (head < ref.shape[1]) & (column < width)


def _load(ref, mask, rounded: jnp.dtype | None = None) -> jax.Array:
    """Values in float32, zeros where masked; `rounded` to another dtype first."""
    values = pltriton.load(ref, mask=mask, other=None if mask is None else 0.0)
    if rounded is not None:
        values = values.astype(rounded)
    return values.astype(jnp.float32)


def _row_options(backend: Backend, x: jax.Array):
    return _options(row_tiles(backend.chip, x.shape[1], x.dtype))


def row_tiles(chip: str, size: int, dtype) -> dict[str, int]:
    """Of programs that have a row of so many columns."""
    default = {"num_warps": min(16, max(1, pl.next_power_of_2(size) // 512)), "num_stages": 1}
    return tiles("layer_passes", chip, tuning_key("row", size, dtype), default)


def gated_tiles(chip: str, dtype) -> dict[str, int]:
    """size: of a program's piece."""
    default = {"size": 2048, "num_warps": 4, "num_stages": 1}
    return tiles("layer_passes", chip, tuning_key("gated", 0, dtype), default)


def write_tiles(chip: str, dtype) -> dict[str, int]:
    """size: of the pieces in which a row is copied."""
    default = {"size": 4096, "num_warps": 4, "num_stages": 1}
    return tiles("layer_passes", chip, tuning_key("write", 0, dtype), default)


def rotate_tiles(chip: str, head_dim: int, dtype) -> dict[str, int]:
    """Of programs that have the heads of a token."""
    default = {"num_warps": 4, "num_stages": 1}
    return tiles("layer_passes", chip, tuning_key("rotate", head_dim, dtype), default)


def tuning_key(kernel: str, size: int, dtype) -> str:
    """What the tiles of "row", "gated", "write" or "rotate" depend on; size: of a row or a head."""
    return "/".join([kernel, *([str(size)] if size else []), jnp.dtype(dtype).name])


def _options(tile: dict[str, int]):
    return pltriton.CompilerParams(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
