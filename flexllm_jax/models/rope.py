"""Rotary position embeddings (RoFormer, arXiv 2104.09864): frequencies, and how long contexts scale
them. Formulas are transformers'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): every frequency is divided by a factor of its own. There are two
    lists of them; which is used is decided once, by the engine's context (`ModelConfig.from_hf`),
    as keys stay in their pages. Cosines and sines are multiplied by `attention_factor`."""

    factors: tuple[float, ...]
    attention_factor: float

    def scale(self, frequencies: Float[Array, " F"], theta: float) -> Float[Array, " F"]:
        """The scaled frequencies."""
        import jax.numpy as jnp

        return frequencies / jnp.asarray(self.factors, jnp.float32)


@dataclass(frozen=True)
class ProportionalScaling:
    """Gemma 4's layers of full attention (`rope_type: proportional`): the frequencies of whole
    heads, of which only the first `turned` pairs turn."""

    turned: int
    factor: float = 1.0  # by which all are divided

    attention_factor = 1.0

    def scale(self, frequencies: Float[Array, " F"], theta: float) -> Float[Array, " F"]:
        """The frequencies, zeros where nothing turns."""
        import jax.numpy as jnp

        turns = jnp.arange(frequencies.shape[0]) < self.turned
        return jnp.where(turns, frequencies / self.factor, 0.0)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | ProportionalScaling


@dataclass(frozen=True)
class RopeSpec:
    """Base frequency and, for longer contexts, a scaling.

    rotated: how many of a head's elements are rotated, the first ones; None: all. neighbours: pairs
    are of neighbours, and not one of the first with one of the second half of what is rotated.
    growth: (b, n): queries at position p are multiplied by 1 + b ln(1 + floor(p / n)).
    """

    theta: float
    scaling: RopeScaling | None = None
    rotated: int | None = None
    neighbours: bool = False
    growth: tuple[float, int] | None = None

    def reorders(self, head_dim: int) -> bool:
        """Whether `pair` changes anything."""
        return self.neighbours or self.rotated not in (None, head_dim)

    def pair(self, x: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        """A head with its elements in the order that `rotary_angles` is for: those of a pair half a
        head apart, the rotated ones first in both halves. Scores do not depend on the order, as
        queries and keys have the same."""
        import jax.numpy as jnp

        if not self.reorders(x.shape[-1]):
            return x
        rotated = self.rotated or x.shape[-1]
        turned, rest = x[..., :rotated], x[..., rotated:]
        if self.neighbours:
            halves = turned[..., 0::2], turned[..., 1::2]
        else:
            halves = jnp.split(turned, 2, axis=-1)
        rests = jnp.split(rest, 2, axis=-1)
        return jnp.concatenate([halves[0], rests[0], halves[1], rests[1]], axis=-1)


def rotary_frequencies(rope: RopeSpec, head_dim: int) -> Float[Array, " F"]:
    """Frequencies of the rotary angles, float32 [rotated / 2]."""
    import jax.numpy as jnp

    half = (rope.rotated or head_dim) // 2
    frequencies = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return frequencies if rope.scaling is None else rope.scaling.scale(frequencies, rope.theta)


class Angles(NamedTuple):
    """What the positions of tokens do to queries and keys: cosines and sines of rotary angles
    [T, 1, H] float32; and what queries are multiplied by [T, 1, 1], None for nothing."""

    cos: Array
    sin: Array
    query_factor: Array | None = None

    @property
    def rotation(self) -> tuple[Array, Array]:
        """As the kernels take them."""
        return self.cos, self.sin


def rotary_angles(rope: RopeSpec | None, head_dim: int, positions: Int[Array, " T"]) -> Angles:
    """Cosine and sine of the rotary angles, float32, for `rotate` of what `RopeSpec.pair` gives.
    Both halves of a head have the same angles, and the sine of the first half is negated. Without
    `rope` they turn nothing."""
    import jax.numpy as jnp

    if rope is None:
        shape = (positions.shape[0], 1, head_dim)
        return Angles(jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
    frequencies = rotary_frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.scaling is not None and rope.scaling.attention_factor != 1.0:
        cos, sin = (rope.scaling.attention_factor * x for x in (cos, sin))
    if still := head_dim // 2 - frequencies.shape[0]:  # what is not rotated
        widths = ((0, 0), (0, 0), (0, still))
        cos, sin = jnp.pad(cos, widths, constant_values=1.0), jnp.pad(sin, widths)
    factor = None
    if rope.growth is not None:
        beta, original = rope.growth
        factor = 1.0 + beta * jnp.log1p((positions // original).astype(jnp.float32))[:, None, None]
    cos, sin = (jnp.concatenate(halves, axis=-1) for halves in ([cos, cos], [-sin, sin]))
    return Angles(cos, sin, factor)
