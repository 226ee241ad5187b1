"""Hybrids: most layers are gated delta nets, which keep a state of a sequence in place of keys and
values, and some attend, with a gate: Qwen3.5."""

from flexllm_jax.models.families.family import Family
from flexllm_jax.models.families.parts import FULL, attention, gated_mlp, layer_types, norms
from flexllm_jax.models.families.rope import read_rope
from flexllm_jax.models.fields import Fields
from flexllm_jax.models.spec import GatedDeltaSpec, LayerSpec, NormSpec

LINEAR = "linear_attention"


def _delta(fields: Fields) -> GatedDeltaSpec:
    keys, values = (
        fields.positive_int(f"linear_num_{name}_heads", count)
        for name, count in (("key", 16), ("value", 32))
    )
    if values % keys:
        raise fields.error(
            "linear_num_key_heads",
            f"does not divide linear_num_value_heads={values}; correct the one that is wrong",
        )
    return GatedDeltaSpec(
        keys,
        values,
        *(fields.positive_int(f"linear_{name}_head_dim", 128) for name in ("key", "value")),
        width=fields.positive_int("linear_conv_kernel_dim", 4),
        norm=NormSpec(fields.number("rms_norm_eps", 1e-6)),
    )


def _qwen3_5(fields: Fields) -> tuple[LayerSpec, ...]:
    """Three layers of a gated delta net to one that attends."""
    count = fields.positive_int("num_hidden_layers")
    every = fields.positive_int("full_attention_interval", 4)
    kinds = [LINEAR if (layer + 1) % every else FULL for layer in range(count)]
    own = {
        LINEAR: _delta(fields),
        FULL: attention(fields, rope=read_rope(fields, partial=True), qk_norm="head", gate=True),
    }
    mlp, norm = gated_mlp(fields), norms(fields, late_cast=True, offset=True)
    kinds = layer_types(fields, kinds, tuple(own))
    return tuple(LayerSpec(own[kind], mlp, norm) for kind in kinds)


QWEN3_5 = Family(
    "Qwen3.5, dense",
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    layers=_qwen3_5,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
    },
    # Heads that guess further tokens are left out.
    harmless=frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}),
)
