"""Rotary position embeddings (RoFormer, arXiv 2104.09864): frequencies, and how long contexts scale
them. Formulas are transformers'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who reads a config.json alone needs no JAX: functions that compute import it
    from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by a factor (`rope_type: linear`)."""

    factor: float

    attention_factor = 1.0

    def scale(self, frequencies: Float[Array, " F"], theta: float) -> Float[Array, " F"]:
        """The scaled frequencies."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1 and later (`rope_type: llama3`): wavelengths above the original context are
    stretched by `factor`, short ones are kept, and those between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    attention_factor = 1.0

    def scale(self, frequencies: Float[Array, " F"], theta: float) -> Float[Array, " F"]:
        """The scaled frequencies."""
        import jax.numpy as jnp

        wavelengths = 2 * math.pi / frequencies
        turns = self.original_max_position_embeddings / wavelengths
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / self.factor)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): frequencies that turn less than `beta_slow` times in the original
    context are divided by `factor`, those above `beta_fast` turns are kept, and those between are
    mixed by their place. Cosines and sines are multiplied by `attention_factor`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # both ends of the mix to whole numbers

    def scale(self, frequencies: Float[Array, " F"], theta: float) -> Float[Array, " F"]:
        """The scaled frequencies."""
        size = 2 * frequencies.shape[0]

        def place(turns: float) -> float:
            ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return size * math.log(ratio) / (2 * math.log(theta))

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        high += 0.001 * (low == high)  # as transformers does
        import jax.numpy as jnp

        index = jnp.arange(frequencies.shape[0], dtype=jnp.float32)
        slow = jnp.clip((index - low) / (high - low), 0.0, 1.0)
        return frequencies * (1.0 - slow) + frequencies / self.factor * slow


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class RopeSpec:
    """Base frequency and, for longer contexts, a scaling."""

    theta: float
    scaling: RopeScaling | None = None


def rotary_frequencies(rope: RopeSpec, head_dim: int) -> Float[Array, " F"]:
    """Frequencies of the rotary angles, float32 [head_dim / 2]."""
    import jax.numpy as jnp

    half = head_dim // 2
    frequencies = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return frequencies if rope.scaling is None else rope.scaling.scale(frequencies, rope.theta)


def rotary_angles(
    rope: RopeSpec | None, head_dim: int, positions: Int[Array, " T"]
) -> tuple[Float[Array, "T 1 H"], Float[Array, "T 1 H"]]:
    """Cosine and sine of the rotary angles, float32, for `rotate`. Both halves of a head have the
    same angles, and the sine of the first half is negated. Without `rope` they turn nothing."""
    import jax.numpy as jnp

    if rope is None:
        shape = (positions.shape[0], 1, head_dim)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    frequencies = rotary_frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.scaling is not None and rope.scaling.attention_factor != 1.0:
        cos, sin = (rope.scaling.attention_factor * x for x in (cos, sin))
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
