"""What one layer of a decoder computes, as fields: every difference between families is one.

The records are frozen and hashable: they are static in the programs, and layers with equal records
share one traced body and one program. N are query heads, K kv heads, H their size, F the inner
width.
"""

from dataclasses import dataclass, field, replace

from flexllm_jax.models.rope import RopeSpec
from kernels_pallas.attention_options import AttentionOptions


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of a layer.

    rope: None where queries and keys are not told their positions. options: how scores are made.
    qkv_bias, o_bias: whether q, k, v and o have biases. qk_norm: RMSNorm of each head's queries and
    keys before they are rotated.
    """

    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    rope: RopeSpec | None
    options: AttentionOptions = field(default_factory=AttentionOptions)
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class MlpSpec:
    """A gated feed-forward network."""

    d_ff: int  # F


@dataclass(frozen=True)
class NormSpec:
    """The layer's root-mean-square norms."""

    eps: float


@dataclass(frozen=True)
class LayerSpec:
    """A layer: attention and a feed-forward network, with their norms."""

    attention: AttentionSpec
    mlp: MlpSpec
    norm: NormSpec

    def kernel_shapes(self, d_model: int) -> dict[str, tuple[int, int]]:
        """[d_in, d_out] of the seven projections, by their name in the parameter tree."""
        a, d_ff = self.attention, self.mlp.d_ff
        queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
        return {
            "q": (d_model, queries),
            "k": (d_model, keys),
            "v": (d_model, keys),
            "o": (queries, d_model),
            "gate": (d_model, d_ff),
            "up": (d_model, d_ff),
            "down": (d_ff, d_model),
        }

    def shard(self, devices: int, kv_devices: int) -> "LayerSpec":
        """What one device has of the layer when it is split over them."""
        a = self.attention
        attention = replace(a, heads=a.heads // devices, kv_heads=a.kv_heads // kv_devices)
        return replace(
            self, attention=attention, mlp=replace(self.mlp, d_ff=self.mlp.d_ff // devices)
        )

    @property
    def arrays(self) -> "LayerSpec":
        """The layer without what changes no array that it has or keeps: attention's options and
        rotary embeddings. Layers that agree in it can share one layout."""
        return replace(
            self, attention=replace(self.attention, options=AttentionOptions(), rope=None)
        )
