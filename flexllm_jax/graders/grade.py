"""What is graded, and what a grader says of it.

A grader is asked from a worker thread and may take its time: never on an event loop, never in an
engine's step. It says something of every sample, in their order, whatever happens to one of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

# What can go wrong, as OpenAI calls it.
ErrorKind = Literal[
    "formula_parse_error",
    "sample_parse_error",
    "truncated_observation_error",
    "unresponsive_reward_error",
    "invalid_variable_error",
    "other_error",
    "python_grader_server_error",
    "python_grader_runtime_error",
    "model_grader_server_error",
    "model_grader_refusal_error",
    "model_grader_parse_error",
]


class GradingError(Exception):
    """There is no reward for a sample; the message is one line."""

    def __init__(self, kind: ErrorKind, message: str):
        super().__init__(message)
        self.kind: ErrorKind = kind


class SampleError(GradingError):
    """A sample is not what the grader reads, such as JSON: that is the sample's fault, and its
    reward is 0."""

    def __init__(self, message: str):
        super().__init__("sample_parse_error", message)


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote, and the row of the dataset that it was written for."""

    text: str
    item: Mapping[str, Any] = field(default_factory=dict)
    output_tools: Sequence[Any] | None = None  # its calls of tools, as chat completions have them

    @cached_property
    def output_json(self) -> Any:
        """The text as JSON. Raises SampleError if it is none."""
        try:
            return json.loads(self.text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise SampleError(f"sample.output_json: the text is not JSON ({reason})") from None

    def variables(self) -> dict[str, Any]:
        """What is known as `sample`, besides `output_json`."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.output_tools is not None:
            message["tool_calls"] = list(self.output_tools)
        named: dict[str, Any] = {
            "output_text": self.text,
            "choices": [{"index": 0, "message": message}],
        }
        if self.output_tools is not None:
            named["output_tools"] = list(self.output_tools)
        return named


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


@dataclass(frozen=True)
class Usage:
    """Tokens that a model took for grading."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True)
class Grade:
    """What a grader says of a sample.

    Args:
        reward: finite, or NaN where there is none.
        error: why there is none, in one line.
        scores: of each part of it, by name; NaN where there is none.
        seconds: that it took.
        flags: what went wrong, and what there is to say of it. A sample that is not what the
            grader reads has one too, though it has a reward, 0.
        usage: tokens, by model.
    """

    reward: float
    error: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    flags: Mapping[ErrorKind, str] = field(default_factory=dict)
    usage: Mapping[str, Usage] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether there is no reward."""
        return math.isnan(self.reward)


class Grader(Protocol):
    """Makes rewards.

    Attributes:
        reads: the fields of a row that it needs, as far as that is known beforehand.
    """

    reads: frozenset[str]

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample. Blocks; many threads may call it at once."""
        ...


def no_grade(error: GradingError, seconds: float, **known: Any) -> Grade:
    """What is said of a sample that could not be graded."""
    flags: dict[ErrorKind, str] = {error.kind: str(error)}
    if isinstance(error, SampleError):
        return Grade(0.0, None, seconds=seconds, flags=flags, **known)
    return Grade(math.nan, str(error), seconds=seconds, flags=flags, **known)


def grade_each(samples: Sequence[Sample], reward: Callable[[Sample], float]) -> list[Grade]:
    """A grade for each sample out of a function of one, which may raise GradingError."""
    grades = []
    for sample in samples:
        begin = time.perf_counter()
        try:
            grade = Grade(reward(sample), seconds=time.perf_counter() - begin)
        except GradingError as error:
            grade = no_grade(error, time.perf_counter() - begin)
        grades.append(grade)
    return grades
