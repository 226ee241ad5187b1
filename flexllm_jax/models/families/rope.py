"""RoPE as configurations spell it: `rope_parameters` of transformers 5, or `rope_theta` and
`rope_scaling` of older ones. Each kind is a row of a table."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexllm_jax.models.fields import Fields, ModelConfigError
from flexllm_jax.models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

logger = logging.getLogger(__name__)

_THETA = 10_000.0  # transformers' default


def read_rope(
    fields: Fields,
    theta: float = _THETA,
    *,
    partial: bool = False,
    neighbours: bool = False,
    growing: bool = False,
) -> RopeSpec:
    """The RoPE of all layers, with transformers' rule of which of two spellings wins. partial:
    whether a part of each head may be all that is rotated. growing: whether queries are multiplied
    by a factor of their position."""
    name, rope = _object(fields)
    if any(isinstance(value, dict) for value in rope.values()):
        raise fields.error(name, "is not supported; one set of RoPE parameters for all layers is")
    return replace(
        _rope(fields, name, rope, theta, partial=partial, growing=growing), neighbours=neighbours
    )


def read_rope_or_none(fields: Fields) -> RopeSpec | None:
    """The RoPE of all layers; None where its base frequency is null, which is no default then."""
    name, rope = _object(fields)
    inner = Fields(rope, f"config.json: {name}:")
    given = inner if "rope_theta" in rope else fields
    return None if given.is_null("rope_theta") else read_rope(fields)


def read_ropes(
    fields: Fields, thetas: dict[str, float], head_dims: Mapping[str, int] | None = None
) -> dict[str, RopeSpec]:
    """The RoPE of each kind of layer; `thetas`: their base frequencies where nothing says others;
    head_dims: their H, if it is not the same in every layer.

    Older configurations have `rope_scaling` for layers with full attention alone.
    """
    name, rope = _object(fields)
    if name == "rope_parameters":
        own = Fields(rope, f"config.json: {name}:")
        parts = {kind: own.get(kind, {}) for kind in thetas}
        own.refuse_unread("RoPE by kind of layer", ())
    else:
        parts = {kind: rope if kind == "full_attention" else {} for kind in thetas}
    return {
        kind: _rope(
            fields,
            f"{name}.{kind}",
            parts[kind],
            theta,
            by_kind=True,
            head_dim=None if head_dims is None else head_dims[kind],
        )
        for kind, theta in thetas.items()
    }


def _object(fields: Fields) -> tuple[str, dict[str, Any]]:
    """The parameters, and the field that they are in."""
    old, new = (fields.get(name) for name in ("rope_scaling", "rope_parameters"))
    name = "rope_scaling" if old else "rope_parameters"
    rope = old or new or {}
    if not isinstance(rope, dict):
        raise fields.error(name, "must be an object")
    return name, rope


def read_head_dim(fields: Fields) -> int:
    """H, where it is the same in every layer."""
    d_model, heads = (fields.positive_int(n) for n in ("hidden_size", "num_attention_heads"))
    head_dim = fields.positive_int("head_dim", d_model // heads)
    if head_dim % 2:
        raise fields.error("head_dim", "is odd, but RoPE rotates pairs; use an even one")
    return head_dim


def _rope(
    fields: Fields,
    name: str,
    rope: Any,
    theta: float,
    *,
    by_kind: bool = False,
    partial: bool = False,
    growing: bool = False,
    head_dim: int | None = None,
) -> RopeSpec:
    if not isinstance(rope, dict):
        raise ModelConfigError(f"config.json: {name}={rope!r} must be an object")
    if by_kind:
        rope = {**rope, "truncate": True}  # transformers does not look for it there
    own = Fields(rope, f"config.json: {name}:")
    theta = own.number("rope_theta", theta if by_kind else fields.number("rope_theta", theta))
    share = own.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    kind = own.get("rope_type", own.get("type", "default"))
    kind = _OLDER_NAMES.get(kind, kind)
    head_dim = head_dim or read_head_dim(fields)
    if kind == "proportional":
        turned = ProportionalScaling(int(share * head_dim // 2), own.number("factor", 1.0))
        own.refuse_unread(f"the RoPE of kind {kind!r}", ("type", "truncate"))
        return RopeSpec(theta, turned)
    if share != 1 and not partial:
        raise ModelConfigError(
            f"config.json: partial_rotary_factor={share!r} is not supported; only 1.0 is"
        )
    rotated = int(head_dim * share)
    if rotated % 2 or not 0 < rotated <= head_dim or (head_dim - rotated) % 2:
        raise ModelConfigError(
            f"config.json: partial_rotary_factor={share!r} would rotate {rotated} of a head's "
            f"{head_dim} elements; use one with which they are pairs"
        )
    for read in ("type", "truncate"):
        own.get(read)
    if kind == "default":
        scaling = None
    elif kind in _KINDS:
        # At the top level it wins over the one inside.
        original = "original_max_position_embeddings"
        inner = own.positive_int(original, fields.positive_int("max_position_embeddings"))
        original = fields.positive_int(original, inner)
        scaling = _KINDS[kind](own, original, fields)
    else:
        known = ", ".join(map(repr, ("default", *_KINDS, "proportional")))
        raise ModelConfigError(
            f"config.json: {name}.rope_type={kind!r} is not supported; {known} are"
        )
    if isinstance(scaling, LongRopeScaling) and 2 * len(scaling.factors) != rotated:
        raise ModelConfigError(
            f"config.json: {name}: a list of {len(scaling.factors)} factors, and "
            f"{rotated // 2} frequencies; correct the one that is wrong"
        )
    growth = None
    if growing:
        own.get("max_position_embeddings")
        growth = (
            own.number("llama_4_scaling_beta"),
            own.positive_int("original_max_position_embeddings"),
        )
    own.refuse_unread(f"the RoPE of kind {kind!r}", ("mrope_section", "mrope_interleaved"))
    return RopeSpec(
        theta,
        scaling,
        None if rotated == head_dim else rotated,
        growth=growth,
    )


def _linear(own: Fields, original: int, fields: Fields) -> RopeScaling:
    return LinearScaling(own.number("factor"))


def _llama3(own: Fields, original: int, fields: Fields) -> RopeScaling:
    scaling = Llama3Scaling(
        factor=own.number("factor"),
        low_freq_factor=own.number("low_freq_factor"),
        high_freq_factor=own.number("high_freq_factor"),
        original_max_position_embeddings=original,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise own.error(
            "high_freq_factor", f"must be above low_freq_factor={scaling.low_freq_factor}"
        )
    return scaling


def _yarn(own: Fields, original: int, fields: Fields) -> RopeScaling:
    factor = own.number("factor")

    def spread(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    both = [own.get(name) for name in ("mscale", "mscale_all_dim")]
    default = spread(both[0]) / spread(both[1]) if all(both) else spread(1.0)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=own.number("attention_factor", default),
        beta_fast=own.number("beta_fast", 32.0),
        beta_slow=own.number("beta_slow", 1.0),
        truncate=own.boolean("truncate", True),
    )


def _longrope(own: Fields, original: int, fields: Fields) -> RopeScaling:
    """One of two lists, by the context that the engine is for: as keys stay in their pages, it is
    the same for short and long texts."""
    limit = fields.positive_int("max_position_embeddings")
    factor = own.number("factor", limit / original)
    spread = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    context = min(fields.most_tokens or limit, limit)
    chosen = "long_factor" if context > original else "short_factor"
    for name in ("long_factor", "short_factor"):
        factors = own.get(name)
        if not isinstance(factors, list) or not all(isinstance(f, int | float) for f in factors):
            raise own.error(name, "must be a list of numbers, one for each frequency")
    logger.info(
        "RoPE of kind longrope: %s for every text, as the context is %d tokens and the original "
        "one %d; transformers chooses by each text's length",
        *(chosen, context, original),
    )
    return LongRopeScaling(tuple(own.get(chosen)), own.number("attention_factor", spread))


_KINDS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
_OLDER_NAMES = {"su": "longrope"}
