"""Whether two texts agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flexllm_jax.config.sections.graders import StringCheckConfig
from flexllm_jax.graders.grade import Grade, Sample, grade_each
from flexllm_jax.graders.template import Template

_OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


class StringCheck:
    """1 where they do, else 0."""

    def __init__(self, config: StringCheckConfig, field: str):
        self._input = Template(config.input, f"{field}.input")
        self._reference = Template(config.reference, f"{field}.reference")
        self._agree = _OPERATIONS[config.operation]
        self.reads = self._input.reads | self._reference.reads

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample."""
        return grade_each(samples, self._reward)

    def _reward(self, sample: Sample) -> float:
        return float(self._agree(self._input.render(sample), self._reference.render(sample)))
