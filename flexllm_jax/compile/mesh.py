"""Over how many devices a model is split, and which heads of keys and values each has."""

from dataclasses import dataclass

from flexllm_jax.errors import UserError
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.spec import GatedDeltaSpec, LayerSpec


class ParallelError(UserError):
    """A model that does not divide over the devices; one line."""


@dataclass(frozen=True)
class Mesh:
    """The `tp` devices as two axes: heads of keys and values are split over `kv` devices, and each
    is replicated on `replicas` of them when there are more devices than such heads."""

    kv: int
    replicas: int

    @property
    def tp(self) -> int:
        """All devices."""
        return self.kv * self.replicas

    @classmethod
    def of(cls, model: ModelConfig, tp: int) -> "Mesh":
        """The mesh of a model. ParallelError, in one line, when it does not divide."""
        for layer in model.layers:
            for name, size in _split_sizes(layer).items():
                _check(tp, name, size)
        _check(tp, "vocab_size", model.vocab_size)
        if model.token_table is not None:
            _check(tp, "vocab_size_per_layer_input", model.token_table)
        all_heads = sorted({attention.kv_heads for attention in model.attention})
        for heads in all_heads:
            if heads % tp and tp % heads:
                raise ParallelError(
                    f"parallel.tp={tp} and the model's num_kv_heads={heads} do not divide each "
                    f"other: use a divisor or a multiple of {heads}"
                )
        over = {min(tp, heads) for heads in all_heads}
        if len(over) > 1:
            raise ParallelError(
                f"parallel.tp={tp}: this model has layers of {' and '.join(map(str, all_heads))} "
                f"kv heads, which are not split alike; use a divisor of {all_heads[0]}"
            )
        kv = over.pop()
        own = [layer.mixer for layer in model.layers if isinstance(layer.mixer, GatedDeltaSpec)]
        if kv < tp and not all(delta.fused for delta in own):
            raise ParallelError(
                f"parallel.tp={tp}: keys of this model's gated delta nets are split over {tp} "
                f"devices and those of attention over {kv}, and both have adapters of one name; "
                f"use a divisor of {kv}"
            )
        return cls(kv, tp // kv)


def _split_sizes(layer: LayerSpec) -> dict[str, int]:
    """What of a layer is split over all devices, by the name of its size in config.json."""
    mixer, inner = layer.mixer, {"d_ff": layer.mlp.d_ff}
    if isinstance(mixer, GatedDeltaSpec):  # heads of values are a multiple
        return {"linear_num_key_heads": mixer.key_heads} | inner
    # Where keys lie with queries, no device has them without its own.
    keys = {"num_kv_heads": mixer.kv_heads} if mixer.fused else {}
    return {"num_heads": mixer.heads} | keys | inner


def _check(tp: int, name: str, size: int) -> None:
    """ParallelError for a size that does not divide."""
    if size % tp:
        raise ParallelError(
            f"parallel.tp={tp} does not divide the model's {name}={size}: use a divisor of it"
        )
