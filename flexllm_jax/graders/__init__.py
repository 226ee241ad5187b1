"""Graders: a reward for a text that a model wrote.

`make_grader` refuses, in one line, what cannot be used. What goes wrong with one sample is told in
its grade. Nothing here knows an engine or a server: a model is a function that the caller hands in.
"""

from __future__ import annotations

from flexllm_jax.config.sections.graders import (
    GraderConfig,
    GradersSection,
    LabelModelConfig,
    MultiConfig,
    PythonConfig,
    ScoreModelConfig,
    StringCheckConfig,
    TextSimilarityConfig,
)
from flexllm_jax.graders.grade import Grade, Grader, GradingError, Sample, SampleError, Usage
from flexllm_jax.graders.model import Complete, Completion, Question, label_model, score_model
from flexllm_jax.graders.multi import Multi
from flexllm_jax.graders.python import Python
from flexllm_jax.graders.string_check import StringCheck
from flexllm_jax.graders.text_similarity import TextSimilarity

__all__ = [
    "Complete",
    "Completion",
    "Grade",
    "Grader",
    "GradingError",
    "Question",
    "Sample",
    "SampleError",
    "Usage",
    "make_grader",
]


def make_grader(
    config: GraderConfig,
    complete: Complete | None = None,
    settings: GradersSection | None = None,
    *,
    field: str = "grader",
) -> Grader:
    """The grader that `config` tells of.

    Args:
        complete: asks a model; None: there is none to ask.
        settings: what graders may take; by default no programs are run.
        field: what the grader is called in messages.

    Raises:
        UserError: it cannot be used; the message is one line.
    """
    settings = settings or GradersSection()
    match config:
        case StringCheckConfig():
            return StringCheck(config, field)
        case TextSimilarityConfig():
            return TextSimilarity(config, settings, field)
        case PythonConfig():
            return Python(config, settings, field)
        case ScoreModelConfig():
            return score_model(config, complete, field)
        case LabelModelConfig():
            return label_model(config, complete, field)
        case MultiConfig():
            parts = {
                name: make_grader(part, complete, settings, field=f"{field}.graders.{name}")
                for name, part in config.graders.items()
            }
            return Multi(parts, config.calculate_output, field)
