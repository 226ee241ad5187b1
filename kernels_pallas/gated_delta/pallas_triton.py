"""The gated delta rule in three Pallas-Triton kernels.

1. decode: a program has columns of one head's state of one sequence, reads them, moves them by one
   token, and writes them.
2. prepare: a program has a chunk of one head, and does what does not depend on the state: the
   decays, and the inverse of the chunk's triangular system.
3. walk: a program has columns of one head's state of one sequence, and walks its chunks.

Rows of a chunk that are not its own, and padding, are loaded as zeros, and so leave states alone.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.backend import Backend
from kernels_pallas.gated_delta.base import CHUNK, cut, unit_lower_inverse
from kernels_pallas.tuning import tiles

_SHORT_CHUNKS = 16  # programs for them, and for sequences; they take turns where there are more


def delta_rule(
    q, k, v, log_decay, beta, state, query_starts, fresh, read_slot, write_slot, num_decode,
    num_sequences, window_row, windows, *, unit_tokens: int, backend: Backend,
):  # fmt: skip
    """See `base.delta_rule`."""
    tokens, slots = v.shape[0], state.shape[0]
    sequences = fresh.shape[0]
    counts = jnp.stack([num_decode, num_sequences]).astype(jnp.int32)
    read = jnp.where(fresh, -1, read_slot).astype(jnp.int32)
    write = jnp.where(write_slot < slots, write_slot, -1).astype(jnp.int32)
    rows = (q, k, v, log_decay, beta)
    out, state = _decode(counts, read, write, rows, state, backend)

    trains = windows is not None
    unit = unit_tokens if trains else CHUNK
    size = _chunk_size(min(tokens, unit))
    microbatch = windows.shape[0] * unit_tokens if trains else 0
    cuts = cut(query_starts, num_decode, num_sequences, window_row, microbatch, unit_tokens, size)
    ends = jnp.cumsum(cuts.count)
    most = min(tokens, tokens * pl.cdiv(unit, size) // unit + 2 * min(tokens, sequences))
    index = jnp.arange(most)
    owner = jnp.searchsorted(ends, index, side="right", method="compare_all")
    owner = jnp.minimum(owner, sequences - 1)
    span = cuts.span(owner, index - (ends - cuts.count)[owner], size)
    begins = ~(fresh[owner] & (span.first == query_starts[owner]))
    chunks = _Chunks(
        ends[-1:].astype(jnp.int32),
        _table(span.first, span.start, span.end, jnp.where(begins, span.window, -1)),
        jnp.zeros(tokens, jnp.int32),
        size,
    )
    prepared = _prepare(chunks, rows, min(most, pl.cdiv(tokens, size) + _SHORT_CHUNKS), backend)
    table = _table(ends - cuts.count, ends, read, write)
    walk = (min(tokens, sequences, _SHORT_CHUNKS), backend)
    out, state, *windows = _walk(counts, table, chunks, rows, prepared, state, out, windows, *walk)
    return out, state, windows[0] if trains else None


def delta_window(
    q, k, v, log_decay, beta, first, is_token, state, *, backend: Backend
) -> tuple[jax.Array, jax.Array]:
    """See `base.delta_window`."""
    rows = (q, k, v, log_decay, beta)
    chunks = window_chunks(first, is_token)
    prepared = _prepare(chunks, rows, chunks.table.shape[0], backend)
    out, state, *_ = walk_window(chunks, rows, prepared, first, state, None, backend)
    return out, state


class _Chunks(NamedTuple):
    """The chunks of a call, as arrays.

    count [1]: how many there are. table [N, 4]: of each, its first row, [start, end) of the rows
    that it may have, and the window to write the state before it to, or -1. segment [T]: of each
    row, which of its chunk's sequences it is of; padding has -1 minus that. size: rows of a chunk.
    """

    count: jax.Array
    table: jax.Array
    segment: jax.Array
    size: int


class Prepared(NamedTuple):
    """What `prepare` leaves for each row of each head, in the dtype of the values and in float32.

    inverse, scores [T, Hv, C]: the row of the chunk's inverse, and its products with keys times
    their decays. carried, kept [T, Hv]: how much of the state before the chunk the row sees, and
    how much of what it wrote is there after the chunk.
    """

    inverse: jax.Array
    scores: jax.Array
    carried: jax.Array
    kept: jax.Array


def window_chunks(first, is_token) -> _Chunks:
    """A window's chunks, each of which writes the state before it."""
    tokens = first.shape[0]
    size = _chunk_size(tokens)
    number = jnp.arange(pl.cdiv(tokens, size), dtype=jnp.int32)
    begins = jnp.pad(first & is_token, (0, -tokens % size)).reshape(-1, size)
    segment = jnp.cumsum(begins, axis=1, dtype=jnp.int32).reshape(-1)[:tokens]
    count = jnp.full(1, number.shape[0], jnp.int32)
    table = _table(number * size, 0 * number, 0 * number + tokens, number)
    return _Chunks(count, table, jnp.where(is_token, segment, -1 - segment), size)


