"""RoPE as configurations spell it: `rope_parameters` of transformers 5, or `rope_theta` and
`rope_scaling` of older ones. Each kind is a row of a table."""

import math
from typing import Any

from flexllm_jax.models.fields import Fields, ModelConfigError
from flexllm_jax.models.rope import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

_THETA = 10_000.0  # transformers' default


def read_rope(fields: Fields, theta: float = _THETA) -> RopeSpec:
    """The RoPE of all layers, with transformers' rule of which of two spellings wins."""
    name, rope = _object(fields)
    if any(isinstance(value, dict) for value in rope.values()):
        raise fields.error(name, "is not supported; one set of RoPE parameters for all layers is")
    return _rope(fields, name, rope, theta)


def read_ropes(fields: Fields, thetas: dict[str, float]) -> dict[str, RopeSpec]:
    """The RoPE of each kind of layer; `thetas`: their base frequencies where nothing says others.

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
        kind: _rope(fields, f"{name}.{kind}", parts[kind], theta, by_kind=True)
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


def _rope(fields: Fields, name: str, rope: Any, theta: float, *, by_kind: bool = False) -> RopeSpec:
    if not isinstance(rope, dict):
        raise ModelConfigError(f"config.json: {name}={rope!r} must be an object")
    if by_kind:
        rope = {**rope, "truncate": True}  # transformers does not look for it there
    own = Fields(rope, f"config.json: {name}:")
    theta = own.number("rope_theta", theta if by_kind else fields.number("rope_theta", theta))
    rotated = own.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if rotated != 1:
        raise ModelConfigError(
            f"config.json: partial_rotary_factor={rotated!r} is not supported; only 1.0 is"
        )
    kind = own.get("rope_type", own.get("type", "default"))
    own.get("type"), own.get("truncate")
    if kind == "default":
        scaling = None
    elif kind in _KINDS:
        # At the top level it wins over the one inside.
        original = "original_max_position_embeddings"
        inner = own.positive_int(original, fields.positive_int("max_position_embeddings"))
        scaling = _KINDS[kind](own, fields.positive_int(original, inner))
    else:
        known = ", ".join(map(repr, ("default", *_KINDS)))
        raise ModelConfigError(
            f"config.json: {name}.rope_type={kind!r} is not supported; {known} are"
        )
    own.refuse_unread(f"the RoPE of kind {kind!r}", ("mrope_section",))
    return RopeSpec(theta, scaling)


def _linear(own: Fields, original: int) -> RopeScaling:
    return LinearScaling(own.number("factor"))


def _llama3(own: Fields, original: int) -> RopeScaling:
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


def _yarn(own: Fields, original: int) -> RopeScaling:
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


_KINDS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
