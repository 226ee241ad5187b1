"""What a grader is told by: OpenAI's names, in YAML and over HTTP alike.

A grader makes a number, the reward, out of a text that a model wrote and the row of the dataset
that it was written for. Here is only its form; what templates, formulas and programs say is checked
where they are used, in `flexllm_jax.graders`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from flexllm_jax.config.explain import explain
from flexllm_jax.config.fields import Bool, ConfigError, Float, Int, Section
from flexllm_jax.config.sections.grader_models import (
    NAME,
    THRESHOLD,
    GraderForm,
    GraderName,
    LabelModelConfig,
    ScoreModelConfig,
    Template,
)

MOST_GRADERS = 32  # in a multi grader
MOST_SOURCE_BYTES = 256 * 1024
_MOST_FLOORS = 16
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class StringCheckConfig(GraderForm):
    """1 where two texts agree, else 0."""

    type: Literal["string_check"] = Field(
        default="string_check", description="How to grade: two texts agree, or not."
    )
    name: GraderName = Field(default="", description=NAME)
    input: Template = Field(description="Text to check, a template: {{ sample.output_text }}.")
    reference: Template = Field(description="Text to check against, a template: {{ item.x }}.")
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        description="Of string_check: the input is the reference (eq) or is not (ne), contains it "
        "(like), contains it whatever the case (ilike)."
    )


class TextSimilarityConfig(GraderForm):
    """How similar two texts are, from 0 to 1."""

    type: Literal["text_similarity"] = Field(
        default="text_similarity", description="How to grade: by how similar two texts are."
    )
    name: GraderName = Field(default="", description=NAME)
    input: Template = Field(description="Text to compare, a template: {{ sample.output_text }}.")
    reference: Template = Field(description="Text to compare with, a template: {{ item.x }}.")
    evaluation_metric: str = Field(
        max_length=100, description="Of text_similarity: fuzzy_match, bleu, gleu, rouge_1 …"
    )
    pass_threshold: Float | None = Field(default=None, description=THRESHOLD)


class PythonConfig(GraderForm):
    """A function of a client's own."""

    type: Literal["python"] = Field(
        default="python", description="How to grade: by a program, if `graders.python` allows it."
    )
    name: GraderName = Field(default="", description=NAME)
    source: str = Field(
        max_length=MOST_SOURCE_BYTES, description="A module with `def grade(sample, item)`."
    )
    image_tag: str | None = Field(
        default=None, max_length=100, description="OpenAI's; packages are those of the server."
    )


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


class MultiConfig(GraderForm):
    """A formula of what others say."""

    type: Literal["multi"] = Field(
        default="multi", description="How to grade: by a formula of what other graders say."
    )
    name: GraderName = Field(default="", description=NAME)
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


def asked_models(
    grader: dict[str, Any], field: str = "grader"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts of a grader, as it is told, that ask a model, each with its field: it has the
    model's name as `model`."""
    if isinstance(grader.get("model"), str):
        yield f"{field}.model", grader
    parts = grader.get("graders")
    named = parts.items() if isinstance(parts, dict) else enumerate(parts or ())
    for name, part in named:
        if isinstance(part, dict):
            yield from asked_models(part, f"{field}.graders.{name}")


class GradersSection(Section):
    """What graders may take of the machine."""

    python: Bool = Field(
        default=False,
        description="Whether clients may grade with programs of their own, which run confined in "
        "processes of their own; needs Linux with Landlock and seccomp.",
    )
    timeout_s: Float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Seconds that a program, or a similarity of texts, has for a sample.",
    )
    memory_mb: Int = Field(
        default=2048, ge=256, description="Address space of a process of theirs, MiB."
    )
    processes: Int = Field(
        default=2,
        ge=1,
        le=256,
        description="Their processes at work at once, of all graders of a server together.",
    )


class _Root(Section):
    grader: GraderConfig


def nested_deeper(value: Any, most: int) -> bool:
    """Whether plain values have more floors than `most`. What is deep ends recursive readers."""
    floor = [value]
    for _ in range(most + 1):
        inside = [each for each in floor if isinstance(each, (list, Mapping))]
        floor = [
            v for each in inside for v in (each.values() if isinstance(each, Mapping) else each)
        ]
        if not floor:
            return False
    return True


def read_grader(tree: Any) -> GraderConfig:
    """The grader that plain values tell of. Raises ConfigError: one line, which names the field as
    `grader.…`."""
    if nested_deeper(tree, _MOST_FLOORS):
        raise ConfigError(f"grader: it is nested deeper than {_MOST_FLOORS}; make it flatter")
    try:
        return _Root.model_validate({"grader": tree}).grader
    except ValidationError as error:
        raise ConfigError(explain(error, _Root)) from None
