"""Muse Glimmer: three layers with a window to one without, which is told no positions; gated
attention, queries and keys normalized without weights, normalized embeddings."""

from dataclasses import replace
from typing import Any

from flexllm_jax.models.families.family import OTHER_PARTS, Family, Wrapper, plain_head
from flexllm_jax.models.families.parts import (
    FULL,
    SLIDING,
    attention,
    gated_mlp,
    layer_types,
    norms,
    window,
)
from flexllm_jax.models.families.rope import read_head_dim, read_rope
from flexllm_jax.models.fields import Fields
from flexllm_jax.models.spec import HeadSpec, LayerSpec


def _layers(fields: Fields) -> tuple[LayerSpec, ...]:
    fields.choice("hidden_activation", ("silu",), "silu")
    count, rope = fields.positive_int("num_hidden_layers"), read_rope(fields)
    full = [(count - 1 - i) % 4 == 0 for i in range(count)]
    kinds = layer_types(fields, [FULL if x else SLIDING for x in full], (FULL, SLIDING))
    rotates = fields.get("layer_rope_theta", [0 if x else 1 for x in full])
    if not isinstance(rotates, list) or len(rotates) != count:
        raise fields.error("layer_rope_theta", f"must have {count} numbers, 0 for no RoPE")
    scale = fields.number("qk_scale_factor", 3.87) * read_head_dim(fields) ** -0.5
    norm = norms(fields, post=True, late_cast=True, offset=True)
    return tuple(
        LayerSpec(
            attention(
                fields,
                rope=rope if rotated else None,
                options=replace(window(fields, kind), scale=scale),
                qk_norm="unit",
                gate_projection=True,
            ),
            gated_mlp(fields),
            replace(norm, post_eps=fields.number("post_norm_eps", 1e-8)),
        )
        for kind, rotated in zip(kinds, rotates, strict=True)
    )


def _head(fields: Fields) -> HeadSpec:
    return replace(
        plain_head(fields),
        scale=fields.number("output_multiplier", 0.19611613513818404),
        soft_cap=fields.number("final_logit_softcapping", 20.0),
    )


def _around(fields: Fields) -> dict[str, Any]:
    norm = norms(fields, late_cast=True)
    return {"embed_norm": norm.eps, "final_norm": norm}


MUSE = Family(
    "Muse Glimmer",
    "muse_glimmer_text",
    "MuseGlimmerTextModel",
    layers=_layers,
    around=_around,
    head=_head,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": 2048,
        "bos_token_id": 200000,
        "eos_token_id": 200001,
    },
)
MUSE_WRAPPER = Wrapper(
    "Muse Glimmer with vision",
    "muse_glimmer",
    "MuseGlimmerForConditionalGeneration",
    text="muse_glimmer_text",
    harmless=OTHER_PARTS | {"out_hidden_size", "projector_hidden_size", "video_token_id"},
)
