"""Gemma: norms before and behind, whose weights are 1 + what is stored; gelu; scaled embeddings and
queries; windows in some layers."""

from dataclasses import replace
from typing import Any

from flexllm_jax.models.families.family import Family, plain_head
from flexllm_jax.models.families.parts import (
    FULL,
    SLIDING,
    attention,
    norms,
    window_pattern,
)
from flexllm_jax.models.families.rope import read_rope, read_ropes
from flexllm_jax.models.fields import Fields
from flexllm_jax.models.rope import RopeSpec
from flexllm_jax.models.spec import HeadSpec, LayerSpec, MlpSpec
from kernels_pallas.layer_options import AttentionOptions


def _layer(fields: Fields, kind: str, rope: RopeSpec, **changes: Any) -> LayerSpec:
    """A layer of one of `layer_types`; `changes`: fields of AttentionSpec."""
    fields.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    options = AttentionOptions(
        scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        window=fields.positive_int("sliding_window", 4096) if kind == SLIDING else None,
        soft_cap=_cap(fields, "attn_logit_softcapping"),
    )
    return LayerSpec(
        attention(fields, rope=rope, options=options, **changes),
        MlpSpec(fields.positive_int("intermediate_size"), "gelu_tanh"),
        norms(fields, post=True, late_cast=True, offset=True),
    )


def _cap(fields: Fields, name: str) -> float | None:
    return fields.number(name) if name in fields else None


def _gemma2(fields: Fields) -> tuple[LayerSpec, ...]:
    """A layer with a window, then one without."""
    rope, kinds = read_rope(fields), window_pattern(fields, 2)
    return tuple(_layer(fields, kind, rope) for kind in kinds)


def _gemma3(fields: Fields) -> tuple[LayerSpec, ...]:
    """Five layers with a window to one without; each kind has a RoPE of its own."""
    pattern = fields.positive_int("sliding_window_pattern", 6)
    pattern = fields.positive_int("_sliding_window_pattern", pattern)
    thetas = {
        FULL: fields.number("rope_theta", 1_000_000.0),
        SLIDING: fields.number("rope_local_base_freq", 10_000.0),
    }
    fields.refuse("attn_logit_softcapping", "use a checkpoint without it")
    ropes, kinds = read_ropes(fields, thetas), window_pattern(fields, pattern)
    return tuple(_layer(fields, kind, ropes[kind], qk_norm="head") for kind in kinds)


def gemma_head(fields: Fields) -> HeadSpec:
    """Logits with a soft cap, where there is one."""
    return replace(plain_head(fields), soft_cap=_cap(fields, "final_logit_softcapping"))


def _around(fields: Fields) -> dict[str, Any]:
    return {"embed_scale": fields.positive_int("hidden_size") ** 0.5}


_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GEMMA2 = Family(
    "Gemma 2",
    "gemma2",
    "Gemma2ForCausalLM",
    layers=_gemma2,
    around=_around,
    head=gemma_head,
    defaults=_DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
GEMMA3 = Family(
    "Gemma 3",
    "gemma3_text",
    "Gemma3ForCausalLM",
    layers=_gemma3,
    around=_around,
    head=gemma_head,
    defaults=_DEFAULTS
    | {"max_position_embeddings": 131072, "vocab_size": 262208, "num_attention_heads": 8},
)
