"""Grading by what a model says: a number (score_model), or one of some labels (label_model).

The model's answer is held to JSON that has the number or the label, and the number to its range: it
can say nothing else. Of the number it first writes down steps, as OpenAI's does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flexllm_jax.config.sections.grader_models import LabelModelConfig, ScoreModelConfig
from flexllm_jax.errors import UserError
from flexllm_jax.graders.grade import Grade, GradingError, Sample, Usage, no_grade
from flexllm_jax.graders.template import Template

_MOST_TOKENS = 1024
_AT_ONCE = 32
_STEP_TEXT = {"type": "string", "maxLength": 1000}
_STEPS = {
    "type": "array",
    "maxItems": 8,
    "items": {
        "type": "object",
        "properties": {"description": _STEP_TEXT, "conclusion": _STEP_TEXT},
        "required": ["description", "conclusion"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Args:
        model: a model or an adapter.
        messages: of a chat, each with a role and a content.
        answer: the JSON schema of its answer.
        field: what `model` is called in messages.
    """

    model: str
    messages: Sequence[Mapping[str, str]]
    answer: Mapping[str, Any]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    reasoning_effort: str | None
    field: str


@dataclass(frozen=True)
class Completion:
    """What it answered. `whole`: it came to its end within `max_tokens`."""

    text: str
    whole: bool
    usage: Usage


# Asks a model. Blocks; many threads may call it at once. Raises GradingError of the kind
# model_grader_server_error where there is no answer.
Complete = Callable[[Question], Completion]


class Model:
    """Asks a model about each sample, about several at once.

    Args:
        answer: the JSON schema of what it says.
        reward: what the JSON it said is worth; ValueError, saying what it is, where it is none.
    """

    def __init__(
        self,
        config: ScoreModelConfig | LabelModelConfig,
        complete: Complete | None,
        answer: Mapping[str, Any],
        reward: Callable[[Any], float],
        field: str,
    ):
        if complete is None:
            raise UserError(
                f"{field}.type: {config.type} asks a model, and there is none to ask here; use "
                "another type of grader"
            )
        self._config, self._complete, self._field = config, complete, field
        self._answer, self._reward = answer, reward
        self._messages = [
            (message.role, Template(message.content, f"{field}.input.{index}.content"))
            for index, message in enumerate(config.input)
        ]
        self.reads = frozenset[str]().union(*(template.reads for _, template in self._messages))

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample."""
        if not samples:
            return []
        with ThreadPoolExecutor(min(len(samples), _AT_ONCE)) as threads:
            return list(threads.map(self._grade, samples))

    def _grade(self, sample: Sample) -> Grade:
        begin, usage = time.perf_counter(), {}
        try:
            completion = self._complete(self._question(sample))
            usage = {self._config.model: completion.usage}
            reward = self._read(completion)
        except GradingError as error:
            return no_grade(error, time.perf_counter() - begin, usage=usage)
        return Grade(reward, seconds=time.perf_counter() - begin, usage=usage)

    def _question(self, sample: Sample) -> Question:
        sampling = self._config.sampling_params
        return Question(
            self._config.model,
            [{"role": role, "content": text.render(sample)} for role, text in self._messages],
            self._answer,
            sampling.max_completions_tokens or _MOST_TOKENS,
            0.0 if sampling.temperature is None else sampling.temperature,
            1.0 if sampling.top_p is None else sampling.top_p,
            sampling.seed,
            sampling.reasoning_effort,
            f"{self._field}.model",
        )

    def _read(self, completion: Completion) -> float:
        if not completion.whole:
            reason = (
                f"its answer is cut off after {completion.usage.completion_tokens} tokens; raise "
                "sampling_params.max_completions_tokens"
            )
            raise self._unread(reason)
        try:
            said = json.loads(completion.text)
        except (ValueError, RecursionError):
            raise self._unread(f"it said {completion.text[:80]!r}, which is not JSON") from None
        try:
            return self._reward(said)
        except ValueError as error:
            reason = f"it said {completion.text[:80]!r}: {error}"
            raise self._unread(reason) from None

    def _unread(self, reason: str) -> GradingError:
        return GradingError("model_grader_parse_error", f"{self._field}.model: {reason}")


def score_model(config: ScoreModelConfig, complete: Complete | None, field: str) -> Model:
    """A grader by the number that a model says."""
    low, high = config.range
    answer = {
        "type": "object",
        "properties": {
            "steps": _STEPS,
            "result": {"type": "number", "minimum": low, "maximum": high},
        },
        "required": ["steps", "result"],
        "additionalProperties": False,
    }

    def reward(said: Any) -> float:
        result = said.get("result") if isinstance(said, dict) else None
        if isinstance(result, bool) or not isinstance(result, (int, float)):
            raise ValueError("there is no number `result`")
        if not (math.isfinite(result) and low <= result <= high):
            raise ValueError(f"result is {result}, outside of range [{low:g}, {high:g}]")
        return float(result)

    return Model(config, complete, answer, reward, field)


def label_model(config: LabelModelConfig, complete: Complete | None, field: str) -> Model:
    """A grader by the label that a model gives."""
    answer = {
        "type": "object",
        "properties": {"label": {"type": "string", "enum": list(config.labels)}},
        "required": ["label"],
        "additionalProperties": False,
    }

    def reward(said: Any) -> float:
        label = said.get("label") if isinstance(said, dict) else None
        if not isinstance(label, str) or label not in config.labels:
            known = ", ".join(config.labels)
            raise ValueError(f"label is none of {known[:300]}")
        return float(label in config.passing_labels)

    return Model(config, complete, answer, reward, field)
