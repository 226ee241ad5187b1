"""Llama 3.x, and the families that differ from it in biases, norms of queries and keys, windows, or
which elements rotate: Qwen2.5, Qwen3, Mistral, ERNIE; and in which projections are one: Phi-3 and
4, GLM-4."""

from typing import Any

from flexllm_jax.models.families.family import Family
from flexllm_jax.models.families.parts import (
    FULL,
    SLIDING,
    alike,
    attention,
    gated_mlp,
    layer_types,
    norms,
    window,
)
from flexllm_jax.models.families.rope import read_rope
from flexllm_jax.models.fields import Fields
from flexllm_jax.models.names import Names
from flexllm_jax.models.spec import LayerSpec


def _llama(fields: Fields) -> tuple[LayerSpec, ...]:
    return alike(fields, LayerSpec(attention(fields), gated_mlp(fields), norms(fields)))


def _ernie(fields: Fields) -> tuple[LayerSpec, ...]:
    """RoPE of neighbours."""
    fields.refuse("use_bias", "use a checkpoint whose projections have no biases")
    own = attention(
        fields, rope=read_rope(fields, 5e5, neighbours=True), qkv_bias=False, o_bias=False
    )
    return alike(fields, LayerSpec(own, gated_mlp(fields), norms(fields)))


def _mistral(fields: Fields, *, growing: bool = False) -> tuple[LayerSpec, ...]:
    """The same window in every layer, or none. growing: as of `read_rope`."""
    sliding = SLIDING if "sliding_window" in fields else FULL
    rope, options = read_rope(fields, growing=growing), window(fields, sliding)
    own = attention(fields, rope=rope, options=options, qkv_bias=False, o_bias=False)
    return alike(fields, LayerSpec(own, gated_mlp(fields), norms(fields)))


def _ministral(fields: Fields) -> tuple[LayerSpec, ...]:
    """Windows in the layers that say so; in all, where none does."""
    count = fields.positive_int("num_hidden_layers")
    kinds = [SLIDING if "sliding_window" in fields else FULL] * count
    return tuple(
        LayerSpec(
            attention(fields, options=window(fields, kind), qkv_bias=False, o_bias=False),
            gated_mlp(fields),
            norms(fields),
        )
        for kind in layer_types(fields, kinds, (FULL, SLIDING))
    )


def _qwen(fields: Fields, **changes: Any) -> tuple[LayerSpec, ...]:
    """Windows, where `use_sliding_window` says so, from layer `max_window_layers` on."""
    count = fields.positive_int("num_hidden_layers")
    slides = fields.boolean("use_sliding_window") and "sliding_window" in fields
    full = count if not slides else min(count, fields.get("max_window_layers", 28))
    kinds = [FULL] * full + [SLIDING] * (count - full)
    return tuple(
        LayerSpec(
            attention(fields, options=window(fields, kind), **changes),
            gated_mlp(fields),
            norms(fields),
        )
        for kind in layer_types(fields, kinds, (FULL, SLIDING) if slides else (FULL,))
    )


def _phi3(fields: Fields) -> tuple[LayerSpec, ...]:
    """Fused projections; the same window in every layer, or none."""
    sliding = SLIDING if "sliding_window" in fields else FULL
    own = attention(
        fields,
        rope=read_rope(fields, partial=True),
        options=window(fields, sliding),
        qkv_bias=False,
        o_bias=False,
        fused=True,
    )
    return alike(fields, LayerSpec(own, gated_mlp(fields, fused=True), norms(fields)))


def _glm(fields: Fields, *, post: bool = False) -> tuple[LayerSpec, ...]:
    """RoPE of neighbours in a part of each head. post: with norms behind, too."""
    rope = read_rope(fields, partial=True, neighbours=True)
    own = attention(fields, rope=rope, qkv_bias=fields.boolean("attention_bias"), o_bias=False)
    mlp = gated_mlp(fields, fused=True)
    return alike(fields, LayerSpec(own, mlp, norms(fields, post=post)))


_OF_MISTRAL = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OF_GLM = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 0.00000015625,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "eos_token_id": [151329, 151336, 151338],
}
_QWEN = frozenset({"sliding_window", "max_window_layers", "use_sliding_window"})

LLAMA = Family(
    "Llama 3",
    "llama",
    "LlamaForCausalLM",
    layers=_llama,
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
)
ERNIE4_5 = Family(
    "ERNIE 4.5, dense",
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    layers=_ernie,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
MISTRAL = Family(
    "Mistral",
    "mistral",
    "MistralForCausalLM",
    layers=_mistral,
    defaults=_OF_MISTRAL,
)
MINISTRAL = Family(
    "Ministral",
    "ministral",
    "MinistralForCausalLM",
    layers=_ministral,
    defaults=_OF_MISTRAL,
)
MINISTRAL3 = Family(
    "Ministral 3",
    "ministral3",
    "Ministral3ForCausalLM",
    layers=lambda fields: _mistral(fields, growing=True),
    defaults={
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
)
QWEN2 = Family(
    "Qwen2.5",
    "qwen2",
    "Qwen2ForCausalLM",
    layers=lambda fields: _qwen(fields, qkv_bias=True, o_bias=False),
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    harmless=_QWEN,
)
QWEN3 = Family(
    "Qwen3, dense",
    "qwen3",
    "Qwen3ForCausalLM",
    layers=lambda fields: _qwen(fields, qk_norm="head"),
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    harmless=_QWEN,
)
PHI3 = Family(
    "Phi-3, Phi-3.5, Phi-4",
    "phi3",
    "Phi3ForCausalLM",
    layers=_phi3,
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    harmless=frozenset({"original_max_position_embeddings", "full_attn_mod", "interpolate_factor"}),
)
GLM4 = Family(
    "GLM-4 (0414)",
    "glm4",
    "Glm4ForCausalLM",
    layers=lambda fields: _glm(fields, post=True),
    names=Names(
        changed=(
            ("post_attn_norm", "post_self_attn_layernorm"),
            ("pre_mlp_norm", "post_attention_layernorm"),
            ("post_mlp_norm", "post_mlp_layernorm"),
        )
    ),
    defaults=_OF_GLM,
)
GLM = Family("GLM-4 (before 0414)", "glm", "GlmForCausalLM", layers=_glm, defaults=_OF_GLM)
