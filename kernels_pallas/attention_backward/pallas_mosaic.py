"""The attention backward of a slice of queries on Hopper GPUs, in two Pallas-Mosaic kernels.

The keys and values of the microbatch are gathered from their pages once. Then, as in Triton's
kernels (`pallas_triton`), a program of dq owns a block of queries of one head and walks the keys
that they see; a program of dkv owns a block of keys of one kv head, walks the queries of its group
that see them, and adds to its rows of the accumulators in place. No sum depends on an order that
the GPU chooses.

A program is two warpgroups that compute, 64 rows each, and one that loads blocks ahead of them by
TMA; products are `wgmma`. What they compute between two products of one warpgroup, the tensor cores
spend on the other (FlashAttention-3, arXiv 2407.08608, section 3.1).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.attention_backward.pallas_triton import mosaic_key
from kernels_pallas.attention_backward.prepare import (
    LOG2_E,
    Queries,
    Ranges,
    prepare,
)
from kernels_pallas.attention_backward.visible import NEVER, Blocks, Visible
from kernels_pallas.backend import Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.rows import Rows
from kernels_pallas.tuning import tiles

ROWS = 64  # of a warpgroup: those of one `wgmma`
_WARPGROUPS = 2
_HEAD_DIMS = (64, 128)  # of larger heads the two accumulators of dkv do not fit the registers
# What setmaxnreg leaves the warpgroup that loads; the others have 240 of the 255 there can be.
_LOADING_REGISTERS = 32

# What JAX before 0.11 demands in a load of all there is, and later versions warn of.
_NO_INDEX = ((),) if jax.__version_info__ < (0, 11, 0) else ()
_TILE = plgpu.Layout.WGMMA
_PER_ROW, _PER_COLUMN = _TILE.reduce(1), _TILE.reduce(0)
# How `wgmma` wants its operands to lie in shared memory.
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def is_supported(
    q: jax.Array, k_pages: jax.Array, kv_slots: jax.Array, options: AttentionOptions
) -> bool:
    """Whether these kernels can take a slice: bfloat16 in heads of 64 or 128, whole blocks of rows.
    The derivative of a soft cap would spill registers; models that have one have larger heads."""
    sizes = (q.shape[0], kv_slots.shape[0])
    return (
        q.dtype == k_pages.dtype == jnp.bfloat16
        and q.shape[2] in _HEAD_DIMS
        and all(size % ROWS == 0 for size in sizes)
        and options.soft_cap is None
    )


def attention_backward(
    q: Float[Array, "U N H"],
    k_pages: Float[Array, "P B K H"],
    v_pages: Float[Array, "P B K H"],
    kv_slots: Int[Array, " S"],
    sequence_starts: Int[Array, " U"],
    shared: Int[Array, "2 U"],
    first_row: Int[Array, ""],
    out: Float[Array, "U N H"] | Rows,
    lse: Float[Array, "U N"] | Rows,
    d_out: Float[Array, "U N H"],
    dk: Float[Array, "S K H"],
    dv: Float[Array, "S K H"],
    *,
    options: AttentionOptions = FULL,
    backend: Backend,
) -> tuple[Float[Array, "U N H"], Float[Array, "S K H"], Float[Array, "S K H"]]:
    """See `base.attention_backward`; where that `is_supported`."""
    slots = kv_slots.shape[0]
    dq_tile, dkv_tile = (_tiles(kernel, q, slots, backend) for kernel in ("dq", "dkv"))
    ranges, rows = prepare(
        *(first_row, sequence_starts, shared, q, d_out, out, lse, slots),
        *(dq_tile, dkv_tile, options),
        interpret=backend.interpret,
    )
    # What no query sees and what is padding may hold NaN, and 0 * NaN is NaN.
    slot = jnp.arange(slots)
    read = ((slot >= ranges.bounds[1]) & (slot < ranges.bounds[2]))[:, None, None]
    keys, values = (
        jnp.where(read, x.reshape(-1, *x.shape[2:])[kv_slots], 0) for x in (k_pages, v_pages)
    )
    live = (rows.sees[0] < NEVER)[:, None, None]
    rows = rows._replace(q=jnp.where(live, q, 0), d_out=jnp.where(live, d_out, 0))
    dq = _dq(ranges, rows, keys, values, dq_tile, options, backend)
    return dq, *_dkv(ranges, rows, keys, values, dk, dv, dkv_tile, options, backend)


def _dq(
    ranges: Ranges,
    rows: Queries,
    keys: jax.Array,
    values: jax.Array,
    tile: dict[str, int],
    options: AttentionOptions,
    backend: Backend,
) -> jax.Array:
    """Gradient of the queries."""
    unit_tokens, num_heads, head_dim = rows.q.shape
    warpgroups = tile["queries"] // ROWS
    own = _operand((warpgroups, ROWS, head_dim))
    return _launch(
        partial(_dq_kernel, keys=tile["keys"], stages=tile["stages"], options=options),
        grid={"head": num_heads, "block": unit_tokens // tile["queries"]},
        warpgroups=warpgroups,
        scratch=(own, own, _barriers(warpgroups), _staging(warpgroups, tile["keys"], backend)),
        out=[jax.ShapeDtypeStruct(rows.q.shape, rows.q.dtype)],
        name="attention_backward_dq",
        backend=backend,
    )(ranges.bounds, ranges.seen, *rows, keys, values)[0]


def _dq_kernel(
    bounds_ref, seen_ref, sees_ref, q_ref, d_out_ref, lse_ref, minus_delta_ref, k_ref, v_ref,
    dq_ref, q_smem, d_out_smem, barriers, staging,
    *, keys: int, stages: int, options: AttentionOptions,
):  # fmt: skip
    """A block of one head's queries against the keys that they see."""
    warpgroups, _, head_dim = q_smem.shape
    head, block, warpgroup = (lax.axis_index(name) for name in ("head", "block", "warpgroup"))
    kv_head = lax.div(head, q_ref.shape[1] // k_ref.shape[1])
    seen = Blocks.load(seen_ref, block)
    first = (block * warpgroups + warpgroup) * ROWS
    scale = LOG2_E * options.scale_of(head_dim)
    own, q_smem, d_out_smem = pl.ds(first, ROWS), q_smem.at[warpgroup], d_out_smem.at[warpgroup]

    def compute(walk: Callable) -> None:
        arrived = barriers.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[own, head], q_smem, arrived)
        plgpu.copy_gmem_to_smem(d_out_ref.at[own, head], d_out_smem, arrived)
        statistics = [
            _load(ref, _PER_ROW, optimized=False)
            for ref in (lse_ref.at[head, own], minus_delta_ref.at[head, own])
        ]
        sees = [_load(sees_ref.at[i, own], _PER_ROW, optimized=False) for i in range(3)]
        plgpu.barrier_wait(arrived)

        def sum_over_keys(dq):
            walk((dq, *statistics, *sees))
            return dq[...]

        dq = pl.run_scoped(sum_over_keys, _sums(head_dim))
        q_smem[...] = (dq * options.scale_of(head_dim)).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[own, head])
        plgpu.wait_smem_to_gmem(0)

    def add_block(indices, k_smem, v_smem, k_free, v_free, carry):
        dq, lse, minus_delta, *sees = carry
        index = seen.block(indices[0])
        tile = _sums(keys)

        def multiply(products, d_weights):
            plgpu.wgmma(products, q_smem, k_smem.T)
            plgpu.wgmma(d_weights, d_out_smem, v_smem.T)
            return products[...], d_weights[...]

        products, d_weights = pl.run_scoped(multiply, tile, tile)
        plgpu.barrier_arrive(v_free)
        across = partial(lax.broadcast_in_dim, shape=(ROWS, keys), broadcast_dimensions=(0,))

        def visible():
            token = bounds_ref[0] + first + _iota((ROWS, keys), 0)
            key = index * keys + _iota((ROWS, keys), 1)
            return Visible.join(map(across, sees), token).holds(key)

        full = seen.is_full(index)
        weights = _weights(products * scale, across(lse), full, visible)
        d_scores = weights * (d_weights + across(minus_delta))
        _add_product(dq, d_scores.astype(k_smem.dtype), k_smem, staging, warpgroup)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(k_free)
        return carry

    block_of_keys = plgpu.BlockSpec(
        (keys, head_dim), lambda i: (seen.block(i), 0), transforms=_SWIZZLED
    )
    _walk(
        compute,
        add_block,
        (k_ref.at[:, kv_head], v_ref.at[:, kv_head]),
        specs=[block_of_keys, block_of_keys],
        blocks=seen.size,
        stages=stages,
        warpgroups=warpgroups,
    )


