"""IA3 (arXiv 2205.05638) as a bypass: keys, values and the inner activations of the feed-forward
network are scaled element by element, y + (l - 1) * y.

The feed-forward network's inner activations silu(gate) * up are scaled through `up`, which is the
same. The number of a site is 1 where an adapter has it: rows of the bank without it hold zeros.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from flexllm_jax.models.bypass import Outputs
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import AdapterConfig, AdapterError, Weights
from kernels_pallas.rows import as_array, from_stored

# Site -> the projection whose output it scales.
SCALED = {"ia3_k": "k", "ia3_v": "v", "ia3_inner": "up"}
# PEFT's names of the modules -> site; it scales the input of the last one.
PEFT_SITES = {"k_proj": "ia3_k", "v_proj": "ia3_v", "down_proj": "ia3_inner"}


@dataclass(frozen=True)
class Ia3Config(AdapterConfig):
    """PEFT's IA3 configuration; `target_modules` are some of `PEFT_SITES`."""

    target_modules: tuple[str, ...] = tuple(PEFT_SITES)

    kind: ClassVar[str] = "ia3"

    def __post_init__(self) -> None:
        unknown = [name for name in self.target_modules if name not in PEFT_SITES]
        if unknown or not self.target_modules:
            raise AdapterError(
                f"target_modules={unknown or []!r}: IA3 changes one or more of "
                f"{', '.join(PEFT_SITES)}"
            )

    def initialize(self, model: ModelConfig, seed: int) -> Weights:
        """Ones, as in PEFT: nothing is changed."""
        sites = [PEFT_SITES[name] for name in self.target_modules]
        return {
            (layer, site): {"scale": np.ones(width, np.float32)}
            for layer in range(model.num_layers)
            for site, width in site_widths(model, layer).items()
            if site in sites
        }


def site_widths(model: ModelConfig, layer: int) -> dict[str, int]:
    """Length of each site's scale in a layer."""
    shapes = model.kernel_shapes(layer)
    return {site: shapes[module][1] for site, module in SCALED.items() if module in shapes}


def ia3(weights: dict, scales: dict, adapter: Int[Array, " T"], outputs: Outputs) -> Outputs:
    """`outputs` with those scaled that a site of the layer belongs to.

    Args:
        weights: site -> {"scale": [A, d_out]}; a site that is absent changes nothing.
        scales: site -> [A] float32, 1 for adapters that have the site, else 0.
        adapter: row of the weights for each token, or -1.
        outputs: projection -> [T, d_out].
    """
    scaled = dict(outputs)
    for site, name in SCALED.items():
        if site in weights and name in outputs:
            own = scales[site][:, None]
            factors = 1 + own * (from_stored(weights[site]["scale"]).astype(jnp.float32) - 1)
            rows = factors if len(factors) == 1 else factors[adapter]
            factor = jnp.where(adapter[:, None] < 0, 1.0, rows)
            output = as_array(outputs[name])
            scaled[name] = output * factor.astype(output.dtype)
    return scaled
