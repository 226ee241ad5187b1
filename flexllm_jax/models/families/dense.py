"""Dense families that differ from Llama in which layers rotate, in multipliers, in biases, or in
where their norms stand: SmolLM3, Seed-OSS, Granite (with windows and sinks, too), OLMo 2 and 3."""

from dataclasses import replace
from typing import Any

from flexllm_jax.models.families.family import Family, plain_head
from flexllm_jax.models.families.parts import (
    FULL,
    SLIDING,
    alike,
    attention,
    gated_mlp,
    layer_types,
    norms,
    window,
    window_pattern,
)
from flexllm_jax.models.families.rope import read_rope, read_ropes
from flexllm_jax.models.fields import Fields
from flexllm_jax.models.spec import HeadSpec, LayerSpec, NormSpec
from kernels_pallas.layer_options import AttentionOptions


def _smollm3(fields: Fields) -> tuple[LayerSpec, ...]:
    """Every fourth layer is told no positions; windows, if they are switched on, are of those."""
    count = fields.positive_int("num_hidden_layers")
    interval = fields.positive_int("no_rope_layer_interval", 4)
    rotates = fields.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(count)])
    if not isinstance(rotates, list) or len(rotates) != count:
        raise fields.error("no_rope_layers", f"must have {count} numbers, 1 where a layer rotates")
    slides = fields.boolean("use_sliding_window") and "sliding_window" in fields
    kinds = [SLIDING if slides and not rotated else FULL for rotated in rotates]
    kinds = layer_types(fields, kinds, (FULL, SLIDING))
    rope = read_rope(fields, 2_000_000.0)
    return tuple(
        LayerSpec(
            attention(
                fields,
                rope=rope if rotated else None,
                options=window(fields, kind if slides else FULL),
            ),
            gated_mlp(fields),
            norms(fields),
        )
        for rotated, kind in zip(rotates, kinds, strict=True)
    )


def _seed_oss(fields: Fields) -> tuple[LayerSpec, ...]:
    biases = {
        "qkv_bias": fields.boolean("attention_bias"),
        "o_bias": fields.boolean("attention_out_bias"),
    }
    return alike(fields, LayerSpec(attention(fields, **biases), gated_mlp(fields), norms(fields)))


def _granite(fields: Fields) -> tuple[LayerSpec, ...]:
    return alike(fields, _granite_layer(fields, AttentionOptions()))


def _granite_layer(fields: Fields, options: AttentionOptions, **changes: Any) -> LayerSpec:
    """`changes`: fields of AttentionSpec."""
    options = replace(options, scale=fields.number("attention_multiplier", 1.0))
    own = attention(fields, options=options, **changes)
    residual = fields.number("residual_multiplier", 1.0)
    return LayerSpec(own, gated_mlp(fields), norms(fields), residual)


def _granite_swa(fields: Fields) -> tuple[LayerSpec, ...]:
    """A layer without a window to three with one; each may have a theta of its own, or no RoPE."""
    count, rope = fields.positive_int("num_hidden_layers"), read_rope(fields)
    kinds = [SLIDING if layer % 4 else FULL for layer in range(count)]
    kinds = layer_types(fields, kinds, (FULL, SLIDING))
    thetas = fields.get("layer_rope_theta", [rope.theta] * count)
    if not isinstance(thetas, list) or len(thetas) != count:
        raise fields.error("layer_rope_theta", f"must have {count} numbers, 0 for no RoPE")
    return tuple(
        _granite_layer(
            fields,
            window(fields, kind),
            rope=replace(rope, theta=float(theta)) if theta else None,
            sinks=True,
        )
        for kind, theta in zip(kinds, thetas, strict=True)
    )


def _granite_around(fields: Fields) -> dict[str, Any]:
    return {"embed_scale": fields.number("embedding_multiplier", 1.0)}


def _granite_head(fields: Fields) -> HeadSpec:
    scale = 1.0 / fields.number("logits_scaling", 1.0)
    return replace(plain_head(fields), scale=scale)


def _olmo2(fields: Fields) -> tuple[LayerSpec, ...]:
    own = attention(fields, qk_norm="projection")
    return alike(fields, LayerSpec(own, gated_mlp(fields), olmo_norms(fields)))


def _olmo3(fields: Fields) -> tuple[LayerSpec, ...]:
    """Three layers with a window to one without, which may have a RoPE of its own."""
    kinds = window_pattern(fields, 4)
    full = fields.number("rope_theta", 500_000.0)
    ropes = read_ropes(fields, {FULL: full, SLIDING: 500_000.0})
    return tuple(
        LayerSpec(
            attention(fields, rope=ropes[kind], options=window(fields, kind), qk_norm="projection"),
            gated_mlp(fields),
            olmo_norms(fields),
        )
        for kind in kinds
    )


def olmo_norms(fields: Fields) -> NormSpec:
    """OLMo's norms of attention and of the feed-forward network: of what they give."""
    return norms(fields, pre=False, post=True, late_cast=True)


SMOLLM3 = Family(
    "SmolLM3",
    "smollm3",
    "SmolLM3ForCausalLM",
    layers=_smollm3,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    harmless=frozenset({"sliding_window", "layer_types", "max_window_layers"}),
)
SEED_OSS = Family(
    "Seed-OSS",
    "seed_oss",
    "SeedOssForCausalLM",
    layers=_seed_oss,
    defaults={
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
)
GRANITE = Family(
    "Granite, dense",
    "granite",
    "GraniteForCausalLM",
    layers=_granite,
    around=_granite_around,
    head=_granite_head,
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
)
GRANITE_SWA = Family(
    "Granite with sliding windows",
    "granite_swa",
    "GraniteSWAForCausalLM",
    layers=_granite_swa,
    around=_granite_around,
    head=_granite_head,
    defaults={
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": 128,
        "bos_token_id": 100257,
        "eos_token_id": 100257,
    },
)
_OLMO = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279}
OLMO2 = Family("OLMo 2", "olmo2", "Olmo2ForCausalLM", layers=_olmo2, defaults=_OLMO)
OLMO3 = Family(
    "OLMo 3", "olmo3", "Olmo3ForCausalLM", layers=_olmo3, defaults=_OLMO | {"sliding_window": 4096}
)
