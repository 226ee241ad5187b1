"""What attention computes beyond causal softmax attention: the same for its forward, its backward
and every backend, and static in the programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # who reads a config.json alone needs no JAX
    from collections.abc import Sequence

    import jax

Activation = Literal["silu", "gelu_tanh"]  # of a feed-forward network


@dataclass(frozen=True)
class AttentionOptions:
    """How scores are made of queries and keys.

    scale: what their products are multiplied by; None: 1/sqrt(H). window: a query sees only this
    many keys, its own included; None: all before it. soft_cap: scores s become soft_cap * tanh(s /
    soft_cap); None leaves them.

    With window=3 (x: sees):    key 0 1 2 3 4
                       query 3          x x x
                       query 4            x x x   (its own is key 4)
    """

    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None

    def scale_of(self, head_dim: int) -> float:
        """The factor for heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def first_keys(
        self,
        starts: jax.Array,
        rows: jax.Array,
        shared: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """The first key that each query sees: `starts`, of their sequences, or later. `rows`: their
        own places, in the same count. A start past its row, as padding has, stays there.

        shared: the first and the end of the tokens that come before each sequence, anywhere ahead
        of it; both are its start where none do. A window counts them as if they lay right before.
        """
        import jax.numpy as jnp

        first, end = (starts, starts) if shared is None else shared
        if self.window is None:
            return first
        if shared is None:
            return jnp.maximum(starts, rows - self.window + 1)
        left = self.window - 1 - (rows - starts)  # of the window, for what comes before
        return jnp.where(left > 0, jnp.maximum(first, end - left), starts - left)


FULL = AttentionOptions()
