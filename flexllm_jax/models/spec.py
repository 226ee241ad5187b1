"""What one layer of a decoder computes, as fields: every difference between families is one.

The records are frozen and hashable: they are static in the programs, and layers with equal records
share one traced body and one program. N are query heads, K kv heads, H their size, F the inner
width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from flexllm_jax.models.rope import RopeSpec
from flexllm_jax.models.shares import Parts
from kernels_pallas.layer_options import Activation, AttentionOptions

if TYPE_CHECKING:  # who reads a config.json alone needs no JAX: functions that compute import it
    import jax


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of a layer.

    rope: None where queries and keys are not told their positions. options: how scores are made.
    qkv_bias, o_bias: whether q, k, v and o have biases. qk_norm: what of the queries and keys is
    normalized before they are rotated: each head, the whole projection, or each head without a
    weight. fused: q, k and v are
    one projection, "qkv", and so one site of LoRA. gate: what attention returns is multiplied by
    the sigmoid of a gate, which q yields behind the query of each head. values: whether there is a
    projection of them, or they are what the keys are before their norm. v_norm: whether each head
    of the values is normalized, without a weight. shared: a name for layers of which some read the
    keys and values of others; own_keys: whether the layer has some of its own, or reads those of
    the last layer before it that has and is of the same name. gate_projection: the output's gate is
    a projection of its own. sinks: whether each head has a logit that joins its softmax and has no
    value.
    """

    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    rope: RopeSpec | None
    options: AttentionOptions = field(default_factory=AttentionOptions)
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "projection", "unit"] | None = None
    fused: bool = False
    gate: bool = False
    values: Literal["projected", "keys"] = "projected"
    v_norm: bool = False
    shared: str | None = None
    own_keys: bool = True
    gate_projection: bool = False
    sinks: bool = False

    output: ClassVar[str] = "o"  # the projection behind attention

    @property
    def inner(self) -> int:
        """Width of what attention returns."""
        return self.heads * self.head_dim

    @property
    def projected(self) -> dict[str, int]:
        """Widths of the projections before attention, by their name in the parameter tree."""
        queries, keys = self.inner * (2 if self.gate else 1), self.kv_heads * self.head_dim
        if self.fused:
            return {name: sum(parts) for name, parts in self.parts.items()}
        if not self.own_keys:
            return {"q": queries}
        own = {"q": queries, "k": keys}
        if self.values != "keys":
            own["v"] = keys
        return own | {"attention_gate": self.inner} if self.gate_projection else own

    @property
    def parts(self) -> dict[str, Parts]:
        """Of projections that give several things side by side, their widths."""
        keys = self.kv_heads * self.head_dim
        return {"qkv": (self.inner, keys, keys)} if self.fused else {}

    @property
    def biased(self) -> frozenset[str]:
        """Which of its projections have a bias."""
        before = self.projected.keys() - {"attention_gate"} if self.qkv_bias else ()
        return frozenset((*before, *([self.output] if self.o_bias else [])))

    @property
    def arrays(self) -> AttentionSpec:
        """Without what changes no array that a layer has or keeps: options and rotary
        embeddings."""
        return replace(self, options=AttentionOptions(), rope=None)

    @property
    def carried(self) -> AttentionSpec:
        """As far as dK and dV go: layers that agree in it accumulate them in the same arrays, one
        layer after the other; or, where they are shared, for the layer whose keys they are."""
        return AttentionSpec(self.kv_heads, self.kv_heads, self.head_dim, None, shared=self.shared)

    def shard(self, devices: int, kv_devices: int) -> AttentionSpec:
        """What one device has of it."""
        return replace(self, heads=self.heads // devices, kv_heads=self.kv_heads // kv_devices)


@dataclass(frozen=True)
class GatedDeltaSpec:
    """A gated delta net: a short convolution of the inputs' projection, then the gated delta rule,
    a recurrence whose state is a matrix for each value head.

    beta_scale: of what is written to the state, beside the sigmoid. fused: q, k and v are one
    projection; else each is one of its own, as attention's.
    """

    key_heads: int  # each serves value_heads / key_heads heads of values
    value_heads: int
    key_dim: int  # of a head
    value_dim: int
    width: int  # of the convolution, in tokens
    norm: NormSpec  # of each head of the output, before its gate
    beta_scale: float = 1.0
    fused: bool = True

    @property
    def output(self) -> str:
        """The projection behind the rule."""
        return "out" if self.fused else "o"

    @property
    def inner(self) -> int:
        """Width of what the rule returns."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Width of what the convolution reads."""
        return sum(self.channel_parts)

    @property
    def channel_parts(self) -> Parts:
        """Widths of its queries, keys and values."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.inner

    @property
    def state(self) -> tuple[int, int, int]:
        """Shape of a sequence's state, float32."""
        return self.value_heads, self.key_dim, self.value_dim

    @property
    def projected(self) -> dict[str, int]:
        """Widths of the projections before the rule: queries, keys and values; the output's gate;
        what is written; what is forgotten."""
        heads, keys = self.value_heads, self.key_heads * self.key_dim
        if self.fused:
            return {"in_qkv": self.channels, "in_z": self.inner, "in_b": heads, "in_a": heads}
        rest = {"delta_g": self.inner, "delta_b": heads, "delta_a": heads}
        return {"q": keys, "k": keys, "v": self.inner, **rest}

    @property
    def parts(self) -> dict[str, Parts]:
        """See `AttentionSpec`."""
        return {"in_qkv": self.channel_parts} if self.fused else {}

    @property
    def arrays(self) -> GatedDeltaSpec:
        """All that it says is of arrays."""
        return self

    @property
    def biased(self) -> frozenset[str]:
        """None of its projections has a bias."""
        return frozenset()

    @property
    def carried(self) -> GatedDeltaSpec:
        """As far as the gradients of states go."""
        return self

    def shard(self, devices: int, kv_devices: int) -> GatedDeltaSpec:
        """What one device has of it."""
        heads = self.key_heads // devices, self.value_heads // devices
        return replace(self, key_heads=heads[0], value_heads=heads[1])


MixerSpec = AttentionSpec | GatedDeltaSpec


@dataclass(frozen=True)
class MlpSpec:
    """A gated feed-forward network. fused: gate and up are one projection, "gate_up"."""

    d_ff: int  # F
    activation: Activation = "silu"
    fused: bool = False

    @property
    def projected(self) -> dict[str, int]:
        """Widths of the projections before the activation."""
        return {"gate_up": 2 * self.d_ff} if self.fused else {"gate": self.d_ff, "up": self.d_ff}

    @property
    def parts(self) -> dict[str, Parts]:
        """See `AttentionSpec`."""
        return {"gate_up": (self.d_ff, self.d_ff)} if self.fused else {}


@dataclass(frozen=True)
class NormSpec:
    """The layer's norms: by the root of the mean square.

    pre: of what attention and the feed-forward network read. post: of what they give, before it is
    added; post_eps: their eps, where it is another. late_cast: the weight is applied in float32,
    before the cast. offset: the weight is 1 + what is stored. centred: the mean is taken off
    before.
    """

    eps: float
    pre: bool = True
    post: bool = False
    late_cast: bool = False
    offset: bool = False
    post_eps: float | None = None
    centred: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """A layer: a mixer of tokens and a feed-forward network, with their norms; what both give is
    multiplied by `residual_scale` before it is added.

    token_width: of what each token has for this layer alone, which a third branch reads; None:
    there is none. scalar: whether the layer's output is multiplied by a stored number. parallel:
    whether the feed-forward network reads what the mixer does, the layer's input behind one norm.
    """

    mixer: MixerSpec
    mlp: MlpSpec
    norm: NormSpec
    residual_scale: float = 1.0
    token_width: int | None = None
    scalar: bool = False
    parallel: bool = False

    def kernel_shapes(self, d_model: int) -> dict[str, tuple[int, int]]:
        """[d_in, d_out] of the projections, by their name in the parameter tree."""
        mixer, mlp = self.mixer, self.mlp
        return {
            **{name: (d_model, width) for name, width in mixer.projected.items()},
            mixer.output: (mixer.inner, d_model),
            **{name: (d_model, width) for name, width in mlp.projected.items()},
            "down": (mlp.d_ff, d_model),
            **self._token_branch(d_model),
        }

    @property
    def parts(self) -> dict[str, Parts]:
        """Of projections that give several things side by side, their widths."""
        return self.mixer.parts | self.mlp.parts

    def _token_branch(self, d_model: int) -> dict[str, tuple[int, int]]:
        width = self.token_width
        if width is None:
            return {}
        return {"token_gate": (d_model, width), "token_projection": (width, d_model)}

    def shard(self, devices: int, kv_devices: int) -> LayerSpec:
        """What one device has of the layer when it is split over them."""
        return replace(
            self,
            mixer=self.mixer.shard(devices, kv_devices),
            mlp=replace(self.mlp, d_ff=self.mlp.d_ff // devices),
        )

    @property
    def arrays(self) -> LayerSpec:
        """The layer without what changes no array that it has or keeps. Layers that agree in it
        share one layout."""
        return replace(self, mixer=self.mixer.arrays)


@dataclass(frozen=True)
class HeadSpec:
    """The output head: logits are `cap(scale * x W)`.

    tied: W is the embedding. scale: of what the head reads. soft_cap: logits z become soft_cap *
    tanh(z / soft_cap), behind what an adapter adds to them; None leaves them.
    """

    tied: bool
    scale: float = 1.0
    soft_cap: float | None = None

    def cap(self, logits: jax.Array) -> jax.Array:
        """The logits, of what the head gave."""
        if self.soft_cap is None:
            return logits
        import jax.numpy as jnp

        return self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def uncap(self, gradient: jax.Array, logits: jax.Array) -> jax.Array:
        """A gradient of what `cap` returned, `logits`, as one of what it was given."""
        if self.soft_cap is None:
            return gradient
        return gradient * (1.0 - (logits / self.soft_cap) ** 2)
