"""What a row asks and what it wants to hear, for a look at an adapter's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flexllm_jax.finetune.data.items import TrainingPair, TrainingSequence


class Question(NamedTuple):
    """Token ids."""

    prompt: list[int]
    expected: list[int]


def questions(rows: Sequence[Any], count: int, most_tokens: int) -> list[Question]:
    """Of the first `count` rows that have one, with prompts of at most `most_tokens`: what stands
    before the first answer that is trained, and that answer. A text that is trained from its
    beginning is cut in the middle; of a pair the preferred answer is expected."""
    found: list[Question] = []
    for row in rows:
        if len(found) == count:
            break
        if isinstance(row, TrainingPair):
            row = row.preferred
        # Of a row to be answered for a reward there is its prompt alone.
        question = _question(row) if isinstance(row, TrainingSequence) else _prompt(row)
        if question and len(question.prompt) <= most_tokens:
            found.append(question)
    return found


def _prompt(row: Any) -> Question | None:
    return Question(list(row.tokens), []) if row.tokens else None


def _question(row: TrainingSequence) -> Question | None:
    trained = np.flatnonzero(row.loss_mask)
    if not len(trained):
        return None
    start = int(trained[0])
    if start == 1:
        start = max(1, len(row) // 2)
    after = np.flatnonzero(~row.loss_mask[start:])
    end = start + int(after[0]) if len(after) else len(row)
    return Question(row.tokens[:start].tolist(), row.tokens[start:end].tolist())
