"""One reward out of several: a formula of what other graders say."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from flexllm_jax.graders.formula import Formula
from flexllm_jax.graders.grade import ErrorKind, Grade, Grader, GradingError, Sample, Usage


class Multi:
    """Asks the others side by side. A sample has no reward where one that the formula reads has
    none."""

    def __init__(self, graders: Mapping[str, Grader], formula: str, field: str):
        self._graders = graders
        self._formula = Formula(formula, frozenset(graders), f"{field}.calculate_output")
        self.reads = frozenset[str]().union(*(grader.reads for grader in graders.values()))

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample."""
        with ThreadPoolExecutor(len(self._graders)) as threads:
            told = threads.map(lambda grader: grader.grade(samples), self._graders.values())
            by_sample = zip(*told, strict=True)
            return [self._join(dict(zip(self._graders, parts, strict=True))) for parts in by_sample]

    def _join(self, parts: dict[str, Grade]) -> Grade:
        scores = {name: part.reward for name, part in parts.items()}
        flags: dict[ErrorKind, str] = {}
        usage: defaultdict[str, Usage] = defaultdict(Usage)
        for part in parts.values():
            flags |= part.flags
            for model, tokens in part.usage.items():
                usage[model] += tokens
        reward = math.nan
        error = next(
            (part.error for n, part in parts.items() if n in self._formula.reads and part.failed),
            None,
        )
        if error is None:
            try:
                reward = self._formula.value(scores)
            except GradingError as problem:
                error = str(problem)
                flags[problem.kind] = error
        seconds = max(part.seconds for part in parts.values())
        return Grade(reward, error, scores, seconds, flags, usage)
