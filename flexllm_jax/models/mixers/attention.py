"""Attention as a mixer: queries, keys and values, of which the keys and values are kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flexllm_jax.models.collectives import Axes, mean_of_devices
from flexllm_jax.models.layers import RMSNorm, unit_norm
from flexllm_jax.models.mixers.mixer import Mixer, Tap
from flexllm_jax.models.spec import AttentionSpec
from kernels_pallas.rows import Recalled, as_array, recall


class AttentionMixer(Mixer):
    """The layer's part of attention, before and behind; see `AttentionSpec`."""

    def add_parameters(
        self,
        layer: Any,
        spec: AttentionSpec,
        norm: Callable[[int], RMSNorm],
        dtype: jax.typing.DTypeLike,
    ) -> None:
        """Norms of queries and keys; sinks."""
        if spec.sinks:
            layer.sinks = nnx.Param(jnp.zeros((spec.heads,), dtype))
        if spec.qk_norm in ("head", "projection"):
            sizes = spec.inner, spec.kv_heads * spec.head_dim
            if spec.qk_norm == "head":
                sizes = (spec.head_dim,) * 2
            layer.q_norm = norm(sizes[0])
            if spec.own_keys:
                layer.k_norm = norm(sizes[1])

    def inputs(
        self,
        layer: Any,
        outputs: dict[str, Float[Array, "T X"]],
        tap: Tap,
        query_factor: Float[Array, "T 1 1"] | None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """Queries [T, N, H], keys and values [T, K, H], not rotated yet; and the output's gate
        [T, N H], if it has one."""
        spec: Any = layer.spec.mixer
        gate = None
        if spec.fused:
            qkv = as_array(outputs["qkv"])
            q, *own = jnp.split(qkv, [spec.inner, (qkv.shape[1] + spec.inner) // 2], axis=1)
        else:
            q, *own = (outputs[name] for name in ("q", "k", "v") if name in outputs)
        if spec.gate_projection:
            gate = as_array(tap("attention_gate", outputs["attention_gate"]))
        if spec.gate:  # of each head the query, then its gate
            q, gate = jnp.split(as_array(q).reshape(-1, spec.heads, 2 * spec.head_dim), 2, axis=-1)
            q, gate = (x.reshape(-1, spec.inner) for x in (q, gate))
            gate = as_array(tap("attention_gate", gate))
        q = recall(tap("query", q))
        if own and spec.qk_norm:
            own[0] = recall(tap("key", own[0]))
        q, *keys = self._normed(layer, q, *own[:1])
        if query_factor is not None:
            q = as_array(q)
            q = q * query_factor.astype(q.dtype)
        if not own:
            return (q,), gate
        k, v = own[0], own[-1]
        if spec.values == "keys":
            v = k
        elif spec.v_norm:
            v = as_array(tap("value", v))
        v = v.reshape(v.shape[0], -1, spec.head_dim)
        if spec.v_norm:
            v = unit_norm(as_array(v), layer.spec.norm.eps)
        return (q, *keys, v), gate

    def _normed(self, layer: Any, *projected: Float[Array, "T X"]) -> list[Float[Array, "T N H"]]:
        """Queries, and keys if there are some, normed, and in the order in which they are
        rotated."""
        norms = ("q_norm", "k_norm")[: len(projected)]
        if layer.spec.mixer.qk_norm == "projection":
            whole = tuple(map(as_array, projected))
            projected = _norm_whole([getattr(layer, n) for n in norms], whole, layer.axes)
        return [self._by_heads(layer, x, n) for x, n in zip(projected, norms, strict=True)]

    def _by_heads(self, layer: Any, x: Float[Array, "T X"], norm: str) -> Float[Array, "T N H"]:
        spec: AttentionSpec = layer.spec.mixer
        x = x.reshape(x.shape[0], -1, spec.head_dim)
        if spec.qk_norm == "head":
            x = getattr(layer, norm)(as_array(x))
        if spec.qk_norm == "unit":
            x = unit_norm(as_array(x), layer.spec.norm.eps)
        if spec.rope is None or not spec.rope.reorders(spec.head_dim):
            return x
        return spec.rope.pair(as_array(x))

    def gated(
        self, layer: Any, mixed: Float[Array, "T N H"] | Recalled, gate: jax.Array | None
    ) -> Float[Array, "T NH"] | Recalled:
        """Attention's output, times the sigmoid of its gate."""
        flat = super().gated(layer, mixed, gate)
        return flat if gate is None else as_array(flat) * jax.nn.sigmoid(gate)


def sinks_of(layer: Any) -> Float[Array, " N"] | None:
    """The sinks of a layer that attends; None: it has none."""
    return layer.sinks[...] if layer.spec.mixer.sinks else None


def _norm_whole(
    norms: list[RMSNorm], projected: tuple[Float[Array, "T X"], ...], axes: Axes
) -> tuple[Float[Array, "T X"], ...]:
    """Queries and keys, each normed over all heads. Where each device has some of the heads, their
    mean squares come from all devices in one all-reduce; every head of keys is on as many."""
    both = list(zip(norms, projected, strict=True))
    if not axes:
        return tuple(norm(x) for norm, x in both)
    wide = [x.astype(jnp.float32) for x in projected]
    own = jnp.stack([jnp.mean(x * x, axis=-1, keepdims=True) for x in wide])
    means = mean_of_devices(own, axes)
    return tuple(norm.part(x, mean) for (norm, x), mean in zip(both, means, strict=True))
