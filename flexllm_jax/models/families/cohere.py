"""Cohere (Command R): attention and the feed-forward network side by side behind one LayerNorm, and
RoPE of neighbours; Cohere 2 (Command R7B, Command A): windows where layers rotate, and no positions
where there is none."""

from dataclasses import replace
from typing import Any

from flexllm_jax.models.families.family import Family, plain_head
from flexllm_jax.models.families.parts import (
    SLIDING,
    alike,
    attention,
    gated_mlp,
    window,
    window_pattern,
)
from flexllm_jax.models.families.rope import read_rope
from flexllm_jax.models.fields import Fields
from flexllm_jax.models.spec import HeadSpec, LayerSpec, NormSpec


def _layer(fields: Fields, **changes: Any) -> LayerSpec:
    """`changes`: fields of AttentionSpec."""
    fields.refuse("use_qk_norm", "use a checkpoint without norms of queries and keys")
    norm = NormSpec(fields.number("layer_norm_eps", 1e-5), late_cast=True, centred=True)
    return LayerSpec(attention(fields, **changes), gated_mlp(fields), norm, parallel=True)


def _cohere(fields: Fields) -> tuple[LayerSpec, ...]:
    return alike(fields, _layer(fields, rope=read_rope(fields, 5e5, neighbours=True)))


def _cohere2(fields: Fields) -> tuple[LayerSpec, ...]:
    """Three layers with a window to one without."""
    rope = read_rope(fields, neighbours=True)
    kinds = window_pattern(fields, fields.positive_int("sliding_window_pattern", 4))
    return tuple(
        _layer(fields, rope=rope if kind == SLIDING else None, options=window(fields, kind))
        for kind in kinds
    )


def _head(fields: Fields) -> HeadSpec:
    return replace(plain_head(fields), scale=fields.number("logit_scale", 0.0625))


COHERE = Family(
    "Cohere (Command R)",
    "cohere",
    "CohereForCausalLM",
    layers=_cohere,
    head=_head,
    defaults={
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 5,
        "eos_token_id": 255001,
    },
)
COHERE2 = Family(
    "Cohere 2 (Command R7B, Command A)",
    "cohere2",
    "Cohere2ForCausalLM",
    layers=_cohere2,
    head=_head,
    defaults={
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "bos_token_id": 5,
        "eos_token_id": 255001,
    },
    # What published files say of this architecture, and transformers does not read.
    harmless=frozenset(
        {
            *("cache_implementation", "layer_switch", "order_of_interleaved_layers"),
            *("position_embedding_type", "rotary_pct", "use_embedding_sharing"),
            *("use_gated_activation", "use_parallel_block", "use_parallel_embedding"),
        }
    ),
)
