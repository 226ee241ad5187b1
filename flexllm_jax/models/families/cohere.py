"""Cohere 2 (Command R7B, Command A): attention and the feed-forward network side by side behind one
LayerNorm; windows where layers rotate, by neighbours, and no positions where there is none."""

from dataclasses import replace

from flexllm_jax.models.families.family import Family, plain_head
from flexllm_jax.models.families.parts import SLIDING, attention, gated_mlp, window, window_pattern
from flexllm_jax.models.families.rope import read_rope
from flexllm_jax.models.fields import Fields
from flexllm_jax.models.spec import HeadSpec, LayerSpec, NormSpec


def _layers(fields: Fields) -> tuple[LayerSpec, ...]:
    """Three layers with a window to one without."""
    fields.refuse("use_qk_norm", "use a checkpoint without norms of queries and keys")
    rope = read_rope(fields, neighbours=True)
    norm = NormSpec(fields.number("layer_norm_eps", 1e-5), late_cast=True, centred=True)
    kinds = window_pattern(fields, fields.positive_int("sliding_window_pattern", 4))
    return tuple(
        LayerSpec(
            attention(fields, rope=rope if kind == SLIDING else None, options=window(fields, kind)),
            gated_mlp(fields),
            norm,
            parallel=True,
        )
        for kind in kinds
    )


def _head(fields: Fields) -> HeadSpec:
    return replace(plain_head(fields), scale=fields.number("logit_scale", 0.0625))


COHERE2 = Family(
    "Cohere 2 (Command R7B, Command A)",
    "cohere2",
    "Cohere2ForCausalLM",
    layers=_layers,
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
