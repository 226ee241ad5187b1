"""Gemma 4: layers of two kinds, of which those with full attention have larger heads; keys that are
values, layers that read the keys of others, and inputs of tokens for single layers."""

from dataclasses import replace
from typing import Any

from flexllm_jax.models.families.family import OTHER_PARTS, Family, Wrapper
from flexllm_jax.models.families.gemma import gemma_head
from flexllm_jax.models.families.parts import (
    FULL,
    SLIDING,
    attention,
    norms,
    window_pattern,
)
from flexllm_jax.models.families.rope import read_ropes
from flexllm_jax.models.fields import Fields, ModelConfigError
from flexllm_jax.models.spec import LayerSpec, MlpSpec
from kernels_pallas.layer_options import AttentionOptions

_THETAS = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": _THETAS[SLIDING]},
    FULL: {
        "rope_type": "proportional",
        "rope_theta": _THETAS[FULL],
        "partial_rotary_factor": 0.25,
    },
}


def _layers(fields: Fields) -> tuple[LayerSpec, ...]:
    """Five layers with a window to one without; the last one never has one."""
    fields.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    fields.refuse("enable_moe_block", "use a dense Gemma 4")
    if fields.get("use_bidirectional_attention") == "all":
        raise fields.error("use_bidirectional_attention", "is not supported; attention is causal")
    kinds = [*window_pattern(fields, 6)[:-1], FULL]
    sizes = _sizes(fields, kinds)
    of_kind = {kind: size for kind, (size, _) in zip(kinds, sizes, strict=True)}
    ropes = read_ropes(fields, {kind: _THETAS[kind] for kind in dict.fromkeys(kinds)}, of_kind)
    own = len(kinds) - (fields.get("num_kv_shared_layers") or 0)
    if not set(kinds[own:]) <= set(kinds[:own]):
        raise fields.error(
            "num_kv_shared_layers", "leaves layers without one before them whose keys they read"
        )
    wide = 2 if fields.boolean("use_double_wide_mlp") else 1
    width, inner = (
        fields.get("hidden_size_per_layer_input"),
        fields.positive_int("intermediate_size"),
    )
    keys_are_values = fields.boolean("attention_k_eq_v")
    made = []
    for i, (kind, (head_dim, kv_heads)) in enumerate(zip(kinds, sizes, strict=True)):
        sliding = fields.positive_int("sliding_window", 512) if kind == SLIDING else None
        own_attention = attention(
            fields,
            rope=ropes[kind],
            options=AttentionOptions(scale=1.0, window=sliding),
            qk_norm="head",
            values="keys" if keys_are_values and kind == FULL else "projected",
            v_norm=True,
            shared=kind if own < len(kinds) else None,
            own_keys=i < own,
        )
        made.append(
            LayerSpec(
                replace(own_attention, head_dim=head_dim, kv_heads=kv_heads),
                MlpSpec(inner if i < own else wide * inner, "gelu_tanh"),
                norms(fields, post=True, late_cast=True),
                token_width=width or None,
                scalar=True,
            )
        )
    return tuple(made)


def _sizes(fields: Fields, kinds: list[str]) -> list[tuple[int, int]]:
    """H and K of each layer: newer configurations say in which layers they are others, older ones
    what they are in those with full attention."""
    usual = {name: fields.positive_int(name) for name in ("head_dim", "num_key_value_heads")}
    full = {"head_dim": fields.positive_int("global_head_dim")}
    heads = fields.get("num_global_key_value_heads")
    if heads is not None and fields.boolean("attention_k_eq_v"):
        full["num_key_value_heads"] = heads
    given = fields.get("per_layer_config")
    by_layer = {i: full for i, kind in enumerate(kinds) if kind == FULL}
    if given is not None:
        if not isinstance(given, dict) or not all(str(i).isdigit() for i in given):
            raise fields.error("per_layer_config", "must have numbers of layers as its keys")
        by_layer = {int(i): other for i, other in given.items()}
    sizes, first = [], {}
    for i, kind in enumerate(kinds):
        name = f"config.json: per_layer_config: {i}:"
        other = Fields(by_layer.get(i, {}), name)
        size = [other.positive_int(field, usual[field]) for field in usual]
        other.refuse_unread("Gemma 4", ())
        heads = fields.positive_int("num_attention_heads")
        if heads % size[1] or size[0] % 2:
            raise ModelConfigError(
                f"{name} head_dim={size[0]} must be even, and num_key_value_heads={size[1]} divide "
                f"num_attention_heads={heads}; correct the one that is wrong"
            )
        if size[0] != first.setdefault(kind, size[0]):
            raise ModelConfigError(
                f"{name} head_dim={size[0]} is not that of the other layers of {kind}; use one"
            )
        sizes.append((size[0], size[1]))
    return sizes


def _around(fields: Fields) -> dict[str, Any]:
    scale = {"embed_scale": fields.positive_int("hidden_size") ** 0.5}
    if not fields.get("hidden_size_per_layer_input"):
        return scale
    return scale | {"token_table": fields.positive_int("vocab_size_per_layer_input")}


_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "rope_parameters": _ROPE,
}
_HARMLESS = frozenset(
    {
        *("use_bidirectional_attention", "vocab_size_per_layer_input", "moe_intermediate_size"),
        *("num_experts", "top_k_experts", "per_layer_config"),
        *("global_head_dim", "num_global_key_value_heads"),
    }
)
GEMMA4 = Family(
    "Gemma 4, dense",
    "gemma4_text",
    "Gemma4ForCausalLM",
    layers=_layers,
    around=_around,
    head=gemma_head,
    defaults=_DEFAULTS
    | {
        "max_position_embeddings": 131072,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
    },
    harmless=_HARMLESS,
)
GEMMA4_UNIFIED = Family(
    "Gemma 4 12B",
    "gemma4_unified_text",
    "Gemma4UnifiedForCausalLM",
    layers=_layers,
    around=_around,
    head=gemma_head,
    defaults=_DEFAULTS | {"max_position_embeddings": 262144, "sliding_window": 1024},
    harmless=_HARMLESS,
)
# Fields of the whole that say what its other parts are.
_OTHER_PARTS = OTHER_PARTS | {
    *("audio_config", "audio_token_id", "boa_token_id", "eoa_token_index", "video_token_id"),
}
GEMMA4_WRAPPERS = (
    Wrapper(
        "Gemma 4 with vision and audio",
        "gemma4",
        "Gemma4ForConditionalGeneration",
        text="gemma4_text",
        harmless=_OTHER_PARTS,
    ),
    Wrapper(
        "Gemma 4 12B with vision and audio",
        "gemma4_unified",
        "Gemma4UnifiedForConditionalGeneration",
        text="gemma4_unified_text",
        harmless=_OTHER_PARTS,
    ),
)
