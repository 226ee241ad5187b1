"""Fields of `finetune.jobs.N.peft`: the adapter that a job trains."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from flexllm_jax.config.fields import (
    ALL_MODULES,
    AdapterKind,
    Bool,
    Float,
    Int,
    LoraInit,
    Section,
    TargetModule,
    distinct,
    ranks_taken,
)


class PeftConfig(Section):
    """The adapter a job trains; fields of other kinds do not count. Also accepts
    `flexllm_jax.peft.adapter.LoraConfig`."""

    type: AdapterKind = Field(default="lora", description="Kind of adapter; one of adapters.kinds.")
    r: Int = Field(default=16, ge=1, description="LoRA rank; at most adapters.max_rank.")
    alpha: Float = Field(
        default=32.0, gt=0, description="LoRA scale: alpha/r multiplies the update."
    )
    target_modules: tuple[TargetModule, ...] = Field(
        default=ALL_MODULES,
        min_length=1,
        description="Modules that get an adapter, or all-linear: all projections of a layer.",
    )
    use_rslora: Bool = Field(
        default=False, description="Scale by alpha/sqrt(r) instead of alpha/r."
    )
    rank_pattern: dict[str, Annotated[Int, Field(ge=1)]] = Field(
        default={}, description="Rank of single modules, by name or regular expression as in PEFT."
    )
    alpha_pattern: dict[str, Annotated[Float, Field(gt=0)]] = Field(
        default={}, description="Alpha of single modules, by name or regular expression as in PEFT."
    )

    layers_to_transform: tuple[Annotated[Int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, description="Layers that get LoRA, from 0. null: all."
    )
    init: LoraInit = Field(
        default="default",
        description="How LoRA starts, as PEFT's init_lora_weights: default, gaussian, olora, pissa "
        "(exact, slow for large models) or pissa_niter_N (approximate). The last "
        "three start from the base weights and take twice the rank.",
    )
    lora_dropout: Float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Probability with which an element of what LoRA reads is dropped in training, "
        "a mask for each module, as in PEFT. null: that of init_adapter, or 0.",
    )
    bottleneck_size: Int = Field(
        default=64, ge=1, description="Width of a bottleneck; at most adapters.max_bottleneck."
    )
    num_virtual_tokens: Int = Field(
        default=16, ge=1, description="Tokens of a prefix; at most adapters.max_prefix."
    )

    @model_validator(mode="after")
    def _keeps_its_start(self) -> Self:
        if self.lora_dropout and ranks_taken(self.init) > 1:
            raise ValueError(
                f"lora_dropout: {self.lora_dropout} and init: {self.init} are given, and dropout "
                "would also drop the start that is subtracted; leave one of them out"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _from_dataclass(cls, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_linear(cls, modules: Any) -> Any:
        return ALL_MODULES if modules == "all-linear" else modules

    @field_validator("target_modules")
    @classmethod
    def _distinct(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        return distinct(modules)

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns
