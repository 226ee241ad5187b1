"""LoRA (arXiv 2106.09685) as a bypass: y + scale * (x @ A) @ B, with each token's own adapter."""

import jax
from jaxtyping import Array, Int

from flexllm_jax.peft.bypass import Bypass
from kernels_pallas.grouped_lora import grouped_lora


def lora_bypass(weights: dict, scales: dict, adapter: Int[Array, " T"]) -> Bypass:
    """The bypass of one layer.

    Args:
        weights: module -> {"a": [A, d_in, R], "b": [A, R, d_out]}; a module that is absent has no
            bypass.
        scales: module -> [A] float32.
        adapter: row of the weights for each token, or -1 for the base model alone.
    """

    def bypass(module: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if module not in weights:
            return y
        own = weights[module]
        return y + grouped_lora(x, own["a"], own["b"], scales[module], adapter)

    return bypass
