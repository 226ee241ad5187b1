"""All of grouped LoRA in a forward's layer, from attention's output on to the next layer's keys in
their pages: the passes that add its sums and begin its products, without the base's products."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora.api import ahead, low_rank_sums
from kernels_pallas.grouped_lora.sums import LowRankSum
from kernels_pallas.layer_passes import add_norm, gated, rotate_and_write
from kernels_pallas.rows import as_array

PAGE, HEAD = 64, 128
_EPS = 1e-5


class Projections(NamedTuple):
    """Those that read the same: what the base's gave, and all adapters' factors, of which the
    second layer's are meant."""

    ys: tuple[jax.Array, ...]
    a: tuple[jax.Array, ...]
    b: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]


def layer(
    attended, x, o, gate_up, down, qkv, weights, adapter, cos, sin, slots, k_pages, v_pages,
    backend: Backend = XLA, *, apart: bool = False, keep: bool = False,
):  # fmt: skip
    """The residual, the feed-forward network's inner activations, queries and pages. keep: and what
    a forward keeps for a backward, the sums of gate, up and q; those of q, k and v are then columns
    of one array.

    apart: with a launch for every shrink and expand, and passes that read arrays.
    """
    read: Any = as_array if apart else lambda x: x

    def add(x: Any, own: Projections, merged: bool = False) -> list[Any]:
        sums = low_rank_sums(x, *own, adapter, backend, 1, merged=merged)
        return [read(y) for y in sums]

    def first(own: Projections) -> Any:
        return None if apart else ahead(own.a, own.scales, adapter, backend, 1)

    def want(*sums: Any) -> list[Any]:
        for y in sums:
            if keep and isinstance(y, LowRankSum):
                y.keep()
        return list(sums) if keep else []

    (y,) = add(attended, o)
    x, _, h = add_norm(x, y, weights[0], _EPS, backend, 2, first(gate_up))
    gate, up = add(h, gate_up)
    kept = want(gate, up)
    inner, low = gated(gate, up, backend, 2, "silu", first(down))
    (y,) = add(low, down)
    x, _, h = add_norm(x, y, weights[1], _EPS, backend, 2, first(qkv))
    q, k, v = (y.reshape(x.shape[0], -1, cos.shape[-1]) for y in add(h, qkv, merged=keep))
    kept += want(q)
    written = rotate_and_write(q, k, v, (cos, sin), slots, k_pages, v_pages, backend=backend)
    return x, inner, *written, *map(as_array, kept)


def make_layer(
    key, groups: dict[str, tuple[int, tuple[int, ...]]], tokens: int, adapters: int, rank: int,
    head_dim: int, dtype: Any, without: bool = False,
) -> tuple:  # fmt: skip
    """Arguments of `layer`: tokens of all adapters in turn, or (`without`) one more of none; some
    keys have no page. groups: name -> (D, each E)."""
    keys = iter(jax.random.split(key, 64))

    def normal(*shape: int, scale: float = 1.0):
        return scale * jax.random.normal(next(keys), shape, dtype)

    def projections(d_in: int, d_outs: tuple[int, ...]) -> Projections:
        return Projections(
            tuple(normal(tokens, d) for d in d_outs),
            tuple(normal(2, adapters, d_in, rank, scale=d_in**-0.5) for _ in d_outs),
            tuple(normal(2, adapters, rank, d, scale=rank**-0.5) for d in d_outs),
            tuple(jnp.outer(jnp.arange(2.0), jnp.linspace(0.5, 2, adapters)) for _ in d_outs),
        )

    own = {name: projections(*group) for name, group in groups.items()}
    adapter = jnp.arange(tokens, dtype=jnp.int32) % (adapters + without)
    adapter = jnp.where(adapter == adapters, -1, adapter)
    angle = jax.random.normal(next(keys), (tokens, 1, head_dim // 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    angles = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    heads = groups["qkv"][1][1] // head_dim
    k_pages, v_pages = (normal(tokens // PAGE + 2, PAGE, heads, head_dim) for _ in "kv")
    slots = (jnp.arange(tokens, dtype=jnp.int32) * 2) % (k_pages.shape[0] * PAGE + 7)
    attended, x = normal(tokens, groups["o"][0]), normal(tokens, groups["qkv"][0])
    weights = normal(x.shape[1]), normal(x.shape[1])
    layer = (own[name] for name in ("o", "gate_up", "down", "qkv"))
    return attended, x, *layer, weights, adapter, *angles, slots, k_pages, v_pages
