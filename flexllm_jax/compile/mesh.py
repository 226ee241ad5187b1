"""Over how many devices a model is split, and which heads of keys and values each has."""

from dataclasses import dataclass

from flexllm_jax.errors import UserError
from flexllm_jax.models.config import ModelConfig


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
        if any(attention.qk_norm == "projection" for attention in model.attention):
            raise ParallelError(
                f"parallel.tp={tp}: this model's norms of queries and keys are over all heads, "
                "which are not split over devices; use parallel.tp=1"
            )
        if model.projections.keys() & {"qkv", "gate_up"}:
            raise ParallelError(
                f"parallel.tp={tp}: this model's fused projections are not split over devices; use "
                "parallel.tp=1"
            )
        if any(layer.token_width for layer in model.layers):
            raise ParallelError(
                f"parallel.tp={tp}: what this model's tokens have for single layers is not split "
                "over devices; use parallel.tp=1"
            )
        if len(model.attention) < model.num_layers:
            raise ParallelError(
                f"parallel.tp={tp}: this model's gated delta nets are not split over devices; use "
                "parallel.tp=1"
            )
        for attention, layer in zip(model.attention, model.layers, strict=True):
            sizes = {"num_heads": attention.heads, "d_ff": layer.mlp.d_ff}
            for name, size in (sizes | {"vocab_size": model.vocab_size}).items():
                if size % tp:
                    raise ParallelError(
                        f"parallel.tp={tp} does not divide the model's {name}={size}: use a "
                        "divisor of it"
                    )
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
        return cls(kv, tp // kv)
