"""What the sections of the configuration are made of: strict types, names, and their base class."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict

from flexllm_jax.errors import UserError

Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
TargetModule = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"
]
AdapterKind = Literal["lora", "ia3", "bottleneck", "prefix"]
ALL_MODULES: tuple[TargetModule, ...] = get_args(TargetModule)[:-1]  # "all-linear": no head


class ConfigError(UserError):
    """A configuration cannot be used. The message is one line: field, value, remedy."""


class Section(BaseModel):
    """Part of the configuration: immutable, no unknown keys, no infinities unless allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def distinct(names: tuple[str, ...], prefix: str = "") -> tuple[str, ...]:
    """`names`; ValueError, whose text `prefix` opens, when one is given twice."""
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"{prefix}{name!r} is given twice; remove or rename one")
    return names
