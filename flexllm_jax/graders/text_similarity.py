"""How similar two texts are, in the measures of OpenAI's that need no model (`measures`)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from flexllm_jax.config.sections.graders import GradersSection, TextSimilarityConfig
from flexllm_jax.errors import UserError
from flexllm_jax.graders import measures
from flexllm_jax.graders.grade import Grade, GradingError, Sample
from flexllm_jax.graders.process import Processes
from flexllm_jax.graders.template import Template

MOST_CHARACTERS = 2**17
_PACKAGES = ("rapidfuzz", "sacrebleu", "rouge_score", "nltk")  # the extra `graders`
_NOT_HERE = {
    "cosine": "it needs a model of embeddings, which this server has not",
    "meteor": "it needs WordNet, which is not a part of this package",
}


class TextSimilarity:
    """Compares the input with the reference."""

    def __init__(self, config: TextSimilarityConfig, settings: GradersSection, field: str):
        metric = config.evaluation_metric
        if metric not in measures.MEASURES:
            reason = f", as {_NOT_HERE[metric]}" if metric in _NOT_HERE else ""
            known = ", ".join(measures.MEASURES)
            raise UserError(
                f"{field}.evaluation_metric: {metric!r} is not here{reason}; use one of {known}"
            )
        if missing := [package for package in _PACKAGES if not _is_there(package)]:
            raise UserError(
                f"{field}.evaluation_metric: {metric} needs {missing[0]}: "
                "pip install 'flexllm_jax[graders]'"
            )
        self._input = Template(config.input, f"{field}.input")
        self._reference = Template(config.reference, f"{field}.reference")
        self.reads = self._input.reads | self._reference.reads
        self._metric, self._field = metric, field
        self._processes = _processes(settings.timeout_s, settings.memory_mb, settings.processes)

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample."""
        return self._processes.grade([self._request(sample) for sample in samples], self._field)

    def _request(self, sample: Sample) -> dict[str, Any] | GradingError:
        try:
            texts = {
                "metric": self._metric,
                "input": _text(self._input, sample),
                "reference": _text(self._reference, sample),
            }
        except GradingError as error:
            return error
        return {"sample": texts, "item": None}


@lru_cache
def _processes(timeout_s: float, memory_mb: int, processes: int) -> Processes:
    """Those that all graders here share: libraries take a second to load."""
    settings = GradersSection(timeout_s=timeout_s, memory_mb=memory_mb, processes=processes)
    return Processes(inspect.getsource(measures), settings, keep=True)


def _text(template: Template, sample: Sample) -> str:
    text = template.render(sample)
    if len(text) > MOST_CHARACTERS:
        reason = f"has {len(text):,} characters; at most {MOST_CHARACTERS:,} are compared"
        raise GradingError("other_error", f"{template.field}: {reason}")
    return text


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # it was imported, and is not a module
        return False