def _dkv(
    ranges: Ranges,
    rows: Queries,
    keys: jax.Array,
    values: jax.Array,
    dk: jax.Array,
    dv: jax.Array,
    tile: dict[str, int],
    options: AttentionOptions,
    backend: Backend,
) -> tuple[jax.Array, jax.Array]:
    """The accumulators with this slice's share added, in place."""
    slots, kv_heads, head_dim = keys.shape
    warpgroups = tile["keys"] // ROWS
    own = _operand((warpgroups, ROWS, head_dim))
    dk_ref, dv_ref = (jax.new_ref(x, memory_space=plgpu.GMEM) for x in (dk, dv))
    _launch(
        partial(_dkv_kernel, queries=tile["queries"], stages=tile["stages"], options=options),
        grid={"head": kv_heads, "block": slots // tile["keys"]},
        warpgroups=warpgroups,
        scratch=(own, own, _barriers(warpgroups), _staging(warpgroups, tile["queries"], backend)),
        out=(),
        name="attention_backward_dkv",
        backend=backend,
    )(ranges.bounds, ranges.seeing, *rows, keys, values, dk_ref, dv_ref)
    return dk_ref[...], dv_ref[...]


def _dkv_kernel(
    bounds_ref, seeing_ref, sees_ref, q_ref, d_out_ref, lse_ref, minus_delta_ref, k_ref, v_ref,
    dk_ref, dv_ref, k_smem, v_smem, barriers, staging,
    *, queries: int, stages: int, options: AttentionOptions,
):  # fmt: skip
    """A block of one head's keys and values against all queries that see them. Scores are
    transposed, so that the products with them take them as they are computed."""
    warpgroups, _, head_dim = k_smem.shape
    kv_head, block, warpgroup = (lax.axis_index(name) for name in ("head", "block", "warpgroup"))
    group = q_ref.shape[1] // k_ref.shape[1]
    seeing = Blocks.load(seeing_ref, block)
    first = (block * warpgroups + warpgroup) * ROWS
    scale = LOG2_E * options.scale_of(head_dim)
    own, k_smem, v_smem = pl.ds(first, ROWS), k_smem.at[warpgroup], v_smem.at[warpgroup]

    def compute(walk: Callable) -> None:
        arrived = barriers.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[own, kv_head], k_smem, arrived)
        plgpu.copy_gmem_to_smem(v_ref.at[own, kv_head], v_smem, arrived)
        plgpu.barrier_wait(arrived)

        def sum_over_queries(dk, dv):
            walk((dk, dv))
            return dk[...], dv[...]

        tile = _sums(head_dim)
        dk, dv = pl.run_scoped(sum_over_queries, tile, tile)
        for ref, share in ((dv_ref, dv), (dk_ref, dk * options.scale_of(head_dim))):
            total = ref.at[own, kv_head]
            total[...] = _load(total, _TILE, optimized=False) + share

    def add_block(
        indices, sees_smem, lse_smem, minus_delta_smem, q_smem, d_out_smem,
        sees_free, lse_free, minus_delta_free, q_free, d_out_free, carry,
    ):  # fmt: skip
        dk, dv = carry
        index = seeing.block(lax.div(indices[0], group))
        tile = _sums(queries)
        across = partial(lax.broadcast_in_dim, shape=(ROWS, queries), broadcast_dimensions=(1,))

        def multiply_keys(products):
            plgpu.wgmma(products, k_smem, q_smem.T)
            lse = _load(lse_smem, _PER_COLUMN)
            return products[...], lse

        products, lse = pl.run_scoped(multiply_keys, tile)
        plgpu.barrier_arrive(lse_free)

        def visible():
            sees = (_load(sees_smem.at[i], _PER_COLUMN) for i in range(3))
            token = bounds_ref[0] + index * queries + _iota((ROWS, queries), 1)
            key = first + _iota((ROWS, queries), 0)
            return Visible.join(map(across, sees), token).holds(key)

        full = seeing.is_full(index)
        weights = _weights(products * scale, across(lse), full, visible)
        plgpu.barrier_arrive(sees_free)

        def multiply_values(d_weights):
            plgpu.wgmma(d_weights, v_smem, d_out_smem.T)
            _add_product(dv, weights.astype(d_out_smem.dtype), d_out_smem, staging, warpgroup)
            return plgpu.wgmma_accumulator_load(d_weights, wait_n=1)

        d_weights = pl.run_scoped(multiply_values, tile)
        # Loaded here and not with the others, because all registers are in use before.
        minus_delta = _load(minus_delta_smem, _PER_COLUMN)
        plgpu.barrier_arrive(minus_delta_free)
        d_scores = weights * (d_weights + across(minus_delta))
        _add_product(dk, d_scores.astype(q_smem.dtype), q_smem, staging, warpgroup)
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(d_out_free)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(q_free)
        return carry

    def spec(shape: tuple, index_map: Callable, **how: Any):
        """Of a block of the queries of one of the group's heads, all heads before the next."""
        block = lambda i: seeing.block(lax.div(i, group))  # noqa: E731
        head = lambda i: kv_head * group + lax.rem(i, group)  # noqa: E731
        return plgpu.BlockSpec(shape, lambda i: index_map(block(i), head(i)), **how)

    sees = spec((3, queries), lambda block, head: (0, block))
    statistic = spec((None, queries), lambda block, head: (head, block))
    operand = spec(
        (queries, None, head_dim), lambda block, head: (block, head, 0), transforms=_SWIZZLED
    )

    @pl.when(seeing.size > 0)
    def _():
        _walk(
            compute,
            add_block,
            (sees_ref, lse_ref, minus_delta_ref, q_ref, d_out_ref),
            specs=[sees, statistic, statistic, operand, operand],
            blocks=seeing.size * group,
            stages=stages,
            warpgroups=warpgroups,
        )


