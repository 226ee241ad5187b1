"""A gated delta net as a mixer (arXiv 2412.06464), as Qwen3.5 and OLMo Hybrid have it.

With u = x W, s = silu(conv(u)) = [q, k, v]: k and q have length 1 in each head, and q is divided by
the root of its size; beta = sigmoid(b), g = -exp(log_a) softplus(a + dt_bias). The rule itself is
`kernels_pallas.gated_delta`. What it returns is normalized in each head and multiplied by silu(z).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flexllm_jax.models.layers import RMSNorm
from flexllm_jax.models.mixers.mixer import Mixer, Tap
from flexllm_jax.models.spec import GatedDeltaSpec
from kernels_pallas.rows import as_array

_EPS = 1e-6  # in the length of queries and keys


class Convolution(nnx.Module):
    """The weights of a depthwise causal convolution."""

    def __init__(self, width: int, channels: int, dtype: jax.typing.DTypeLike):
        self.weight = nnx.Param(jnp.zeros((width, channels), dtype))


class Decay(nnx.Module):
    """How fast each head forgets; float32 whatever the model's dtype is."""

    def __init__(self, heads: int):
        self.log_a = nnx.Param(jnp.zeros((heads,), jnp.float32))
        self.dt_bias = nnx.Param(jnp.zeros((heads,), jnp.float32))


class GatedDeltaMixer(Mixer):
    """The layer's part of the gated delta net; see `GatedDeltaSpec`."""

    def add_parameters(
        self,
        layer: Any,
        spec: GatedDeltaSpec,
        norm: Callable[[int], RMSNorm],
        dtype: jax.typing.DTypeLike,
    ) -> None:
        """The convolution's weights, the decay's, and the norm of the output."""
        layer.conv = Convolution(spec.width, spec.channels, dtype)
        layer.decay = Decay(spec.value_heads)
        layer.out_norm = RMSNorm(spec.value_dim, spec.norm, jnp.dtype(dtype))

    def inputs(
        self,
        layer: Any,
        outputs: dict[str, Float[Array, "T X"]],
        tap: Tap,
        query_factor: Float[Array, "T 1 1"] | None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """What the convolution reads [T, C]; b and a [T, Hv]; and the output's gate [T, Hv dv]."""
        *qkv, gate, b, a = (as_array(outputs[name]) for name in layer.spec.mixer.projected)
        u = qkv[0] if len(qkv) == 1 else jnp.concatenate(qkv, axis=1)
        return (as_array(tap("delta", u)), b, a), as_array(tap("delta_gate", gate))

    def gated(
        self, layer: Any, mixed: Float[Array, "T Hv dv"], gate: jax.Array | None
    ) -> Float[Array, "T Hvdv"]:
        """Each head normalized, times silu of its gate, which is not rounded before."""
        assert gate is not None
        spec: Any = layer.spec.mixer
        heads = mixed.reshape(-1, spec.value_heads, spec.value_dim)
        flat = layer.out_norm(heads).reshape(gate.shape)
        return (flat * jax.nn.silu(gate.astype(jnp.float32))).astype(mixed.dtype)


def rule_inputs(
    layer: Any, convolved: Float[Array, "T C"], b: Float[Array, "T Hv"], a: Float[Array, "T Hv"]
) -> tuple[jax.Array, ...]:
    """What the delta rule takes: q and k [T, Hk, dk], v [T, Hv, dv]; log_decay and beta [T, Hv],
    float32."""
    spec: Any = layer.spec.mixer
    keys = spec.key_heads * spec.key_dim
    q, k, v = jnp.split(convolved, [keys, 2 * keys], axis=1)
    q, k = (_unit(x.reshape(-1, spec.key_heads, spec.key_dim)) for x in (q, k))
    q = (q * spec.key_dim**-0.5).astype(convolved.dtype)
    beta = spec.beta_scale * jax.nn.sigmoid(b.astype(jnp.float32))
    step = jax.nn.softplus(a.astype(jnp.float32) + layer.decay.dt_bias[...])
    log_decay = -jnp.exp(layer.decay.log_a[...]) * step
    v = v.reshape(-1, spec.value_heads, spec.value_dim)
    return q, k.astype(convolved.dtype), v, log_decay, beta


def _unit(x: Float[Array, "T H D"]) -> Float[Array, "T H D"]:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)
