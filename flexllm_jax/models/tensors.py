"""Every parameter of a model: where it lies in the parameter tree, its name in the checkpoint, its
shape."""

from collections.abc import Iterator
from dataclasses import dataclass

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.mixers import mixer_of
from flexllm_jax.models.names import HEAD


@dataclass(frozen=True)
class Tensor:
    """One parameter: where it is in the tree and in the checkpoint. `shape` is the tree's."""

    path: tuple[str | int, ...]
    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in the checkpoint."""
        return self.shape[::-1] if self.transposed else self.shape


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every parameter of the model, in the order in which a forward pass reads them."""
    table = (config.vocab_size, config.d_model)
    yield Tensor(("embed", "weight"), f"{config.names.embed}.weight", table)
    for layer in range(config.num_layers):
        yield from _layer_tensors(config, layer)
    yield Tensor(("norm", "weight"), f"{config.names.final_norm}.weight", (config.d_model,))
    if not config.head.tied:
        yield Tensor(("head", "weight"), f"{HEAD}.weight", table)


def _layer_tensors(config: ModelConfig, layer: int) -> Iterator[Tensor]:
    spec = config.layers[layer].mixer
    biased = mixer_of(spec).biased(spec)
    norm = config.layers[layer].norm
    norms = config.names.norms(norm, spec.qk_norm is not None)
    sizes = dict.fromkeys(norms, config.d_model)
    if spec.qk_norm:
        heads = (1, 1) if spec.qk_norm == "head" else (spec.heads, spec.kv_heads)
        sizes |= {"q_norm": heads[0] * spec.head_dim, "k_norm": heads[1] * spec.head_dim}
    for module, name in norms.items():
        path = ("layers", layer, module, "weight")
        yield Tensor(path, f"{config.names.path(layer, name)}.weight", (sizes[module],))
    for module, shape in config.kernel_shapes(layer).items():
        name = config.names.module_path(layer, module)
        path = ("layers", layer, module)
        yield Tensor((*path, "kernel"), f"{name}.weight", shape, transposed=True)
        if module in biased:
            yield Tensor((*path, "bias"), f"{name}.bias", shape[1:])