def _weights(scores, lse, full, visible: Callable) -> jax.Array:
    """The weights of a block, from scores in units of log2; where it is not `full`, of the keys
    that are `visible`."""
    weights = jnp.exp2(scores - lse)
    return lax.cond(full, lambda: weights, lambda: jnp.where(visible(), weights, 0.0))


def _add_product(total, left, right, staging, warpgroup) -> None:
    """total += left @ right, where left is in registers; the interpreter has no such product, so
    there it goes through shared memory."""
    if staging is not None:
        staging = staging.at[warpgroup]
        staging[...] = left
        plgpu.commit_smem()
        left = staging
    plgpu.wgmma(total, left, right)


def _load(ref, layout: Any, *, optimized: bool = True) -> jax.Array:
    return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=optimized)


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_TILE)


def _walk(
    compute: Callable,
    add_block: Callable,
    refs: tuple,
    *,
    specs: list,
    blocks: jax.Array,
    stages: int,
    warpgroups: int,
) -> None:
    """Walk the blocks of refs: one warpgroup loads, `compute` calls the others' walk."""
    plgpu.emit_pipeline_warp_specialized(
        add_block,
        grid=(blocks,),
        max_concurrent_steps=stages,
        num_compute_wgs=warpgroups,
        memory_registers=_LOADING_REGISTERS,
        wg_axis="warpgroup",
        manual_consumed_barriers=True,
        compute_context=compute,
        in_specs=specs,
    )(*refs)


