"""What both sides are asked to do, and the tokens they do it with.

Prompts and rows are random token ids. A tokenizer with one letter for each id lets a dataset, which
is text, become exactly these.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from flexllm_jax.engine.sampling.params import SamplingParams

TOKENS = 4096  # ids that prompts and rows are made of, each one letter of the tokenizer
FIRST_LETTER = 0x4E00


@dataclass(frozen=True)
class Workload:
    """What both sides do, and how the engine is set up for it.

    tpot_ms: the engine's objective while it does both at once. targets: least ours ÷ theirs.
    """

    title: str
    hf_config: dict
    dtype: str
    sequence: int
    prompts: int
    prompt: int
    new_tokens: int
    rank: int
    tpot_ms: float
    token_buckets: list[int]
    engine: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def sampling(self) -> SamplingParams:
        """Greedy, to the last token."""
        return SamplingParams(max_tokens=self.new_tokens, ignore_eos=True)


class TokenRow(TypedDict):
    """A row as transformers' collators take it; a label of -100 does not count."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EpochWorkload:
    """One epoch of LoRA on all linear layers with AdamW, `batch_rows` rows a step.

    finetune: the engine's section of that name.
    """

    title: str
    hf_config: dict
    batch_rows: int
    rank: int
    lr: float
    token_buckets: list[int]
    finetune: dict[str, Any]


def random_tokens(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Token ids [rows, length]."""
    return rng.integers(10, TOKENS, (rows, length))


def write_rows(path: Path, tokens: np.ndarray) -> Path:
    """A dataset whose rows become exactly these tokens."""
    rows = ("".join(chr(FIRST_LETTER + int(t)) for t in row) for row in tokens)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path
