"""LoRA (arXiv 2106.09685) as a bypass: y + scale * (x @ A) @ B, with each token's own adapter."""

from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import Array, Int

from flexllm_jax.models.bypass import Outputs
from flexllm_jax.peft.dropout import Dropout
from kernels_pallas.backend import XLA, Backend, are_merged
from kernels_pallas.grouped_lora import Ahead, ahead, job_lora, low_rank_sums
from kernels_pallas.rows import Recalled, as_array


def lora(
    weights: dict,
    scales: dict,
    adapter: Int[Array, " T"],
    x: jax.Array | Recalled,
    outputs: Outputs,
    layer: Int[Array, ""] | int = 0,
    backend: Backend = XLA,
    dropout: Dropout | None = None,
    sums: dict | None = None,
    *,
    split: bool = False,
) -> Outputs:
    """`outputs` with the low-rank products of their input added; or to be added by who reads them,
    where they are no gradients' (`kernels_pallas.grouped_lora.low_rank_sums`).

    Args:
        weights: module -> {"a": [L, A, d_in, R], "b": [L, A, R, d_out]}; a module that is absent
            has no bypass.
        scales: module -> [L, A] float32.
        adapter: row of the weights for each token, or -1 for the base model alone.
        x: [T, d_in], what all projections of `outputs` read.
        outputs: projection -> [T, d_out].
        layer: which of the L it is.
        backend: which kernels to use.
        dropout: of what each projection reads, a mask of its own; None: of nothing.
        sums: of the gradients of a job, whose weights have one row: module -> {"a": [L, d_in, R],
            "b": [L, R, d_out]}; what their own gradient is then, see
            `kernels_pallas.grouped_lora.base.job_lora`.
        split: whether each device has its own part of x.
    """
    names = [name for name in outputs if name in weights]
    if not names:
        return outputs
    groups = [(x, names)]
    if dropout is not None:
        x = as_array(x)
        groups = [(dropout(x, name, split=split), [name]) for name in names]
    for read, group in groups:
        own = tuple(outputs[name] for name in group)
        a, b = _factors(weights, group)
        scale = tuple(scales[name] for name in group)
        added: Any
        if sums is None:
            array = as_array(read)
            merged = are_merged(array, [y.shape[1] for y in own])
            added = low_rank_sums(read, own, a, b, scale, adapter, backend, layer, merged=merged)
        else:
            a, b, scale = jax.tree.map(lambda w: w[:, 0], (a, b, scale))
            totals = _factors(sums, group)
            added = job_lora(read, own, a, b, scale, adapter >= 0, layer, totals, backend)
        outputs = outputs | dict(zip(group, added, strict=True))
    return outputs


def lora_ahead(
    weights: dict,
    scales: dict,
    adapter: Int[Array, " T"],
    names: Collection[str],
    layer: Int[Array, ""] | int,
    backend: Backend,
) -> Ahead | None:
    """What `lora` does first with what projections of these names read."""
    names = [name for name in names if name in weights]
    if not names:
        return None
    a, _ = _factors(weights, names)
    return ahead(a, tuple(scales[name] for name in names), adapter, backend, layer)


def _factors(weights: dict, modules: list[str]) -> tuple[tuple, tuple]:
    """Of the modules: all a, and all b."""
    return tuple(weights[m]["a"] for m in modules), tuple(weights[m]["b"] for m in modules)