def _launch(
    kernel: Callable,
    *,
    grid: dict[str, int],
    warpgroups: int,
    scratch: tuple,
    out: Any,
    name: str,
    backend: Backend,
) -> Callable:
    """A kernel of arrays and of references; `plgpu.kernel` takes no references."""

    def with_scratch(*refs):
        pl.run_scoped(partial(kernel, *refs), *scratch, collective_axes="warpgroup")

    mesh = plgpu.Mesh(
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
    )
    return pl.kernel(
        with_scratch,
        out_type=out,
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter() if backend.interpret else False,
        name=name,
    )


def _interpreter() -> Any:
    return plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue] (JAX 0.10)


def _sums(columns: int) -> Any:
    """Where products of a warpgroup's rows add up: in its registers, zeros at first."""
    return plgpu.ACC((ROWS, columns), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def _operand(shape: tuple[int, ...]):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=_SWIZZLED)


def _barriers(warpgroups: int):
    return plgpu.Barrier(num_barriers=warpgroups, num_arrivals=2)


def _staging(warpgroups: int, columns: int, backend: Backend):
    """See `_add_product`."""
    return _operand((warpgroups, ROWS, columns)) if backend.interpret else None


def _tiles(kernel: str, q: jax.Array, slots: int, backend: Backend) -> dict[str, int]:
    """queries and keys of a block, and how many blocks are loaded ahead. The rows that a program
    owns are those of its warpgroups, of which there are fewer where rows are not enough."""
    own, rows = {"dq": ("queries", q.shape[0]), "dkv": ("keys", slots)}[kernel]
    default = {"queries": ROWS, "keys": ROWS, "stages": 2}
    tile = tiles(
        "attention_backward", backend.chip, mosaic_key(kernel, q.shape[2], q.dtype), default
    )
    return tile | {own: ROWS * (_WARPGROUPS if rows % (_WARPGROUPS * ROWS) == 0 else 1)}
