"""Fields that many families spell alike, as parts of a layer."""

from collections.abc import Sequence
from typing import Any

from flexllm_jax.models.families.rope import read_head_dim, read_rope
from flexllm_jax.models.fields import Fields, ModelConfigError
from flexllm_jax.models.spec import AttentionSpec, LayerSpec, MlpSpec, NormSpec
from kernels_pallas.layer_options import AttentionOptions

FULL, SLIDING = "full_attention", "sliding_attention"


def attention(fields: Fields, **changes: Any) -> AttentionSpec:
    """Full attention with one RoPE for all layers and `attention_bias` of q, k, v and o alike;
    `changes`: fields of AttentionSpec that are otherwise."""
    heads = fields.positive_int("num_attention_heads")
    kv_heads = fields.positive_int("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error(
            "num_key_value_heads",
            f"does not divide num_attention_heads={heads}; correct the one that is wrong",
        )
    head_dim = read_head_dim(fields)
    if not changes.keys() >= {"rope"}:
        changes["rope"] = read_rope(fields)
    if not changes.keys() >= {"qkv_bias", "o_bias"}:
        biased = fields.boolean("attention_bias")
        changes = {"qkv_bias": biased, "o_bias": biased} | changes
    return AttentionSpec(heads, kv_heads, head_dim, **changes)


def gated_mlp(fields: Fields, **changes: Any) -> MlpSpec:
    """A gated feed-forward network without biases, with silu; `changes`: fields of MlpSpec that are
    otherwise."""
    fields.choice("hidden_act", ("silu", "swish"), "silu")
    fields.refuse("mlp_bias", "use a checkpoint whose MLP has no bias")
    return MlpSpec(fields.positive_int("intermediate_size"), **changes)


def norms(fields: Fields, **changes: bool) -> NormSpec:
    """A norm before attention, and one before the feed-forward network; `changes`: fields of
    NormSpec that are otherwise."""
    return NormSpec(fields.number("rms_norm_eps", 1e-6), **changes)


def alike(fields: Fields, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """All layers like this one."""
    return (layer,) * fields.positive_int("num_hidden_layers")


def layer_types(fields: Fields, default: Sequence[str], known: Sequence[str]) -> list[str]:
    """The kind of attention of each layer; `default` where the configuration does not say."""
    kinds = fields.get("layer_types", list(default))
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise fields.error("layer_types", f"must name the kinds of {len(default)} layers")
    for layer, kind in enumerate(kinds):
        if kind not in known:
            only = " and ".join(map(repr, known))
            raise ModelConfigError(
                f"config.json: layer_types[{layer}]={kind!r} is not supported here; only {only} "
                f"{'is' if len(known) == 1 else 'are'}"
            )
    return kinds


def window_pattern(fields: Fields, every: int) -> list[str]:
    """The kinds of layers: the last of each `every` has full attention, the others a window."""
    count = fields.positive_int("num_hidden_layers")
    kinds = [SLIDING if (layer + 1) % every else FULL for layer in range(count)]
    return layer_types(fields, kinds, (FULL, SLIDING))


def window(fields: Fields, kind: str) -> AttentionOptions:
    """Attention of one of `layer_types`."""
    if kind == FULL:
        return AttentionOptions()
    return AttentionOptions(window=fields.positive_int("sliding_window"))
