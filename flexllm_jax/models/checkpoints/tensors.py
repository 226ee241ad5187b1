"""Every parameter of a model: where it lies in the parameter tree, its name in the checkpoint, its
shape."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax.typing import DTypeLike

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.names import (
    DELTA,
    HEAD,
    PROJECTIONS,
    QK_NORMS,
    SCALAR,
    SINKS,
    TOKEN_INPUTS,
)
from flexllm_jax.models.shares import Parts
from flexllm_jax.models.spec import AttentionSpec, GatedDeltaSpec


@dataclass(frozen=True)
class Tensor:
    """One parameter: where it is in the tree and in the checkpoint. `shape` is the tree's.

    transposed: the checkpoint has its axes in the other order. between: axes of one element that
    the checkpoint has before its last. exact: it is float32, whatever the model's dtype is.
    parts: widths of what its columns are side by side, if that is more than one thing.
    """

    path: tuple[str | int, ...]
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    between: int = 0
    exact: bool = False
    parts: Parts = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in the checkpoint."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (*shape[:-1], *[1] * self.between, shape[-1])

    def dtype(self, model: DTypeLike) -> DTypeLike:
        """What it is in a model of that dtype."""
        return np.float32 if self.exact else model


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every parameter of the model, in the order in which a forward pass reads them."""
    table = (config.vocab_size, config.d_model)
    yield Tensor(("embed", "weight"), f"{config.names.embed}.weight", table)
    yield from _token_tensors(config)
    for layer in range(config.num_layers):
        yield from _layer_tensors(config, layer)
    yield Tensor(("norm", "weight"), f"{config.names.final_norm}.weight", (config.d_model,))
    if not config.head.tied:
        yield Tensor(("head", "weight"), f"{HEAD}.weight", table)


def _layer_tensors(config: ModelConfig, layer: int) -> Iterator[Tensor]:
    spec = config.layers[layer].mixer
    norms = config.names.norms(config.layers[layer])
    sizes = dict.fromkeys(norms, config.d_model)
    if isinstance(spec, GatedDeltaSpec):
        sizes["out_norm"] = spec.value_dim
    elif "q_norm" in norms:
        heads = (1, 1) if spec.qk_norm == "head" else (spec.heads, spec.kv_heads)
        sizes |= {"q_norm": heads[0] * spec.head_dim, "k_norm": heads[1] * spec.head_dim}
    if config.layers[layer].scalar:
        yield Tensor(("layers", layer, "scalar"), config.names.path(layer, SCALAR), (1,))
    if isinstance(spec, AttentionSpec) and spec.sinks:
        yield Tensor(("layers", layer, "sinks"), config.names.path(layer, SINKS), (spec.heads,))
    for module, name in norms.items():
        path = ("layers", layer, module, "weight")
        yield Tensor(path, f"{config.names.path(layer, name)}.weight", (sizes[module],))
    for module, shape in config.kernel_shapes(layer).items():
        name = config.names.module_path(layer, module)
        path, parts = ("layers", layer, module), config.layers[layer].parts.get(module, ())
        kernel = (*path, "kernel"), f"{name}.weight", shape
        yield Tensor(*kernel, transposed=True, parts=parts)
        if module in spec.biased:
            yield Tensor((*path, "bias"), f"{name}.bias", shape[1:], parts=parts)
    if isinstance(spec, GatedDeltaSpec):
        path, root = ("layers", layer), config.names.path(layer, DELTA)
        conv = (*path, "conv", "weight"), f"{root}.conv1d.weight", (spec.width, spec.channels)
        yield Tensor(*conv, transposed=True, between=1, parts=spec.channel_parts)
        for name, stored in (("log_a", "A_log"), ("dt_bias", "dt_bias")):
            where, shape = (*path, "decay", name), (spec.value_heads,)
            yield Tensor(where, f"{root}.{stored}", shape, exact=True)


def _token_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """What makes what each token has for single layers: of all layers, side by side."""
    width = config.layers[0].token_width
    if width is None or config.token_table is None:
        return
    total = width * config.num_layers
    shapes = {
        ("embed", "weight"): (config.token_table, total),
        ("projection", "kernel"): (config.d_model, total),
        ("norm", "weight"): (width,),
    }
    for (module, kind), shape in shapes.items():
        name = f"{config.names.root}.{TOKEN_INPUTS[module]}.weight"
        yield Tensor(("token_inputs", module, kind), name, shape, transposed=kind == "kernel")


def unused_tensors(config: ModelConfig) -> set[str]:
    """Names of tensors that files may have and no model reads: those that would make keys and
    values in layers that read others'."""
    modules = [QK_NORMS["k_norm"], PROJECTIONS["k"], PROJECTIONS["v"]]
    return {
        f"{config.names.path(layer, module)}.weight"
        for layer, spec in enumerate(config.layers)
        if isinstance(spec.mixer, AttentionSpec) and not spec.mixer.own_keys
        for module in modules
    }
