"""Ragged paged attention in three Pallas-Triton kernels.

1. Decode: one program per sequence, kv head and split of the keys. A long sequence is split, so
   that a few of them fill the GPU too; each split leaves its output and log-sum-exp.
2. Combine: one program per sequence and kv head adds up its splits.
3. Chunks: one program per kv head and block of queries of one sequence, for prefill chunks and
   finetuning chunks; what is padding is a block as well, and gets zeros. It writes into the
   combined output, in place.

A row of a program's tile is one query head of one token; the query heads that share a kv head are
neighbours, so that keys are read once for all of them. Sizes of tiles are powers of two, as Triton
wants; rows beyond a multiple of the group, and columns beyond the head, are masked. Scores are kept
in units of log2, because exp2 is the GPU's exponential.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from kernels_pallas.backend import Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.tuning import tiles

_MASKED = -1e30
_LOG2E = math.log2(math.e)
# Most partial results of the decode kernel, sequences times splits: bounds their memory.
_MOST_PARTIALS = 1024
_MOST_SPLITS = 32
# Up to so many tokens the chunk kernel has programs for the blocks of one sequence and a few more,
# which take what else there is in turns: in steps that decode, hundreds would find no block, and
# wait for the shared memory of one. The loop costs registers, and a tenth of a long chunk's time.
_FEW_TOKENS, _SHORT_CHUNKS = 512, 8


@dataclass(frozen=True)
class _Shape:
    """What is static about a call. rows: of a tile. width: of a head, as a power of two."""

    rows: int
    keys: int
    group: int
    head_dim: int
    page_size: int
    options: AttentionOptions

    @property
    def width(self) -> int:
        return max(16, pl.next_power_of_2(self.head_dim))

    @property
    def tokens(self) -> int:
        """Tokens that a tile's rows hold."""
        return self.rows // self.group


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    query_starts: Int[Array, " S_plus_1"],
    kv_lengths: Int[Array, " S"],
    page_tables: Int[Array, "S M"],
    num_decode: Int[Array, ""],
    num_sequences: Int[Array, ""],
    *,
    k_scales: Float[Array, "P K"] | None = None,
    v_scales: Float[Array, "P K"] | None = None,
    options: AttentionOptions = FULL,
    backend: Backend,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See `base.ragged_paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = num_heads // kv_heads
    if backend.chip == "a100" and k_pages.dtype == jnp.float8_e4m3fn:
        raise ValueError("float8 KV pages need a GPU of compute capability 8.9 or newer: use int8")
    scales = () if k_scales is None or v_scales is None else (k_scales, v_scales)
    tables = (query_starts, kv_lengths, page_tables)
    counts = jnp.stack([num_decode, num_sequences]).astype(jnp.int32)

    def shape_of(tile: dict[str, int]) -> _Shape:
        return _Shape(
            rows=max(tile["rows"], pl.next_power_of_2(group)),
            keys=tile["keys"],
            group=group,
            head_dim=head_dim,
            page_size=page_size,
            options=options,
        )

    tile = decode_tiles(backend.chip, head_dim, k_pages.dtype)
    slots = min(num_tokens, kv_lengths.shape[0])
    longest = page_tables.shape[1] * page_size
    splits = min(_MOST_SPLITS, pl.cdiv(longest, tile["split_keys"]), _MOST_PARTIALS // slots)
    splits = max(1, splits)
    own = {"shape": shape_of(tile), "split_keys": tile["split_keys"], "splits": splits}
    partials = pl.pallas_call(
        partial(_decode_kernel, **own),
        grid=(slots, kv_heads, splits),
        out_shape=(
            jax.ShapeDtypeStruct((splits, slots, num_heads, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((splits, slots, num_heads), jnp.float32),
        ),
        compiler_params=_compiler_params(tile),
        interpret=backend.interpret,
        name="attention_decode",
    )(counts, *tables, q, k_pages, v_pages, *scales)
    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((num_tokens, num_heads), jnp.float32),
    )
    combined = pl.pallas_call(
        partial(_combine_kernel, **own),
        grid=(slots, kv_heads),
        out_shape=results,
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=backend.interpret,
        name="attention_combine",
    )(counts, kv_lengths, *partials)

    tile = chunk_tiles(backend.chip, head_dim, k_pages.dtype)
    shape = shape_of(tile)
    blocks = _query_blocks(query_starts, num_decode, num_sequences, num_tokens, shape.tokens)
    inputs = (*blocks, *tables, q, k_pages, v_pages, *scales)
    programs, loops = blocks[1].shape[0], num_tokens <= _FEW_TOKENS
    if loops:
        programs = min(programs, num_tokens // shape.tokens + _SHORT_CHUNKS)
    return pl.pallas_call(
        partial(_chunk_kernel, shape=shape, loops=loops),
        grid=(programs, kv_heads),
        out_shape=results,
        input_output_aliases={len(inputs): 0, len(inputs) + 1: 1},
        compiler_params=_compiler_params(tile),
        interpret=backend.interpret,
        name="attention_chunks",
    )(*inputs, *combined)


def _query_blocks(
    query_starts: jax.Array,
    num_decode: jax.Array,
    num_sequences: jax.Array,
    num_tokens: int,
    block: int,
) -> tuple[Int[Array, "1"], Int[Array, " X"], Int[Array, " X"]]:
    """Cut the queries of every sequence after the decoding ones into blocks of `block` tokens, and
    the padding after the last one as if it were a sequence more.

    Returns how many there are, and each block's sequence (S for padding) and first token. The same
    in every layer, so XLA computes it once a step.
    """
    slots = query_starts.shape[0] - 1
    sequence = jnp.arange(slots)
    used = query_starts[num_sequences]
    lengths = query_starts[1:] - query_starts[:-1]
    lengths = jnp.where((sequence >= num_decode) & (sequence < num_sequences), lengths, 0)
    lengths = jnp.append(lengths, num_tokens - used)
    starts = jnp.append(query_starts[:-1], used)
    blocks = (lengths + block - 1) // block
    ends = jnp.cumsum(blocks)
    index = jnp.arange(num_tokens // block + min(slots, num_tokens) + 1, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    own = jnp.minimum(owner, slots)
    first = starts[own] + (index - (ends - blocks)[own]) * block
    return ends[-1:].astype(jnp.int32), own, first.astype(jnp.int32)


def _decode_kernel(
    counts_ref, query_starts_ref, kv_lengths_ref, page_tables_ref, q_ref, k_ref, v_ref, *refs,
    shape: _Shape, split_keys: int, splits: int,
):  # fmt: skip
    """One split of the keys of one sequence with one query."""
    *scale_refs, out_ref, lse_ref = refs
    sequence, kv_head, split = (pl.program_id(i) for i in range(3))
    length = kv_lengths_ref[sequence]
    used = _splits_of(length, split_keys, splits)

    @pl.when((sequence < counts_ref[0]) & (split < used))
    def _():
        token = query_starts_ref[sequence]
        row = _iota(shape.rows)
        valid = row < shape.group
        head = kv_head * shape.group + row
        q = _load_queries(q_ref, jnp.full_like(row, token), head, valid, shape)
        blocks = pl.cdiv(length, shape.keys)
        lowest = 0
        if shape.options.window is not None:
            lowest = jnp.maximum(length - shape.options.window, 0) // shape.keys
        each = pl.cdiv(blocks - lowest, used)
        first = lowest + split * each
        last = jnp.minimum(first + each, blocks)
        pages = (sequence, page_tables_ref, k_ref, v_ref, scale_refs)
        position = jnp.full_like(row, length - 1)
        state = _empty(shape)
        # Only the last block of the sequence has keys that are none of its own.
        if shape.options.window is None:
            full = jnp.minimum(last, length // shape.keys)
            state = _attend(q, pages, kv_head, position, length, first, full, state, shape, False)
            first = jnp.maximum(first, full)
        state = _attend(q, pages, kv_head, position, length, first, last, state, shape, True)
        out, lse = _finish(state)
        places = (_rows(split, shape), _rows(sequence, shape), head)
        _store(out_ref, lse_ref, places, out, lse, valid, shape)


def _combine_kernel(
    counts_ref, kv_lengths_ref, partial_ref, partial_lse_ref, out_ref, lse_ref,
    *, shape: _Shape, split_keys: int, splits: int,
):  # fmt: skip
    """Add up the splits of one sequence, each weighted by its share of the softmax's sum.

    Decoding sequences come first and have one query each, so a sequence's number is its token.
    """
    sequence, kv_head = pl.program_id(0), pl.program_id(1)

    @pl.when(sequence < counts_ref[0])
    def _():
        row = _iota(shape.rows)
        valid = row < shape.group
        head = kv_head * shape.group + row

        def add(split, state):
            accumulated, maximum, total = state
            places = (_rows(split, shape), _rows(sequence, shape), head)
            lse = pltriton.load(partial_lse_ref.at[places], mask=valid, other=_MASKED) * _LOG2E
            index, mask = _with_columns(places, valid, shape)
            out = pltriton.load(partial_ref.at[index], mask=mask, other=0.0)
            larger = jnp.maximum(maximum, lse)
            correction, weight = jnp.exp2(maximum - larger), jnp.exp2(lse - larger)
            accumulated = accumulated * correction[:, None] + out * weight[:, None]
            return accumulated, larger, total * correction + weight

        used = _splits_of(kv_lengths_ref[sequence], split_keys, splits)
        out, lse = _finish(lax.fori_loop(0, used, add, _empty(shape)))
        _store(out_ref, lse_ref, (_rows(sequence, shape), head), out, lse, valid, shape)


def _chunk_kernel(
    count_ref, owner_ref, first_ref, query_starts_ref, kv_lengths_ref, page_tables_ref, q_ref,
    k_ref, v_ref, *refs, shape: _Shape, loops: bool,
):  # fmt: skip
    """A program's block of queries of one kv head, or (`loops`) every so-many-th."""
    program, programs, kv_head = pl.program_id(0), pl.num_programs(0), pl.program_id(1)
    tables = (query_starts_ref, kv_lengths_ref, page_tables_ref)

    def attend(i, carry):
        block = program + i * programs
        sequence = jnp.where(block < count_ref[0], owner_ref[block], -1)
        own = (sequence, first_ref[block], kv_head)
        _chunk(own, tables, q_ref, k_ref, v_ref, *refs, shape=shape)
        return carry

    if loops:
        lax.fori_loop(0, pl.cdiv(count_ref[0] - program, programs), attend, 0)
    else:
        attend(0, 0)


def _chunk(block, tables, q_ref, k_ref, v_ref, *refs, shape: _Shape):
    """One block of queries of one sequence and kv head; -1: of none."""
    *scale_refs, _, _, out_ref, lse_ref = refs
    sequence, first_token, kv_head = block
    query_starts_ref, kv_lengths_ref, page_tables_ref = tables
    num_sequences = kv_lengths_ref.shape[0]
    row = _iota(shape.rows)
    token = first_token + row // shape.group
    head = kv_head * shape.group + row % shape.group
    in_block = row < shape.tokens * shape.group

    @pl.when(sequence == num_sequences)
    def _():
        valid = in_block & (token < q_ref.shape[0])
        zeros = jnp.zeros((shape.rows, shape.width), jnp.float32)
        _store(
            out_ref,
            lse_ref,
            (token, head),
            zeros,
            jnp.zeros((shape.rows,), jnp.float32),
            valid,
            shape,
        )

    @pl.when((sequence >= 0) & (sequence < num_sequences))
    def _():
        end = query_starts_ref[sequence + 1]
        length = kv_lengths_ref[sequence]
        valid = in_block & (token < end)
        position = length - end + token
        q = _load_queries(q_ref, token, head, valid, shape)
        first_position = length - end + first_token
        last_position = jnp.minimum(first_position + shape.tokens, length)
        blocks = pl.cdiv(last_position, shape.keys)
        pages = (sequence, page_tables_ref, k_ref, v_ref, scale_refs)
        state = _empty(shape)
        if shape.options.window is None:  # every query of the block sees all of these keys
            full = (first_position + 1) // shape.keys
            state = _attend(q, pages, kv_head, position, length, 0, full, state, shape, False)
        else:
            full = jnp.maximum(first_position - shape.options.window + 1, 0) // shape.keys
        state = _attend(q, pages, kv_head, position, length, full, blocks, state, shape, True)
        out, lse = _finish(state)
        _store(out_ref, lse_ref, (token, head), out, lse, valid, shape)


def _attend(q, pages, kv_head, position, length, first, last, state, shape: _Shape, masked: bool):
    """Take the key blocks [first, last) into the state of the online softmax: accumulated output
    [rows, width], maximum score and sum of weights [rows]."""
    sequence, page_tables_ref, k_ref, v_ref, scale_refs = pages
    column = _iota(shape.keys)

    # Loaded one iteration before the keys of the block, whose addresses then depend on nothing that
    # the iteration itself loads: so Triton keeps num_stages - 1 blocks of keys in flight, not none.
    def page_numbers(block):
        key = block * shape.keys + column
        return pltriton.load(
            page_tables_ref.at[jnp.full_like(key, sequence), key // shape.page_size],
            mask=key < length,
            other=0,
        )

    def add_block(block, state):
        accumulated, maximum, total, page = state
        key = block * shape.keys + column
        exists = key < length
        guard = {"mask": exists, "other": 0} if masked else {}
        next_page = page_numbers(block + 1)
        places = (page, key % shape.page_size, jnp.full_like(key, kv_head))
        index, mask = _with_columns(places, exists if masked else None, shape)
        other = None if mask is None else 0.0
        k = _load_keys(k_ref, index, mask, other, q.dtype)
        scores = _dot(q, k, trans_b=True) * shape.options.scale_of(shape.head_dim)
        if scale_refs:
            scores *= pltriton.load(scale_refs[0].at[page, places[2]], **guard)[None, :]
        if shape.options.soft_cap is not None:
            scores = shape.options.soft_cap * jnp.tanh(scores / shape.options.soft_cap)
        scores *= _LOG2E
        visible = None
        if masked:
            visible = (key[None, :] <= position[:, None]) & exists[None, :]
            if shape.options.window is not None:
                visible &= key[None, :] > position[:, None] - shape.options.window
            scores = jnp.where(visible, scores, _MASKED)
        larger = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - larger[:, None])
        if visible is not None:
            weights = jnp.where(visible, weights, 0.0)
        correction = jnp.exp2(maximum - larger)
        total = total * correction + jnp.sum(weights, axis=1)
        if scale_refs:
            weights *= pltriton.load(scale_refs[1].at[page, places[2]], **guard)[None, :]
        v = _load_keys(v_ref, index, mask, other, q.dtype)
        accumulated = accumulated * correction[:, None] + _dot(weights.astype(q.dtype), v)
        return accumulated, larger, total, next_page

    return lax.fori_loop(first, last, add_block, (*state, page_numbers(first)))[:3]


def _empty(shape: _Shape):
    return (
        jnp.zeros((shape.rows, shape.width), jnp.float32),
        jnp.full((shape.rows,), _MASKED, jnp.float32),
        jnp.zeros((shape.rows,), jnp.float32),
    )


def _finish(state):
    """Output and natural log-sum-exp of the rows."""
    accumulated, maximum, total = state
    total = jnp.where(total == 0.0, 1.0, total)  # rows of no query
    return accumulated / total[:, None], (maximum + jnp.log2(total)) / _LOG2E


def _splits_of(length, split_keys: int, splits: int):
    """How many splits the keys of a sequence are cut into."""
    return jnp.clip(length // split_keys, 1, splits)


def _load_queries(q_ref, token, head, valid, shape: _Shape):
    index, mask = _with_columns((token, head), valid, shape)
    return pltriton.load(q_ref.at[index], mask=mask, other=0.0)


def _load_keys(ref, index, mask, other, dtype):
    stored = pltriton.load(ref.at[index], mask=mask, other=other)
    return stored if stored.dtype == dtype else stored.astype(jnp.float32).astype(dtype)


def _store(out_ref, lse_ref, places, out, lse, valid, shape: _Shape):
    index, mask = _with_columns(places, valid, shape)
    pltriton.store(out_ref.at[index], out.astype(out_ref.dtype), mask=mask)
    pltriton.store(lse_ref.at[places], lse, mask=valid)


def _with_columns(places: tuple, valid, shape: _Shape):
    """Index arrays [rows, width] of whole heads at these places, and their mask."""
    size = (places[0].shape[0], shape.width)
    column = lax.broadcasted_iota(jnp.int32, size, 1)
    index = (*(lax.broadcast_in_dim(p, size, (0,)) for p in places), column)
    mask = None if valid is None else lax.broadcast_in_dim(valid, size, (0,))
    if shape.width != shape.head_dim:
        inside = column < shape.head_dim
        mask = inside if mask is None else mask & inside
    return index, mask


def _rows(value, shape: _Shape):
    return jnp.full((shape.rows,), value, jnp.int32)


def _iota(size: int):
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def _dot(x, y, trans_b: bool = False):
    """Product in float32, without TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return pltriton.dot(x, y, trans_b=trans_b, precision=precision)


def decode_tiles(chip: str, head_dim: int, dtype) -> dict[str, int]:
    """rows: of q, a group at least. keys: of a step of the loop. split_keys: fewest of a split."""
    default = {"rows": 16, "keys": 64, "split_keys": 512, "num_warps": 4, "num_stages": 3}
    return tiles("ragged_paged_attention", chip, tuning_key("decode", head_dim, dtype), default)


def chunk_tiles(chip: str, head_dim: int, dtype) -> dict[str, int]:
    """rows: of q, tokens times group. keys: in one step of the loop."""
    default = {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 3}
    return tiles("ragged_paged_attention", chip, tuning_key("chunks", head_dim, dtype), default)


def tuning_key(kernel: str, head_dim: int, dtype) -> str:
    """What the tiles of "decode" or "chunks" depend on: width of a head, and dtype of the pages."""
    return f"{kernel}/h{max(16, pl.next_power_of_2(head_dim))}/{jnp.dtype(dtype).name}"


def _compiler_params(tile: dict[str, int]):
    return pltriton.CompilerParams(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
