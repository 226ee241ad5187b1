"""Models that differ from another in one field: a reference that any of them cannot be told from
checks nothing of that field.

`CHANGES` has what each field becomes; `ARRAYS` names those that say which arrays there are and how
they lie, with which the same weights make no other model.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from flexllm_jax.models import rope, spec
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.layer_options import AttentionOptions


def _off(value: Any) -> list[Any]:
    return [False if value is True else None]


def _one(value: float) -> list[float]:
    return [1.0]


def _visible(eps: float) -> list[float]:
    """Of an eps: as it is, hardly anything shows it."""
    return [eps + 0.03]


def _rope(value: rope.RopeSpec | None) -> list[Any]:
    return [rope.RopeSpec(1e4) if value is None else None]


CHANGES: dict[type, dict[str, Callable[[Any], list[Any]]]] = {
    ModelConfig: {"embed_scale": _one, "embed_norm": _off, "final_norm": _off},
    spec.HeadSpec: {"scale": _one, "soft_cap": _off},
    spec.LayerSpec: {"residual_scale": _one, "token_width": _off, "scalar": _off, "parallel": _off},
    spec.NormSpec: {
        "eps": _visible,
        "post_eps": _visible,
        "post": _off,
        "offset": _off,
        "centred": _off,
    },
    spec.MlpSpec: {"activation": lambda name: ["gelu_tanh" if name == "silu" else "silu"]},
    spec.AttentionSpec: {
        **{"rope": _rope, "qk_norm": _off, "qkv_bias": _off, "o_bias": _off, "gate": _off},
        **{"gate_projection": _off, "v_norm": _off, "sinks": _off},
    },
    AttentionOptions: {
        "scale": lambda scale: [None, 1.01 * scale],
        "window": lambda window: [window - 1, window + 1, None],
        "soft_cap": _off,
    },
    rope.RopeSpec: {
        "theta": lambda theta: [1.5 * theta],
        "scaling": _off,
        "neighbours": _off,
        "growth": _off,
    },
    spec.GatedDeltaSpec: {"beta_scale": _one},
}
ARRAYS = {
    spec.HeadSpec: {"tied"},
    spec.LayerSpec: {"mixer", "mlp", "norm"},
    spec.NormSpec: {"pre", "late_cast"},  # the second is seen in bfloat16 alone
    spec.MlpSpec: {"d_ff", "fused"},
    spec.AttentionSpec: {
        *("heads", "kv_heads", "head_dim", "options", "fused", "values", "shared", "own_keys"),
    },
    AttentionOptions: set(),
    rope.RopeSpec: {"rotated"},
    spec.GatedDeltaSpec: {
        *("key_heads", "value_heads", "key_dim", "value_dim", "width", "norm", "fused"),
    },
}


def mutants(model: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """All that differ in one field, which the model has other than its default, in every layer
    that has it so."""
    for kind, changes in CHANGES.items():
        for name, change in changes.items():
            for nth in range(3):
                other = _changed(model, kind, name, change, nth)
                if other != model:
                    yield f"{kind.__name__}.{name}/{nth}", other


def _changed(value: Any, kind: type, name: str, change: Callable, nth: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_changed(part, kind, name, change, nth) for part in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    own = {}
    for field in dataclasses.fields(value):
        part = _changed(getattr(value, field.name), kind, name, change, nth)
        if type(value) is kind and field.name == name and part != field.default:
            new = change(part)
            part = new[nth] if nth < len(new) else part
        own[field.name] = part
    return dataclasses.replace(value, **own)
