"""Grading by a client's program, confined in processes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexllm_jax.config.sections.graders import GradersSection, PythonConfig
from flexllm_jax.errors import UserError
from flexllm_jax.graders.grade import Grade, Sample, SampleError
from flexllm_jax.graders.process import Processes


class Python:
    """Runs the program on every sample."""

    reads: frozenset[str] = frozenset()

    def __init__(self, config: PythonConfig, settings: GradersSection, field: str):
        if not settings.python:
            raise UserError(
                f"{field}.type: python graders are off; whoever runs this server turns them on "
                "with graders.python: true"
            )
        self._field = field
        self._processes = Processes(config.source, settings, keep=False)
        self._processes.check(field)

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample."""
        return self._processes.grade([_request(sample) for sample in samples], self._field)


def _request(sample: Sample) -> dict[str, Any]:
    """What a program sees of a sample; OpenAI's names."""
    told = sample.variables()
    try:
        told["output_json"] = sample.output_json
    except SampleError:
        told["output_json"] = None
    return {"sample": {"output_tools": None, **told}, "item": sample.item}
