"""Bottleneck adapters (arXiv 1902.00751) as a bypass: y + relu(y D + d) U + u after attention's
output projection and after the feed-forward network, before the residual is added.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from flexllm_jax.models.bypass import Outputs
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import AdapterConfig, AdapterError, Weights
from flexllm_jax.peft.stacks import of_layer
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import grouped_lora
from kernels_pallas.rows import as_array, from_stored

# Site -> the projection whose output goes through it.
FOLLOWS = {"bottleneck_o": "o", "bottleneck_down": "down"}


@dataclass(frozen=True)
class BottleneckConfig(AdapterConfig):
    """`bottleneck_size`: its width."""

    bottleneck_size: int

    kind: ClassVar[str] = "bottleneck"

    def __post_init__(self) -> None:
        size = self.bottleneck_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise AdapterError(f"bottleneck_size={size!r} must be a positive integer")

    def initialize(self, model: ModelConfig, seed: int) -> Weights:
        """D normal with deviation 0.01 (as in the paper), all else zero, so nothing is changed."""
        weights, own_shapes = {}, shapes(model, self.bottleneck_size)
        for layer in range(model.num_layers):
            for index, site in enumerate(FOLLOWS):
                own = {name: np.zeros(shape, np.float32) for name, shape in own_shapes.items()}
                random = np.random.default_rng([seed, layer, index])
                own["down"] = random.normal(0, 0.01, own["down"].shape).astype(np.float32)
                weights[layer, site] = own
        return weights


def shapes(model: ModelConfig, size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a site's weights."""
    d = model.d_model
    return {"down": (d, size), "down_bias": (size,), "up": (size, d), "up_bias": (d,)}


def bottleneck(
    weights: dict,
    scales: dict,
    adapter: Int[Array, " T"],
    outputs: Outputs,
    layer: Int[Array, ""] | int = 0,
    backend: Backend = XLA,
) -> Outputs:
    """`outputs` with those sent through their bottleneck that a site of the layer belongs to.

    Both products are those of `grouped_lora`, each with an identity as its other factor.

    Args:
        weights: site -> `shapes`, with leading axes of L layers and A adapters.
        scales: site -> [L, A] float32, 1 for adapters that have the site, else 0: zeros would not
            do, as biases learn from them.
        adapter: row of the weights for each token, or -1.
        outputs: projection -> [T, d].
        layer: which of the L it is.
        backend: which kernels to use.
    """
    changed = dict(outputs)
    for site, name in FOLLOWS.items():
        if site in weights and name in outputs:
            own, present, y = weights[site], scales[site], as_array(outputs[name])
            _, rows, size = own["down_bias"].shape
            eye = jnp.broadcast_to(jnp.eye(size, dtype=y.dtype), (1, rows, size, size))
            here = of_layer(present, layer)[:, None]
            down_bias, up_bias = (
                _row(from_stored(of_layer(own[n], layer)) * here, adapter).astype(y.dtype)
                for n in ("down_bias", "up_bias")
            )
            inner: Any = grouped_lora(
                y, (down_bias,), (own["down"],), (eye,), (present,), adapter, backend, layer
            )
            outer: Any = grouped_lora(
                jax.nn.relu(inner[0]),
                (y + up_bias,),
                (eye,),
                (own["up"],),
                (present,),
                adapter,
                backend,
                layer,
            )
            (changed[name],) = outer
    return changed


def _row(values: jax.Array, adapter: Int[Array, " T"]) -> jax.Array:
    """Each token's row, zero without an adapter."""
    rows = values if len(values) == 1 else values[adapter]
    return jnp.where(adapter[:, None] < 0, 0, rows)
