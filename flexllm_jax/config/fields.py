"""What the sections of the configuration are made of: strict types, names, and their base class."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict

from flexllm_jax.errors import UserError

Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
TargetModule = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "lm_head",
    "qkv_proj",
    "gate_up_proj",
    "per_layer_input_gate",
    "per_layer_projection",
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_b",
    "in_proj_a",
    "out_proj",
    "g_proj",
    "b_proj",
    "a_proj",
]
_USUAL = get_args(TargetModule)[:7]
# What some models have as one projection, and its parts. A layer that does not attend has others
# than the usual seven, which mean them all together.
FUSED_MODULES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"), _USUAL),
    **dict.fromkeys(("g_proj", "b_proj", "a_proj"), _USUAL),
}
# PEFT's init_lora_weights; "default" is its `true`.
LoraInit = Annotated[
    str, Field(pattern=r"^(default|gaussian|olora|pissa|pissa_niter_[1-9][0-9]?)$")
]
AdapterKind = Literal["lora", "ia3", "bottleneck", "prefix"]
ALL_MODULES: tuple[TargetModule, ...] = _USUAL  # "all-linear": no head


class ConfigError(UserError):
    """A configuration cannot be used. The message is one line: field, value, remedy."""


def ranks_taken(init: str) -> int:
    """How many times its rank a LoRA takes that starts so: that from which a start out of the base
    weights is subtracted takes two."""
    return 1 if init in ("default", "gaussian") else 2


class Section(BaseModel):
    """Part of the configuration: immutable, no unknown keys, no infinities unless allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections an annotation holds: itself, or inside `tuple[...]` or `... | ...`. Several are
    a choice by their `type`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for inside in get_args(annotation) for section in sections_in(inside)]


def distinct(names: tuple[str, ...], prefix: str = "") -> tuple[str, ...]:
    """`names`; ValueError, whose text `prefix` opens, when one is given twice."""
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"{prefix}{name!r} is given twice; remove or rename one")
    return names


def room_for(module: str, names: tuple[str, ...]) -> bool:
    """Whether target modules, by their names, have one: itself, or all of its parts."""
    parts = FUSED_MODULES.get(module, ())
    return module in names or (bool(parts) and set(parts) <= set(names))
