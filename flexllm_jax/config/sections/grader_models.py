"""What all graders have, and those that ask a model: OpenAI's score_model and label_model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from flexllm_jax.config.fields import Float, Int, Section, distinct

_MOST_FIELDS = 32
Template = Annotated[str, Field(max_length=65_536)]
GraderName = Annotated[str, Field(max_length=100)]
NAME = "What it is called in answers."
THRESHOLD = "OpenAI's mark from which its evals pass; no reward depends on it."


class GraderForm(Section):
    """A form that clients fill in."""

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and len(given) > _MOST_FIELDS:  # pydantic would tell each
            raise ValueError(
                f"it has {len(given)} fields; known here: {', '.join(cls.model_fields)}"
            )
        return given


def _text_of(content: Any) -> Any:
    """OpenAI's contents, which are texts or parts that have texts."""
    if isinstance(content, list):
        return "".join(map(_text_of_part, content))
    return _text_of_part(content)


def _text_of_part(part: Any) -> str:
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind not in ("input_text", "output_text"):
            raise ValueError(
                f"a part of type {str(kind)[:40]!r}; graders read input_text and output_text"
            )
        part = part.get("text")
    if not isinstance(part, str):
        raise ValueError("it is neither text nor {type: input_text, text: ...}")
    return part


class GraderMessage(GraderForm):
    """A message to a model that grades."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Whose it is.")
    content: Annotated[Template, BeforeValidator(_text_of)] = Field(
        description="What it says, a template."
    )
    type: Literal["message"] | None = Field(default=None, description="OpenAI's; has no effect.")


_Messages = Annotated[tuple[GraderMessage, ...], Field(min_length=1, max_length=64, fail_fast=True)]


class GraderSampling(GraderForm):
    """How a model that grades is sampled."""

    max_completions_tokens: Int | None = Field(
        default=None, ge=1, description="Most tokens of its answer. null: 1,024."
    )
    temperature: Float | None = Field(default=None, ge=0, le=2, description="null: 0, greedy.")
    top_p: Float | None = Field(default=None, gt=0, le=1, description="null: 1.")
    seed: Int | None = Field(default=None, ge=-(2**63), lt=2**63, description="Of its samples.")
    reasoning_effort: str | None = Field(
        default=None, max_length=32, description="For chat templates that read it."
    )


class ScoreModelConfig(GraderForm):
    """The number that a model says."""

    type: Literal["score_model"] = Field(
        default="score_model", description="How to grade: by the number that a model says."
    )
    name: GraderName = Field(default="", description=NAME)
    model: str = Field(max_length=256, description="A model or an adapter of this server.")
    input: _Messages = Field(description="What it is asked.")
    range: tuple[Float, Float] = Field(
        default=(0.0, 1.0), description="Least and most that it may say."
    )
    sampling_params: GraderSampling = Field(
        default_factory=GraderSampling, description="How it is sampled."
    )
    pass_threshold: Float | None = Field(default=None, description=THRESHOLD)

    @field_validator("range")
    @classmethod
    def _rises(cls, given: tuple[float, float]) -> tuple[float, float]:
        if not given[0] < given[1]:
            raise ValueError(f"got {list(given)}; the first must be less than the second")
        return given


class LabelModelConfig(GraderForm):
    """1 where a model gives one of the labels that pass, else 0."""

    type: Literal["label_model"] = Field(
        default="label_model", description="How to grade: by the label that a model gives."
    )
    name: GraderName = Field(default="", description=NAME)
    model: str = Field(max_length=256, description="A model or an adapter of this server.")
    input: _Messages = Field(description="What it is asked.")
    labels: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        min_length=1,
        max_length=256,
        fail_fast=True,
        description="Of label_model: what it may answer.",
    )
    passing_labels: tuple[str, ...] = Field(
        min_length=1,
        max_length=256,
        fail_fast=True,
        description="Of label_model: those whose reward is 1.",
    )
    sampling_params: GraderSampling = Field(
        default_factory=GraderSampling, description="How it is sampled."
    )

    @model_validator(mode="after")
    def _labels_agree(self) -> Self:
        distinct(self.labels, "labels: ")
        for label in self.passing_labels:
            if label not in self.labels:
                raise ValueError(
                    f"passing_labels: {label[:80]!r} is not one of labels; add it there, or drop it"
                )
        return self
