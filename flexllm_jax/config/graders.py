"""What a grader is told by: OpenAI's names, in YAML and over HTTP alike.

A grader makes a number, the reward, out of a text that a model wrote and the row of the dataset
that it was written for. Here is only its form; what texts, formulas and programs say is checked
where they are used, in `flexllm_jax.graders`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from flexllm_jax.config.explain import explain
from flexllm_jax.config.fields import ConfigError, Section

Template = Annotated[str, Field(max_length=65_536)]
GraderName = Annotated[str, Field(max_length=100)]


class StringCheckConfig(Section):
    """1 where two texts agree, else 0."""

    type: Literal["string_check"] = Field(
        default="string_check", description="How to grade: two texts agree, or not."
    )
    name: GraderName = Field(default="", description="What it is called in answers.")
    input: Template = Field(description="Text to check, a template: {{ sample.output_text }}.")
    reference: Template = Field(description="Text to check against, a template: {{ item.x }}.")
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        description="Of string_check: the input is the reference (eq) or is not (ne), contains it "
        "(like), contains it whatever the case (ilike)."
    )


GraderConfig = StringCheckConfig


class _Root(Section):
    grader: GraderConfig


def read_grader(tree: Any) -> GraderConfig:
    """The grader that plain values tell of. Raises ConfigError: one line, which names the field as
    `grader.…`."""
    try:
        return _Root.model_validate({"grader": tree}).grader
    except ValidationError as error:
        raise ConfigError(explain(error, _Root)) from None
