"""LoRA (arXiv 2106.09685) as a bypass: y + scale * (x @ A) @ B, with each token's own adapter."""

from typing import Any

import jax
from jaxtyping import Array, Int

from flexllm_jax.models.bypass import Outputs
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import grouped_lora


def lora(
    weights: dict,
    scales: dict,
    adapter: Int[Array, " T"],
    x: jax.Array,
    outputs: Outputs,
    backend: Backend = XLA,
) -> Outputs:
    """`outputs` with the low-rank products of their input added.

    Args:
        weights: module -> {"a": [A, d_in, R], "b": [A, R, d_out]}; a module that is absent has no
            bypass.
        scales: module -> [A] float32.
        adapter: row of the weights for each token, or -1 for the base model alone.
        x: [T, d_in], what all projections of `outputs` read.
        outputs: projection -> [T, d_out].
        backend: which kernels to use.
    """
    names = [name for name in outputs if name in weights]
    if not names:
        return outputs
    sums: Any = grouped_lora(
        x,
        tuple(outputs[name] for name in names),
        tuple(weights[name]["a"] for name in names),
        tuple(weights[name]["b"] for name in names),
        tuple(scales[name] for name in names),
        adapter,
        backend,
    )
    return outputs | dict(zip(names, sums, strict=True))
