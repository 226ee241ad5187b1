"""The contract of grouped LoRA, and its XLA reference.

The reference takes the adapters that the batch uses one after the other: its work follows their
number, not the slots of the bank. A token's result depends on nothing but its own adapter: what the
others add to its row is zero.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.rows import from_stored


def grouped_lora(
    x: Float[Array, "T D"],
    ys: Sequence[Float[Array, "T E"]],
    a: Sequence[Float[Array, "L A D R"]],
    b: Sequence[Float[Array, "L A R E"]],
    scales: Sequence[Float[Array, "L A"]],
    adapter: Int[Array, " T"],
    layer: Int[Array, ""],
) -> tuple[Float[Array, "T E"], ...]:
    """ys[j] + scales[j][l, i] * (x @ a[j][l, i]) @ b[j][l, i] for each token, with i = adapter[t]
    and l = layer.

    Args:
        x: input of several base projections.
        ys: their outputs; E may differ from one to the next.
        a: for each projection, the down projections of all adapters, as `rows.stored_dtype` says;
            adapters of a smaller rank are padded with zeros.
        b: for each projection, the up projections.
        scales: for each projection, LoRA's alpha / r (or alpha / sqrt(r)) of each adapter; float32.
        adapter: row of a, b and scales for each token, or -1: y stays as it is; int32.
        layer: which layer's factors; those of which there is one layer are the same in all.

    Returns:
        The sums, in the dtype of ys. Products accumulate in float32.
    """

    def add(row: jax.Array, ys: tuple) -> tuple:
        own_a, own_b, scale = (
            [stack[_index(stack, layer), row] for stack in stacks] for stacks in (a, b, scales)
        )
        own = adapter == row
        down, up = _factors(own_a, own_b, x.dtype)
        shrunk = _shrink(x, down, scale, own)
        return tuple(
            y + jnp.matmul(s, u, precision=_exact(s), preferred_element_type=y.dtype)
            for y, s, u in zip(ys, shrunk, up, strict=True)
        )

    return _for_each_adapter(adapter, a[0].shape[1], add, tuple(ys))


def of_layer(stack: Float[Array, "L A ..."], layer: Int[Array, ""]) -> Float[Array, "A ..."]:
    """One layer's part; of what is the same in all, that."""
    return lax.dynamic_index_in_dim(stack, _index(stack, layer), keepdims=False)


def _index(stack: jax.Array, layer: jax.Array) -> jax.Array | int:
    return layer if stack.shape[0] > 1 else 0


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
    """Gradients of `grouped_lora` with respect to x, a and b (that of ys is d_ys itself).

    dx = sum over j of d_s @ a.T, da = x.T @ d_s, db = s.T @ d_y, with s = scale * x @ a and
    d_s = scale * d_y @ b.T over the tokens of each adapter. Unlike in `grouped_lora`, x and d_ys
    must be finite for tokens of no adapter too.

    Returns:
        dx in x's dtype; da and db in theirs: zeros for an adapter without tokens.
    """

    # Products of XLA's CPU that transpose what they read, or give, are several times slower.
    apart = lax.optimization_barrier

    def add(row: jax.Array, carry: tuple) -> tuple:
        dx, da, db = carry
        own_a, own_b, scale = ([w[row] for w in weights] for weights in (a, b, scales))
        own = adapter == row
        down, up = _factors(own_a, own_b, x.dtype)
        shrunk = _shrink(x, down, scale, own)
        d_shrunk = [
            jnp.where(own[:, None], s * product("te,re->tr", d_y, u), 0).astype(x.dtype)
            for d_y, u, s in zip(d_ys, up, scale, strict=True)
        ]
        dx = dx + product("tr,dr->td", jnp.concatenate(d_shrunk, 1), jnp.concatenate(down, 1))
        da = [
            total.at[row].set(apart(product("rt,td->rd", apart(d.T), x)).T.astype(total.dtype))
            for total, d in zip(da, d_shrunk, strict=True)
        ]
        db = [
            total.at[row].set(product("rt,te->re", apart(s.T), d_y).astype(total.dtype))
            for total, s, d_y in zip(db, shrunk, d_ys, strict=True)
        ]
        return dx, tuple(da), tuple(db)

    zeros = (
        jnp.zeros(x.shape, jnp.float32),
        tuple(jnp.zeros_like(w) for w in a),
        tuple(jnp.zeros_like(w) for w in b),
    )
    dx, da, db = _for_each_adapter(adapter, a[0].shape[0], add, zeros)
    return dx.astype(x.dtype), da, db


