"""What a kind of mixer is to the decoder's layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from flexllm_jax.models.layers import RMSNorm
from kernels_pallas.rows import Recalled

Tap = Callable[[str, jax.Array], jax.Array | Recalled]


class Mixer(ABC):
    """One kind; `layer` is a `DecoderLayer` that has it."""

    @abstractmethod
    def add_parameters(
        self,
        layer: Any,
        spec: Any,
        norm: Callable[[int], RMSNorm],
        dtype: jax.typing.DTypeLike,
    ) -> None:
        """Give a layer the parameters that are no projections. norm: makes one of a size."""

    @abstractmethod
    def inputs(
        self,
        layer: Any,
        outputs: dict[str, Float[Array, "T X"]],
        tap: Tap,
        query_factor: Float[Array, "T 1 1"] | None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """What is mixed, from the projections' outputs by name, and what `gated` takes."""

    def gated(
        self, layer: Any, mixed: Float[Array, "T N H"] | Recalled, gate: jax.Array | None
    ) -> Float[Array, "T NH"] | Recalled:
        """What the output projection reads, from what the mixing returned."""
        return mixed.reshape(mixed.shape[0], -1)
