"""Hybrids: most layers are gated delta nets, which keep a state of a sequence in place of keys and
values, and some attend: Qwen3.5, OLMo Hybrid."""

from dataclasses import replace

from flexllm_jax.models.families.dense import olmo_norms
from flexllm_jax.models.families.family import Family
from flexllm_jax.models.families.parts import FULL, attention, gated_mlp, layer_types, norms
from flexllm_jax.models.families.rope import read_rope, read_rope_or_none
from flexllm_jax.models.fields import Fields
from flexllm_jax.models.names import DELTA, Names
from flexllm_jax.models.spec import GatedDeltaSpec, LayerSpec, NormSpec

LINEAR = "linear_attention"


def _delta(fields: Fields) -> GatedDeltaSpec:
    """Sizes that are not given follow those of attention and of the model, as OLMo Hybrid's do."""
    heads = fields.positive_int("num_attention_heads")
    keys, values = (fields.positive_int(f"linear_num_{n}_heads", heads) for n in ("key", "value"))
    if values % keys:
        raise fields.error(
            "linear_num_key_heads",
            f"does not divide linear_num_value_heads={values}; correct the one that is wrong",
        )
    usual = int(0.75 * fields.positive_int("hidden_size") / keys)
    key_dim = fields.positive_int("linear_key_head_dim", usual)
    return GatedDeltaSpec(
        keys,
        values,
        key_dim,
        fields.positive_int("linear_value_head_dim", 2 * key_dim),
        width=fields.positive_int("linear_conv_kernel_dim", 4),
        norm=NormSpec(fields.number("rms_norm_eps", 1e-6)),
    )


def _layer_types(fields: Fields, default: list[str]) -> list[str]:
    """The kind of each layer, of which some attend."""
    kinds = layer_types(fields, default, (LINEAR, FULL))
    if FULL not in kinds:
        raise fields.error("layer_types", f"has no {FULL}; a model needs a layer that attends")
    return kinds


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
    return tuple(LayerSpec(own[kind], mlp, norm) for kind in _layer_types(fields, kinds))


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
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    # Heads that guess further tokens are left out.
    harmless=frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}),
)


def _olmo_hybrid(fields: Fields) -> tuple[LayerSpec, ...]:
    """Three layers of a gated delta net to one that attends, which have their norms at different
    places."""
    count = fields.positive_int("num_hidden_layers")
    attending = range(3, count, 4) or (count - 1,)  # at least one
    kinds = [FULL if layer in attending else LINEAR for layer in range(count)]
    beta = 2.0 if fields.boolean("linear_allow_neg_eigval", True) else 1.0
    # The eps of the delta nets' norms is not in the configuration.
    delta = replace(_delta(fields), norm=NormSpec(1e-5), beta_scale=beta, fused=False)
    mlp = gated_mlp(fields)
    attends = attention(fields, rope=read_rope_or_none(fields), qk_norm="projection")
    own = {
        LINEAR: LayerSpec(delta, mlp, norms(fields, late_cast=True)),
        FULL: LayerSpec(attends, mlp, olmo_norms(fields)),
    }
    return tuple(own[kind] for kind in _layer_types(fields, kinds))


OLMO_HYBRID = Family(
    "OLMo Hybrid",
    "olmo_hybrid",
    "OlmoHybridForCausalLM",
    layers=_olmo_hybrid,
    defaults={"max_position_embeddings": 65536, "eos_token_id": 100257},
    names=Names(changed=(("out_norm", f"{DELTA}.o_norm"),)),
    # How parameters begin.
    harmless=frozenset(
        {
            *("linear_a_log_min", "linear_a_log_max"),
            *("linear_dt_min", "linear_dt_max", "linear_dt_init_floor"),
        }
    ),
)
