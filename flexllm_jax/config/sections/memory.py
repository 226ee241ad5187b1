"""Fields of `cache` and `adapters`: what the device's memory holds beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from flexllm_jax.config.fields import (
    ALL_MODULES,
    AdapterKind,
    Bool,
    Float,
    Int,
    Name,
    Section,
    TargetModule,
    distinct,
)


class CacheSection(Section):
    """The paged KV cache, shared by inference and finetuning."""

    page_size: Int = Field(default=16, ge=1, le=1024, description="Tokens in a KV page.")
    num_pages: Int | None = Field(
        default=None,
        ge=2,
        description="KV pages in the pool. null: as many as memory_fraction leaves room for.",
    )
    memory_fraction: Float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Part of the device's memory the engine may use, of what JAX may (on a GPU 92 "
        "percent, unless XLA_CLIENT_MEM_FRACTION says otherwise).",
    )
    budget_gb: Float | None = Field(
        default=None,
        gt=0,
        description="Memory the engine may use on each device, GB (1e9 bytes), in place of "
        "memory_fraction. null: that.",
    )
    prefix_caching: Bool = Field(
        default=True,
        description="Keep the pages of finished prompts, so that a shared prefix is computed once.",
    )
    state_snapshots: Int | None = Field(
        default=None,
        ge=0,
        le=1 << 16,
        description="Copies of recurrent state that prefixes are shared from, for models with such "
        "layers; each is as large as the state of a running request. null: half as many as "
        "scheduler.max_sequences. 0: no prefix of such a model is shared.",
    )
    snapshot_every: Int | None = Field(
        default=None,
        ge=1,
        description="Tokens from one copy of recurrent state to the next in a long prompt or "
        "output, a multiple of page_size; the end of a prompt has one anyway. null: 1024, in whole "
        "pages.",
    )

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        every = self.snapshot_every
        if every is not None and every % self.page_size:
            raise ValueError(
                f"snapshot_every={every} must be a multiple of page_size={self.page_size}"
            )
        return self

    @property
    def snapshot_tokens(self) -> int:
        """`snapshot_every`, also where it is left out."""
        return self.snapshot_every or -(-1024 // self.page_size) * self.page_size


class PreloadedAdapter(Section):
    """A PEFT adapter to serve from the start."""

    name: Name = Field(description="Name requests ask for.")
    path: Path = Field(description="Folder with adapter_config.json and adapter_model.safetensors.")


class AdaptersSection(Section):
    """The device's bank of adapters."""

    slots: Int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Adapters held on the device at once; slot 0 is `no adapter`.",
    )
    kinds: tuple[AdapterKind, ...] = Field(
        default=("lora",),
        min_length=1,
        description="Kinds of adapters the bank has room for; each makes steps with adapters a "
        "little longer.",
    )
    max_rank: Int = Field(
        default=16, ge=1, le=1024, description="Largest LoRA rank a slot can hold."
    )
    max_bottleneck: Int = Field(
        default=64, ge=1, le=1024, description="Largest width of a bottleneck adapter."
    )
    max_prefix: Int = Field(default=32, ge=1, le=1024, description="Longest prefix, in tokens.")
    target_modules: tuple[TargetModule, ...] = Field(
        default=ALL_MODULES,
        min_length=1,
        description="Modules the bank has room for; adapters may use any of these.",
    )
    preload: tuple[PreloadedAdapter, ...] = Field(
        default=(), description="Adapters loaded at start-up."
    )

    @field_validator("target_modules", "kinds")
    @classmethod
    def _distinct(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        return distinct(modules)

    @model_validator(mode="after")
    def _names(self) -> Self:
        distinct(tuple(adapter.name for adapter in self.preload), "preload.*.name: ")
        return self
