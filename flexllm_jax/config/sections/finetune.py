"""Fields of `finetune`: the jobs, their adapters and optimizers, and the training buffers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flexllm_jax.config.fields import (
    Bool,
    Float,
    Int,
    Name,
    Section,
    distinct,
)
from flexllm_jax.config.sections.method import MethodConfig, ReinforcementConfig, SupervisedConfig
from flexllm_jax.config.sections.peft import PeftConfig

OptimizerName = Literal["adamw", "muon"]


class OptimizerConfig(Section):
    """An optimizer and its learning rate."""

    type: OptimizerName = Field(
        default="adamw",
        description="adamw; or muon, for LoRA on one device: means of gradients, made orthogonal.",
    )
    lr: Float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    warmup: Int = Field(
        default=0, ge=0, description="Optimizer steps over which the rate rises from 0."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear",
        description="Rate after warm-up: constant, or falling to 0 at the last step.",
    )
    weight_decay: Float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    clip: Float | None = Field(
        default=1.0, gt=0, description="Largest global norm of a gradient. null: no clipping."
    )
    beta1: Float = Field(
        default=0.9, ge=0, lt=1, description="AdamW's decay of the mean of gradients."
    )
    beta2: Float = Field(
        default=0.999, ge=0, lt=1, description="AdamW's decay of the mean of squared gradients."
    )
    momentum: Float = Field(
        default=0.95, ge=0, lt=1, description="Muon's decay of the mean of gradients."
    )
    eps: Float = Field(default=1e-8, gt=0, description="Added to the denominator.")
    b_lr_ratio: Float = Field(
        default=1.0,
        gt=0,
        description="Learning rate of LoRA's B over that of A (LoRA+: 16, with a smaller lr).",
    )


class FinetuneConfig(Section):
    """One finetuning job: a dataset, an adapter, an optimizer."""

    name: Name = Field(
        description="Name of the job, of its adapter and of its folder in output_dir."
    )
    dataset: Path = Field(description="Training rows, JSONL or JSON.")
    format: Literal[
        "auto",
        "tokenized",
        "chat",
        "prompt_completion",
        "text",
        "alpaca",
        "sharegpt",
        "question_answer",
        "preference",
        "openai_preference",
    ] = Field(default="auto", description="What a row looks like. auto: detected from its fields.")
    method: MethodConfig = Field(
        default_factory=SupervisedConfig, discriminator="type", description="How to train."
    )
    validation: Path | None = Field(default=None, description="Validation rows in the same format.")
    validation_every: Int = Field(
        default=0, ge=0, description="Optimizer steps between validations. 0: only at the end."
    )
    train_on: Literal["completion", "all"] = Field(
        default="completion",
        description="Tokens that count in the loss: the answers, or everything. Rows of tokens "
        "say it themselves.",
    )
    peft: PeftConfig = Field(default_factory=PeftConfig, description="The adapter.")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="The optimizer."
    )
    batch_tokens: Int = Field(
        default=4096,
        ge=1,
        description="Tokens per optimizer step, at most, unless a single row has more.",
    )
    max_seq_len: Int | None = Field(
        default=None,
        ge=2,
        description="Longer rows are cut to this many tokens. null: finetune.max_tokens.",
    )
    epochs: Int | None = Field(
        default=None, ge=1, description="Passes over the dataset; or give steps."
    )
    steps: Int | None = Field(default=None, ge=1, description="Optimizer steps; or give epochs.")
    seed: Int = Field(
        default=0, ge=0, description="Seeds the adapter's start and the order of rows."
    )
    weight: Float = Field(
        default=1.0,
        gt=0,
        description="Share of the finetuning tokens, relative to other jobs of its priority.",
    )
    priority: Int = Field(
        default=0, description="Jobs of a higher priority go first as long as they have work."
    )
    init_adapter: Path | None = Field(
        default=None,
        description="PEFT folder to start from. null: a fresh adapter that changes nothing yet.",
    )
    resume: Bool = Field(
        default=True,
        description="Go on from the job's newest checkpoint in output_dir, if there is one.",
    )

    @property
    def slots(self) -> int:
        """Slots of the bank that it takes at once."""
        if not isinstance(self.method, ReinforcementConfig):
            return 1
        start = self.method.kl_coef > 0 and self.init_adapter is not None
        return 2 + self.method.steps_ahead + start

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            given = "neither" if self.epochs is None else "both"
            raise ValueError(f"{given} of epochs and steps is given; give exactly one")
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.init_adapter and self.peft.init != "default":
            raise ValueError(
                f"peft.init={self.peft.init} and init_adapter are given, and an adapter has one "
                "start; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _answers_alone(self) -> Self:
        if self.method.pairs and self.train_on == "all":
            raise ValueError(
                f"train_on: all is not for method {self.method.type}, which compares answers; "
                "leave it at completion"
            )
        return self


class FinetuneSection(Section):
    """Token-level finetuning."""

    max_tokens: Int = Field(
        default=1024,
        ge=2,
        description="Tokens whose activations are held on the device: a longest sequence, or two "
        "microbatches of half of it, of which one goes forward while the other goes backward.",
    )
    unit_tokens: Int = Field(
        default=256,
        ge=1,
        description="Tokens of a backward unit, which is one layer for one slice of so many "
        "tokens; must divide max_tokens.",
    )
    saved: Literal["auto", "all", "attention"] | tuple[str, ...] = Field(
        default="attention",
        description="Activations the forward keeps for the backward instead of recomputing, "
        "besides the layers' inputs: `attention` (attention's outputs alone), `all` (whatever "
        "spares work), `auto` (what spares most in the memory that is free), or a list of names; "
        "an empty list keeps least.",
    )
    idle_step_ms: Float = Field(
        default=100.0,
        gt=0,
        allow_inf_nan=True,
        description="Longest step while no request runs, ms: an arriving request waits for it. "
        ".inf: no limit.",
    )
    floor: Float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the device's time that finetuning gets even if requests are then "
        "late; 0: none.",
    )
    checkpoint_every: Int = Field(
        default=50,
        ge=0,
        description="Optimizer steps between checkpoints. 0: only at the end or on Ctrl-C.",
    )
    dropout: Bool = Field(
        default=False,
        description="Compile what jobs with peft.lora_dropout need, for such jobs that come later. "
        "For those of `jobs` it is compiled anyway.",
    )
    optimizers: tuple[OptimizerName, ...] = Field(
        default=("adamw",),
        description="Optimizers that jobs which come later may have; those of `jobs`, and adamw, "
        "are compiled anyway.",
    )
    jobs: tuple[FinetuneConfig, ...] = Field(default=(), description="Jobs, trained side by side.")

    @property
    def with_dropout(self) -> bool:
        """Whether a job may have dropout."""
        return self.dropout or any(job.peft.lora_dropout for job in self.jobs)

    @property
    def all_optimizers(self) -> tuple[str, ...]:
        """Those that a job may have, adamw first."""
        own = {*self.optimizers, *(job.optimizer.type for job in self.jobs)}
        return ("adamw", *sorted(own - {"adamw"}))

    @field_validator("saved", mode="before")
    @classmethod
    def _saved(cls, saved: Any) -> Any:
        if saved in ("auto", "all", "attention"):
            return saved
        if isinstance(saved, list | tuple) and all(isinstance(name, str) for name in saved):
            return tuple(saved)
        raise ValueError(
            f"got {saved!r}; must be `auto`, `all`, `attention` or a list of activation names"
        )

    @field_validator("unit_tokens")
    @classmethod
    def _divides(cls, unit_tokens: int, info: Any) -> int:
        max_tokens = info.data.get("max_tokens", unit_tokens)
        if max_tokens % unit_tokens:
            raise ValueError(
                f"got {unit_tokens}; must divide finetune.max_tokens, which is {max_tokens}"
            )
        return unit_tokens

    @field_validator("jobs")
    @classmethod
    def _jobs(cls, jobs: tuple[FinetuneConfig, ...], info: Any) -> tuple[FinetuneConfig, ...]:
        distinct(tuple(job.name for job in jobs), "name: ")
        max_tokens = info.data.get("max_tokens", math.inf)
        for index, job in enumerate(jobs):
            if job.max_seq_len is not None and job.max_seq_len > max_tokens:
                raise ValueError(
                    f"job {index} has max_seq_len {job.max_seq_len}, too long for a microbatch; "
                    f"lower it or raise finetune.max_tokens, which is {max_tokens}"
                )
        if max_tokens == math.inf:
            return jobs
        return tuple(
            job.model_copy(update={"max_seq_len": job.max_seq_len or max_tokens}) for job in jobs
        )
