"""What a grader is told by: OpenAI's names, in YAML and over HTTP alike.

A grader makes a number, the reward, out of a text that a model wrote and the row of the dataset
that it was written for. Here is only its form; what templates, formulas and programs say is checked
where they are used, in `flexllm_jax.graders`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from flexllm_jax.config.explain import explain
from flexllm_jax.config.fields import ConfigError, Float, Int, Section, distinct

MOST_GRADERS = 32  # in a multi grader
_MOST_FIELDS = 32
MOST_SOURCE_BYTES = 256 * 1024
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)

Template = Annotated[str, Field(max_length=65_536)]
GraderName = Annotated[str, Field(max_length=100)]
_NAME = "What it is called in answers."
_THRESHOLD = "OpenAI's mark from which its evals pass; no reward depends on it."


class _GraderSection(Section):
    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and len(given) > _MOST_FIELDS:  # pydantic would tell each
            raise ValueError(
                f"it has {len(given)} fields; known here: {', '.join(cls.model_fields)}"
            )
        return given


class StringCheckConfig(_GraderSection):
    """1 where two texts agree, else 0."""

    type: Literal["string_check"] = Field(
        default="string_check", description="How to grade: two texts agree, or not."
    )
    name: GraderName = Field(default="", description=_NAME)
    input: Template = Field(description="Text to check, a template: {{ sample.output_text }}.")
    reference: Template = Field(description="Text to check against, a template: {{ item.x }}.")
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        description="Of string_check: the input is the reference (eq) or is not (ne), contains it "
        "(like), contains it whatever the case (ilike)."
    )


class TextSimilarityConfig(_GraderSection):
    """How similar two texts are, from 0 to 1."""

    type: Literal["text_similarity"] = Field(
        default="text_similarity", description="How to grade: by how similar two texts are."
    )
    name: GraderName = Field(default="", description=_NAME)
    input: Template = Field(description="Text to compare, a template: {{ sample.output_text }}.")
    reference: Template = Field(description="Text to compare with, a template: {{ item.x }}.")
    evaluation_metric: str = Field(
        max_length=100, description="Of text_similarity: fuzzy_match, bleu, gleu, rouge_1 …"
    )
    pass_threshold: Float | None = Field(default=None, description=_THRESHOLD)


class PythonConfig(_GraderSection):
    """A function of a client's own."""

    type: Literal["python"] = Field(
        default="python", description="How to grade: by a program, if `graders.python` allows it."
    )
    name: GraderName = Field(default="", description=_NAME)
    source: str = Field(
        max_length=MOST_SOURCE_BYTES, description="A module with `def grade(sample, item)`."
    )
    image_tag: str | None = Field(
        default=None, max_length=100, description="OpenAI's; packages are those of the server."
    )


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


class GraderMessage(_GraderSection):
    """A message to a model that grades."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Whose it is.")
    content: Annotated[Template, BeforeValidator(_text_of)] = Field(
        description="What it says, a template."
    )
    type: Literal["message"] | None = Field(default=None, description="OpenAI's; has no effect.")


_Messages = Annotated[tuple[GraderMessage, ...], Field(min_length=1, max_length=64, fail_fast=True)]


class GraderSampling(_GraderSection):
    """How a model that grades is sampled."""

    max_completions_tokens: Int | None = Field(
        default=None, ge=1, description="Most tokens of its answer. null: 1,024."
    )
    temperature: Float | None = Field(default=None, ge=0, le=2, description="null: 0, greedy.")
    top_p: Float | None = Field(default=None, gt=0, le=1, description="null: 1.")
    seed: Int | None = Field(default=None, description="Of its samples.")
    reasoning_effort: str | None = Field(
        default=None, max_length=32, description="For chat templates that read it."
    )


class ScoreModelConfig(_GraderSection):
    """The number that a model says."""

    type: Literal["score_model"] = Field(
        default="score_model", description="How to grade: by the number that a model says."
    )
    name: GraderName = Field(default="", description=_NAME)
    model: str = Field(max_length=256, description="A model or an adapter of this server.")
    input: _Messages = Field(description="What it is asked.")
    range: tuple[Float, Float] = Field(
        default=(0.0, 1.0), description="Least and most that it may say."
    )
    sampling_params: GraderSampling = Field(
        default_factory=GraderSampling, description="How it is sampled."
    )
    pass_threshold: Float | None = Field(default=None, description=_THRESHOLD)

    @field_validator("range")
    @classmethod
    def _rises(cls, given: tuple[float, float]) -> tuple[float, float]:
        if not given[0] < given[1]:
            raise ValueError(f"got {list(given)}; the first must be less than the second")
        return given


class LabelModelConfig(_GraderSection):
    """1 where a model gives one of the labels that pass, else 0."""

    type: Literal["label_model"] = Field(
        default="label_model", description="How to grade: by the label that a model gives."
    )
    name: GraderName = Field(default="", description=_NAME)
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


PartConfig = Annotated[
    StringCheckConfig | TextSimilarityConfig | PythonConfig | ScoreModelConfig | LabelModelConfig,
    Field(discriminator="type"),
]


def _by_name(graders: Any) -> Any:
    """OpenAI's guide has an object; its reference an array, its SDK one grader."""
    if isinstance(graders, Mapping) and isinstance(graders.get("type"), str):
        graders = [graders]
    if isinstance(graders, (list, Mapping)) and len(graders) > MOST_GRADERS:
        raise ValueError(f"there are {len(graders)}; at most {MOST_GRADERS} can be here")
    if not isinstance(graders, list):
        return graders
    named: dict[str, Any] = {}
    for index, grader in enumerate(graders):
        name = grader.get("name") if isinstance(grader, Mapping) else None
        if not isinstance(name, str) or name in named:
            raise ValueError(f"{index}: each of an array needs a `name` of its own; add one")
        named[name] = grader
    return named


class MultiConfig(_GraderSection):
    """A formula of what others say."""

    type: Literal["multi"] = Field(
        default="multi", description="How to grade: by a formula of what other graders say."
    )
    name: GraderName = Field(default="", description=_NAME)
    graders: Annotated[dict[str, PartConfig], BeforeValidator(_by_name)] = Field(
        min_length=1, description="Of multi: the others, by name."
    )
    calculate_output: str = Field(
        max_length=4096, description="Of multi: the formula, such as 0.5 * a + 0.5 * b."
    )

    @field_validator("graders")
    @classmethod
    def _variables(cls, graders: dict[str, Any]) -> dict[str, Any]:
        for name in graders:
            if not _VARIABLE.fullmatch(name) or len(name) > 64:
                raise ValueError(
                    f"{name[:80]!r} cannot stand in a formula; name it with up to 64 letters, "
                    "digits and _ (in an object, by its key)"
                )
        return graders


GraderConfig = Annotated[
    StringCheckConfig
    | TextSimilarityConfig
    | PythonConfig
    | ScoreModelConfig
    | LabelModelConfig
    | MultiConfig,
    Field(discriminator="type"),
]


class _Root(Section):
    grader: GraderConfig


def read_grader(tree: Any) -> GraderConfig:
    """The grader that plain values tell of. Raises ConfigError: one line, which names the field as
    `grader.…`."""
    try:
        return _Root.model_validate({"grader": tree}).grader
    except ValidationError as error:
        raise ConfigError(explain(error, _Root)) from None
