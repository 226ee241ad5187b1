"""Fields of `scheduler` and `compile`: what goes into a step, and what is compiled for it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from flexllm_jax.config.fields import Float, Int, Name, Section
from scheduler.drafts import MOST
from scheduler.policies import POLICIES


class SloSection(Section):
    """The latency objective of inference, which finetuning must not break."""

    tpot_ms: Float = Field(default=200.0, gt=0, description="Time per output token, ms.")
    ttft_ms: Float = Field(
        default=5000.0, gt=0, description="Queueing plus time to the first token, ms."
    )
    weight: Float = Field(
        default=1.0, gt=0, description="What meeting it is worth, relative to other classes."
    )


class SchedulerSection(Section):
    """What goes into a step."""

    policy: Literal[tuple(POLICIES)] = Field(  # type: ignore[valid-type]
        default="coserving",
        description=f"How inference and finetuning share the device: {', '.join(POLICIES)}.",
    )
    latency: Literal["profile", "roofline"] = Field(
        default="profile",
        description="Where the prediction of a step's time starts from: steps timed at start-up, "
        "or the device's data sheet. Either is corrected while serving.",
    )
    max_tokens_per_step: Int | None = Field(
        default=None,
        ge=1,
        description="Token slots of the largest step: decode, prefill and finetuning together. "
        "null: the last of compile.token_buckets, or 512 (on a CPU 256), or max_sequences if that "
        "is more.",
    )
    max_sequences: Int = Field(default=32, ge=1, description="Requests running at once.")
    num_speculative_tokens: Int = Field(
        default=0,
        ge=0,
        le=MOST,
        description="Most tokens tried at once that prompt lookup proposes (speculative decoding), "
        "where a request does not say. 0: none.",
    )
    slo: SloSection = Field(
        default_factory=SloSection, description="Latency objective of the class `standard`."
    )
    slo_classes: dict[Name, SloSection] = Field(
        default={
            "interactive": SloSection(tpot_ms=100.0, ttft_ms=1000.0, weight=2.0),
            "batch": SloSection(tpot_ms=1000.0, ttft_ms=60_000.0, weight=0.5),
        },
        description="Other classes of requests, by name, each with tpot_ms, ttft_ms and weight.",
    )

    @field_validator("slo_classes")
    @classmethod
    def _standard_is_slo(cls, classes: dict[str, SloSection]) -> dict[str, SloSection]:
        if "standard" in classes:
            raise ValueError("`standard` is what scheduler.slo describes; set its fields there")
        return classes

    @property
    def least_urgent(self) -> str:
        """The class of requests that may wait longest."""
        classes = {"standard": self.slo, **self.slo_classes}
        return max(classes, key=lambda name: classes[name].ttft_ms)

    @model_validator(mode="after")
    def _every_sequence_decodes(self) -> Self:
        if self.max_tokens_per_step and self.max_sequences > self.max_tokens_per_step:
            raise ValueError(
                f"max_sequences is {self.max_sequences} but max_tokens_per_step only "
                f"{self.max_tokens_per_step}; every running request needs a token slot"
            )
        return self


class CompileSection(Section):
    """Ahead-of-time compilation."""

    cache_dir: Path | None = Field(
        default=Path("~/.cache/flexllm_jax"),
        validate_default=True,
        description="JAX's persistent compilation cache; ~ is the home folder. null: none.",
    )
    token_buckets: tuple[Annotated[Int, Field(ge=1)], ...] | None = Field(
        default=None,
        min_length=1,
        description="Token slots of the step programs, increasing, the last equal to "
        "scheduler.max_tokens_per_step. null: a few from 8 on, fewer on a CPU.",
    )

    @field_validator("cache_dir")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return path if path is None else path.expanduser()

    @field_validator("token_buckets")
    @classmethod
    def _increasing(cls, buckets: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if buckets is not None and any(b >= c for b, c in pairwise(buckets)):
            raise ValueError(f"got {list(buckets)}; must be strictly increasing")
        return buckets
