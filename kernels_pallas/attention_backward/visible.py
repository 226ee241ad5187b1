"""Which keys the queries of a slice see (`base.attention_backward`), for every backend alike."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.layer_options import AttentionOptions


class Visible(NamedTuple):
    """The keys from `first` up to `token`, the query's own, without the gap [gap_first, gap_end):
    what lies between the tokens that it shares and its own sequence. A gap may be empty, and one
    that a window has left behind lies before `first`. int32 of any shape.

    Of a prompt in rows 2 and 3 and an answer in rows 8 and 9, row 9 has first = 2, gap_first = 4,
    gap_end = 8, token = 9.
    """

    first: jax.Array
    gap_first: jax.Array
    gap_end: jax.Array
    token: jax.Array

    @classmethod
    def of(
        cls,
        token: jax.Array,
        starts: jax.Array,
        shared: Sequence[jax.Array],
        options: AttentionOptions,
    ) -> "Visible":
        """Those of queries in the rows `token`."""
        return cls(options.first_keys(starts, token, shared), shared[1], starts, token)

    @classmethod
    def join(cls, sees: Iterable[jax.Array], token: jax.Array) -> "Visible":
        """Of the first three and the last."""
        first, gap_first, gap_end = sees
        return cls(first, gap_first, gap_end, token)

    def expand(self, axis: int) -> "Visible":
        """With one more axis, of size 1."""
        return Visible(*(jnp.expand_dims(x, axis) for x in self))

    @property
    def own_first(self) -> jax.Array:
        """The first key behind the gap."""
        return jnp.maximum(self.first, self.gap_end)

    def holds(self, key: jax.Array) -> jax.Array:
        """Whether each query sees a key; both broadcast."""
        seen = (key >= self.first) & (key <= self.token)
        return seen & ((key < self.gap_first) | (key >= self.gap_end))