def prepare_window(chunks: _Chunks, rows: tuple, backend: Backend) -> Prepared:
    """A window's chunks prepared."""
    return _prepare(chunks, rows, chunks.table.shape[0], backend)


def walk_window(chunks: _Chunks, rows: tuple, prepared: Prepared, first, state, states, backend):
    """Outputs, and the state after a window. If `states` is given, u, the state, and the states
    before its chunks."""
    fresh = (first & (chunks.segment >= 0))[0]
    slot = jnp.where(fresh, -1, 0)
    table = _table(jnp.zeros(1, jnp.int32), chunks.count, slot[None], jnp.zeros(1, jnp.int32))
    counts = jnp.array([0, 1], jnp.int32)
    out = jnp.zeros(rows[2].shape, rows[2].dtype)
    out, state, *states = _walk(
        counts, table, chunks, rows, prepared, state[None], out, states, 1, backend,
        reads=states is None,
    )  # fmt: skip
    return out, state[0], *states


def _chunk_size(tokens: int) -> int:
    return min(CHUNK, max(16, pl.next_power_of_2(tokens)))


def _table(*columns):
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)


def _decode(counts, read, write, rows, state, backend: Backend):
    """Outputs of the decoding sequences, other rows of which hold anything, and the states."""
    tokens, value_heads, dv = rows[2].shape
    tile = decode_tiles(backend.chip, state.shape[2], dv)
    columns = min(tile["columns"], pl.next_power_of_2(dv))
    inputs = (counts, read, write, *rows, state)
    return pl.pallas_call(
        partial(_decode_kernel, columns=columns),
        grid=(min(tokens, read.shape[0]), value_heads, pl.cdiv(dv, columns)),
        out_shape=(
            jax.ShapeDtypeStruct(rows[2].shape, rows[2].dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ),
        input_output_aliases={len(inputs) - 1: 1},
        compiler_params=options(tile),
        interpret=backend.interpret,
        name="delta_decode",
    )(*inputs)


def _decode_kernel(
    counts_ref, read_ref, write_ref, q_ref, k_ref, v_ref, decay_ref, beta_ref, state_ref,
    out_ref, new_state_ref, *, columns: int,
):  # fmt: skip
    """Columns of one head's state, moved by the one token of one sequence; its number is its row's,
    as decoding sequences come first."""
    row, head, part = (pl.program_id(i) for i in range(3))

    @pl.when(row < counts_ref[0])
    def _():
        key_head = lax.div(head, v_ref.shape[1] // k_ref.shape[1])
        dk = iota(pl.next_power_of_2(k_ref.shape[2]))
        dv = part * columns + iota(columns)
        q, k = (_vector(ref, row, key_head, dk) for ref in (q_ref, k_ref))
        v = _vector(v_ref, row, head, dv)
        read, write = read_ref[row], write_ref[row]
        state = load_matrix(state_ref, read, head, dk, dv, read >= 0)
        state *= jnp.exp(decay_ref[row, head])
        u = beta_ref[row, head] * (v - jnp.sum(state * k[:, None], axis=0))
        state += k[:, None] * u[None, :]
        store_matrix(new_state_ref, write, head, dk, dv, state, write >= 0)
        out = jnp.sum(state * q[:, None], axis=0).astype(out_ref.dtype)
        place = (jnp.full_like(dv, row), jnp.full_like(dv, head), dv)
        pltriton.store(out_ref.at[place], out, mask=dv < out_ref.shape[2])


def _vector(ref, row, head, column):
    """Columns of one head of a row, in float32; zeros beyond the last."""
    place = (jnp.full_like(column, row), jnp.full_like(column, head), column)
    values = pltriton.load(ref.at[place], mask=column < ref.shape[2], other=0.0)
    return values.astype(jnp.float32)


def _prepare(chunks: _Chunks, rows: tuple, programs: int, backend: Backend) -> Prepared:
    q, k, v, log_decay, beta = rows
    wide = jax.ShapeDtypeStruct((*v.shape[:2], chunks.size), v.dtype)
    number = jax.ShapeDtypeStruct(v.shape[:2], jnp.float32)
    results = pl.pallas_call(
        partial(_prepare_kernel, size=chunks.size, interpret=backend.interpret),
        grid=(programs, v.shape[1]),
        out_shape=(wide, wide, number, number),
        compiler_params=options(prepare_tiles(backend.chip, k.shape[2], k.dtype)),
        interpret=backend.interpret,
        name="delta_prepare",
    )(chunks.count, chunks.table, chunks.segment, q, k, log_decay, beta)
    return Prepared(*results)


def _prepare_kernel(
    count_ref, table_ref, segment_ref, q_ref, k_ref, decay_ref, beta_ref,
    inverse_ref, scores_ref, carried_ref, kept_ref, *, size: int, interpret: bool,
):  # fmt: skip
    program, programs, head = pl.program_id(0), pl.num_programs(0), pl.program_id(1)
    key_head = lax.div(head, decay_ref.shape[1] // k_ref.shape[1])
    dk = iota(pl.next_power_of_2(k_ref.shape[2]))

    def prepare(nth, carry):
        chunk = Chunk.load(table_ref, program + nth * programs, segment_ref, size)
        q, k = (load_rows(ref, chunk.row, key_head, dk, chunk.live) for ref in (q_ref, k_ref))
        log_decay, beta = (
            load_numbers(ref, chunk.row, head, chunk.live) for ref in (decay_ref, beta_ref)
        )
        decays = Decays.of(chunk, log_decay)
        column = iota(size)
        scores = dot(q, k.T) * decays.between
        store_rows(scores_ref, chunk.row, head, column, scores, chunk.inside)
        system = jnp.where(decays.lower, beta[:, None] * dot(k, k.T) * decays.between, 0.0)
        inverse = _inverse(system, k.dtype == jnp.float32 or interpret)
        store_rows(inverse_ref, chunk.row, head, column, inverse, chunk.inside)
        store_numbers(carried_ref, chunk.row, head, decays.carried, chunk.inside)
        store_numbers(kept_ref, chunk.row, head, decays.kept, chunk.inside)
        return carry

    lax.fori_loop(0, pl.cdiv(count_ref[0] - program, programs), prepare, 0)


def _inverse(system, exactly: bool):
    """`base.unit_lower_inverse`. If not `exactly`, its products are TF32's, whose errors are those
    of rounding it to bfloat16."""
    precision = lax.Precision.HIGHEST if exactly else lax.DotAlgorithmPreset.TF32_TF32_F32
    return unit_lower_inverse(system, partial(pltriton.dot, precision=precision))


def _walk(
    counts, table, chunks: _Chunks, rows, prepared: Prepared, state, out, windows,
    programs: int, backend: Backend, reads: bool = True,
):  # fmt: skip
    """Outputs (or u, if not `reads`), states and windows, updated in place, of the sequences from
    counts[0] up to counts[1]; table: of each, its chunks [first, last), and the slots that it reads
    and writes."""
    q, k, v, _, beta = rows
    dv = v.shape[2]
    tile = walk_tiles(backend.chip, k.shape[2], v.dtype)
    columns = min(tile["columns"], max(16, pl.next_power_of_2(dv)))
    kept = (out, state) if windows is None else (out, state, windows)
    inputs = (counts, table, chunks.table, chunks.segment, q, k, v, beta, *prepared)
    return pl.pallas_call(
        partial(_walk_kernel, size=chunks.size, columns=columns, reads=reads),
        grid=(programs, v.shape[1], pl.cdiv(dv, columns)),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept),
        input_output_aliases={len(inputs) + i: i for i in range(len(kept))},
        compiler_params=options(tile),
        interpret=backend.interpret,
        name="delta_walk",
    )(*inputs, *kept)


def _walk_kernel(
    counts_ref, sequences_ref, table_ref, segment_ref, q_ref, k_ref, v_ref, beta_ref, inverse_ref,
    scores_ref, carried_ref, kept_ref, *refs, size: int, columns: int, reads: bool,
):  # fmt: skip
    state_ref = refs[1]
    out_ref, new_state_ref, *windows_ref = refs[len(refs) // 2 :]
    program, programs, head = pl.program_id(0), pl.num_programs(0), pl.program_id(1)
    key_head = lax.div(head, v_ref.shape[1] // k_ref.shape[1])
    dk = iota(pl.next_power_of_2(k_ref.shape[2]))
    dv = pl.program_id(2) * columns + iota(columns)
    dtype = v_ref.dtype

    def over_chunk(n, state):
        chunk = Chunk.load(table_ref, n, segment_ref, size)
        if windows_ref:
            window = table_ref[n, 3]
            store_matrix(windows_ref[0], window, head, dk, dv, state, window >= 0)
        k = load_rows(k_ref, chunk.row, key_head, dk, chunk.live)
        v = load_rows(v_ref, chunk.row, head, dv, chunk.live).astype(jnp.float32)
        inverse = load_rows(inverse_ref, chunk.row, head, iota(size), chunk.inside)
        beta = load_numbers(beta_ref, chunk.row, head, chunk.live)
        carried, kept = (
            load_numbers(ref, chunk.row, head, chunk.inside) for ref in (carried_ref, kept_ref)
        )
        before = state.astype(dtype)
        missing = beta[:, None] * (v - carried[:, None] * dot(k, before))
        out = u = dot(inverse, missing.astype(dtype))
        if reads:
            q = load_rows(q_ref, chunk.row, key_head, dk, chunk.live)
            scores = load_rows(scores_ref, chunk.row, head, iota(size), chunk.inside)
            out = carried[:, None] * dot(q, before) + dot(scores, u.astype(dtype))
        store_rows(out_ref, chunk.row, head, dv, out, chunk.inside)
        added = dot(k.T, (kept[:, None] * u).astype(dtype))
        return carried_ref[chunk.last, head] * state + added

    def over_sequence(nth, carry):
        s = counts_ref[0] + program + nth * programs
        first, last, read, write = (sequences_ref[s, i] for i in range(4))
        state = load_matrix(state_ref, read, head, dk, dv, read >= 0)
        state = lax.fori_loop(first, last, over_chunk, state)
        store_matrix(new_state_ref, write, head, dk, dv, state, (write >= 0) & (first < last))
        return carry

    left = counts_ref[1] - counts_ref[0] - program
    lax.fori_loop(0, pl.cdiv(left, programs), over_sequence, 0)


class Chunk(NamedTuple):
    """A chunk in a kernel: its rows [C], which of them are its own (inside) and tokens (live), of
    which of its sequences they are, and the last that is its own."""

    row: jax.Array
    inside: jax.Array
    live: jax.Array
    segment: jax.Array
    last: jax.Array

    @classmethod
    def load(cls, table_ref, n, segment_ref, size: int) -> "Chunk":
        """Chunk n of a table."""
        first, start, end = (table_ref[n, i] for i in range(3))
        row = first + iota(size)
        inside = (row >= start) & (row < end)
        stored = pltriton.load(segment_ref.at[row], mask=inside, other=0)
        live = inside & (stored >= 0)
        last = jnp.minimum(first + size, end) - 1
        return cls(row, inside, live, jnp.where(stored < 0, -1 - stored, stored), last)


class Decays(NamedTuple):
    """Of a chunk of one head. lower [C, C]: pairs of a row and one before it. between [C, C]: how
    much of what the second wrote the first reads. carried, kept: as of `Prepared`."""

    lower: jax.Array
    between: jax.Array
    carried: jax.Array
    kept: jax.Array

    @classmethod
    def of(cls, chunk: Chunk, log_decay) -> "Decays":
        """From g of its rows, zeros where they are no tokens."""
        size = log_decay.shape[0]
        i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
        total = jnp.sum(jnp.where(i >= j, log_decay[None, :], 0.0), axis=1)
        visible = (i >= j) & (chunk.segment[:, None] == chunk.segment[None, :])
        between = jnp.where(visible, total[:, None] - total[None, :], -jnp.inf)
        last = jnp.max(jnp.where(chunk.inside, chunk.segment, 0))
        carried = jnp.where(chunk.segment == 0, total, -jnp.inf)
        kept = jnp.where(chunk.segment == last, jnp.sum(log_decay) - total, -jnp.inf)
        return cls(i > j, jnp.exp(between), jnp.exp(carried), jnp.exp(kept))


def load_rows(ref, row, head, column, mask):
    """Rows of one head of [T, heads, width], and zeros where masked and beyond the width."""
    index, mask = _rows_index(ref, row, head, column, mask)
    return pltriton.load(ref.at[index], mask=mask, other=0.0)


def store_rows(ref, row, head, column, values, mask) -> None:
    """Write such rows."""
    index, mask = _rows_index(ref, row, head, column, mask)
    pltriton.store(ref.at[index], values.astype(ref.dtype), mask=mask)


def _rows_index(ref, row, head, column, mask):
    shape = (row.shape[0], column.shape[0])
    column = lax.broadcast_in_dim(column, shape, (1,))
    index = (lax.broadcast_in_dim(row, shape, (0,)), jnp.full(shape, head), column)
    return index, lax.broadcast_in_dim(mask, shape, (0,)) & (column < ref.shape[2])


def load_numbers(ref, row, head, mask):
    """A number of each row of [T, heads], and zeros where masked."""
    return pltriton.load(ref.at[row, jnp.full_like(row, head)], mask=mask, other=0.0)


def store_numbers(ref, row, head, values, mask) -> None:
    """Write such numbers."""
    pltriton.store(ref.at[row, jnp.full_like(row, head)], values, mask=mask)


def load_matrix(ref, slot, head, row, column, exists):
    """Columns of one head's state in a slot, and zeros if there is none."""
    index, mask = _matrix_index(ref, slot, head, row, column, exists)
    return pltriton.load(ref.at[index], mask=mask, other=0.0)


def store_matrix(ref, slot, head, row, column, values, exists) -> None:
    """Write such columns."""
    index, mask = _matrix_index(ref, slot, head, row, column, exists)
    pltriton.store(ref.at[index], values, mask=mask)


def _matrix_index(ref, slot, head, row, column, exists):
    shape = (row.shape[0], column.shape[0])
    row, column = (lax.broadcast_in_dim(x, shape, (i,)) for i, x in enumerate((row, column)))
    index = (jnp.full(shape, slot), jnp.full(shape, head), row, column)
    return index, (row < ref.shape[2]) & (column < ref.shape[3]) & exists


def iota(size: int):
    """0, 1, ..."""
    return lax.iota(jnp.int32, size)


def dot(x, y):
    """x @ y in float32, without TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, precision=precision)


def decode_tiles(chip: str, dk: int, dv: int) -> dict[str, int]:
    """columns: of a program's part of a state."""
    default = {"columns": 32, "num_warps": 4, "num_stages": 1}
    return tiles("gated_delta", chip, decode_key(dk, dv), default)


def prepare_tiles(chip: str, dk: int, dtype) -> dict[str, int]:
    """Of programs that have a chunk of a head."""
    default = {"num_warps": 4, "num_stages": 1}
    return tiles("gated_delta", chip, tuning_key("prepare", dk, dtype), default)


def walk_tiles(chip: str, dk: int, dtype) -> dict[str, int]:
    """columns: of a program's part of a state."""
    default = {"columns": 32, "num_warps": 4, "num_stages": 2}
    return tiles("gated_delta", chip, tuning_key("walk", dk, dtype), default)


def decode_key(dk: int, dv: int) -> str:
    """What the tiles of decoding depend on."""
    return f"decode/k{dk}/v{dv}"


def tuning_key(kernel: str, dk: int, dtype) -> str:
    """What the tiles of a kernel with chunks depend on."""
    return f"{kernel}/k{dk}/{jnp.dtype(dtype).name}"


def options(tile: dict[str, int]):
    """A kernel's compiler parameters."""
    return pltriton.CompilerParams(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