def _for_each_adapter(adapter: jax.Array, num_adapters: int, add, carry):
    """carry = add(row, carry) for the row of every adapter that a token has."""
    if num_adapters == 1:
        return add(jnp.int32(0), carry)
    present = jnp.any(adapter[:, None] == jnp.arange(num_adapters), axis=0)
    # Rows of the adapters in use come first.
    place = jnp.where(present, jnp.cumsum(present) - 1, num_adapters)
    rows = jnp.zeros(num_adapters, jnp.int32).at[place].set(jnp.arange(num_adapters), mode="drop")
    return lax.fori_loop(0, jnp.sum(present), lambda i, carry: add(rows[i], carry), carry)


def _factors(a, b, dtype) -> tuple[list[jax.Array], list[jax.Array]]:
    """A row's factors in the inputs' dtype."""
    down, up = ([from_stored(w).astype(dtype) for w in factors] for factors in (a, b))
    return down, up


def _shrink(x, down, scale, own) -> list[jax.Array]:
    """scale * x @ a for each projection, in one product; zeros where the token is not the row's."""
    shrunk = product("td,dr->tr", x, jnp.concatenate(down, axis=1))
    rank = down[0].shape[1]
    factors = jnp.repeat(jnp.stack(scale), rank)
    shrunk = jnp.where(own[:, None], shrunk * factors, 0.0).astype(x.dtype)
    return jnp.split(shrunk, len(down), axis=1)


def product(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The einsum of x and y in float32."""
    return jnp.einsum(formula, x, y, precision=_exact(x), preferred_element_type=jnp.float32)


def _exact(x: jax.Array) -> lax.Precision | None:
    """For products of x: GPUs would otherwise round float32 factors to TF32."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def job_lora(
    x: Float[Array, "T D"],
    ys: Sequence[Float[Array, "T E"]],
    a: Sequence[Float[Array, "L D R"]],
    b: Sequence[Float[Array, "L R E"]],
    scales: Sequence[Float[Array, " L"]],
    present: Bool[Array, " T"],
    layer: Int[Array, ""],
) -> tuple[Float[Array, "T E"], ...]:
    """`grouped_lora` of the one adapter that a job trains, in one layer of its factors.

    With gradients that a unit adds to what the units before it have left: `api.job_lora` takes
    their sums, too, and what it gives as the sums' gradient is the sums with this one's share.
    The factors are constants. So a kernel can add in place, where adding up gradients takes one
    more pass over each.

    Args:
        x: input of several base projections.
        ys: their outputs; E may differ from one to the next.
        a: for each projection, the adapter's down projections in L layers.
        b: for each projection, its up projections.
        scales: for each projection, LoRA's alpha / r in each layer; float32.
        present: tokens that have the adapter; y stays as it is for the others, whose x and gradient
            of y must be finite.
        layer: which of the L.

    Returns:
        The sums, in the dtype of ys.
    """
    a, b, scales = (tuple(w[:, None] for w in factors) for factors in (a, b, scales))
    return grouped_lora(x, ys, a, b, scales, jnp.where(present, 0, -1), layer)


def job_lora_backward(x, d_ys, a, b, scales, present, layer, sums):
    """dx, and the sums of gradients (of all a, of all b: [L, ...] each) with this share added."""
    a, b, scales = (tuple(w[layer][None] for w in factors) for factors in (a, b, scales))
    dx, *gradients = grouped_lora_backward(x, d_ys, a, b, scales, jnp.where(present, 0, -1))

    def add(total: jax.Array, gradient: jax.Array) -> jax.Array:
        if total.shape[0] == 1:
            return total + gradient
        return lax.dynamic_update_index_in_dim(total, total[layer] + gradient[0], layer, axis=0)

    return dx, jax.tree.map(add, sums, tuple(gradients))
