"""The gradients of grouped LoRA with many adapters, in XLA over blocks of one adapter each.

Nothing on a GPU waits for them (finetuning has one adapter, serving no gradients), so there are no
kernels here: batched products over the blocks of `block_map`, whose work follows the tokens and not
the adapters, without loops or atomics.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_lora.base import product
from kernels_pallas.grouped_lora.blocks import BlockMap, block_map, block_rows


def grouped_lora_backward(
    x: Float[Array, "T D"],
    d_ys: Sequence[Float[Array, "T E"]],
    a: Sequence[Float[Array, "A D R"]],
    b: Sequence[Float[Array, "A R E"]],
    scales: Sequence[Float[Array, " A"]],
    adapter: Int[Array, " T"],
) -> tuple[
    Float[Array, "T D"], tuple[Float[Array, "A D R"], ...], tuple[Float[Array, "A R E"], ...]
]:
    """See `base.grouped_lora_backward`."""
    num_adapters = a[0].shape[0]
    blocks = block_map(adapter, num_adapters, block_rows(x.shape[0], num_adapters))
    rows = _rows_or_zeros(x, blocks.tokens)
    dx, da, db = jnp.zeros(rows.shape, jnp.float32), [], []
    for d_y, down, up, scale in zip(d_ys, a, b, scales, strict=True):
        d_y, scale = _rows_or_zeros(d_y, blocks.tokens), _rows_or_zeros(scale, blocks.adapter)
        block_down = _rows_or_zeros(down, blocks.adapter).astype(x.dtype)
        block_up = _rows_or_zeros(up, blocks.adapter).astype(x.dtype)
        scale = scale[:, None, None]
        s = (scale * product("bmd,bdr->bmr", rows, block_down)).astype(x.dtype)
        d_s = (scale * product("bme,bre->bmr", d_y, block_up)).astype(x.dtype)
        dx += product("bmr,bdr->bmd", d_s, block_down)
        da.append(_sum_by_adapter(product("bmd,bmr->bdr", rows, d_s), blocks, down))
        db.append(_sum_by_adapter(product("bmr,bme->bre", s, d_y), blocks, up))
    dx = _rows_or_zeros(dx.reshape(-1, x.shape[1]), blocks.place)
    return dx.astype(x.dtype), tuple(da), tuple(db)


def _rows_or_zeros(values: jax.Array, rows: jax.Array) -> jax.Array:
    """values[rows], zeros for rows beyond the last."""
    return jnp.take(values, rows, axis=0, mode="fill", fill_value=0)


def _sum_by_adapter(values: jax.Array, blocks: BlockMap, like: jax.Array) -> jax.Array:
    """The sum of each adapter's blocks: a product, since XLA's scatter-add is atomic on GPUs."""
    own = jnp.arange(like.shape[0])[:, None] == blocks.adapter
    return product("ab,bij->aij", own.astype(jnp.float32), values).astype(like.dtype)
