"""The layers that decoders are made of, as Flax modules over flat batches of tokens.

Numerics follow transformers: norms run in float32 and are cast back before their weight is applied;
rotary angles are float32. Shapes are [T, ...]: a batch has no padding between its sequences.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flexllm_jax.models.collectives import Axes
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.backend import Backend
from kernels_pallas.layer_passes import add_norm


class Linear(nnx.Module):
    """y = x @ kernel (+ bias); a summand of it when d_in is split over mesh axes."""

    def __init__(
        self, d_in: int, d_out: int, dtype: jnp.dtype, bias: bool = False, axes: Axes = ()
    ):
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out), dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((d_out,), dtype))
        self.has_bias, self.axes = bias, axes

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """Apply the projection; the dtype is x's."""
        y = x @ self.kernel[...]
        if not self.has_bias:
            return y
        bias = self.bias[...]
        if self.axes:  # of the summands, one has the bias
            bias = jnp.where(jax.lax.axis_index(self.axes) == 0, bias, 0)
        return y + bias


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last axis."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalize in float32; the result has x's dtype."""
        return add_norm(x, None, self.weight[...], self.eps)[1]

    def join(
        self, x: Float[Array, "T D"], y: Float[Array, "T D"] | None, backend: Backend, readers: int
    ) -> tuple[Float[Array, "T D"], ...]:
        """The residual x + y, and it normalized, for so many readers: one pass, and one
        backward."""
        return add_norm(x, y, self.weight[...], self.eps, backend, readers)


def rotary_frequencies(config: ModelConfig) -> Float[Array, " F"]:
    """Frequencies of the rotary angles (RoFormer, arXiv 2104.09864), float32 [head_dim / 2].

    With `rope_scaling` the frequencies are changed as Llama 3.1 does: wavelengths above the
    original context are stretched by `factor`, short ones are kept, and those between are
    interpolated.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if (scaling := config.rope_scaling) is not None:
        wavelengths = 2 * math.pi / frequencies
        turns = scaling.original_max_position_embeddings / wavelengths
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (keep + (1.0 - keep) / scaling.factor)
    return frequencies


def rotary_angles(
    config: ModelConfig, positions: Int[Array, " T"]
) -> tuple[Float[Array, "T 1 H"], Float[Array, "T 1 H"]]:
    """Cosine and sine of the rotary angles, float32, for `rotate`. Both halves of a head have the
    same angles, and the sine of the first half is negated."""
    frequencies = rotary_frequencies(config)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
