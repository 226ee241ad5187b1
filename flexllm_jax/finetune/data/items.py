"""What a file of rows becomes: sequences of tokens with weights, or pairs of them; and what was
left out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """A sequence to train on. `weights[i]`: what predicting token i counts (0 for the first)."""

    tokens: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def loss_mask(self) -> np.ndarray:
        """Which tokens count, bool [n]."""
        return self.weights != 0


@dataclass(frozen=True, eq=False)
class TrainingPair:
    """Two answers to a prompt, each as a sequence with it: one preferred to the other."""

    preferred: TrainingSequence
    rejected: TrainingSequence

    def __len__(self) -> int:
        return len(self.preferred) + len(self.rejected)


TrainingItem = TrainingSequence | TrainingPair


@dataclass(frozen=True)
class SkippedRow:
    """A row that was not used: its line from 1 (of a JSON array, the item's number) and why."""

    line: int
    reason: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """What a file holds: sequences, or pairs of them, in file order, and what was left out."""

    path: Path
    format: str
    rows: int
    items: tuple[TrainingItem, ...]
    skipped: tuple[SkippedRow, ...]
    truncated: int
    unread: Mapping[str, int] = field(default_factory=dict)  # column -> rows whose was not read

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def sequences(self) -> tuple[TrainingSequence, ...]:
        """All sequences; of a pair first the preferred one."""
        return tuple(
            sequence
            for item in self.items
            for sequence in (
                (item.preferred, item.rejected) if isinstance(item, TrainingPair) else (item,)
            )
        )

    @cached_property
    def tokens(self) -> int:
        """All tokens of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @cached_property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(int(sequence.loss_mask.sum()) for sequence in self.sequences)

    @cached_property
    def fingerprint(self) -> int:
        """CRC-32 of tokens, masks and weights that are not 1; a resumed job checks that its data
        did not change."""
        crc = 0
        for sequence in self.sequences:
            crc = zlib.crc32(sequence.tokens.tobytes(), crc)
            crc = zlib.crc32(sequence.loss_mask.tobytes(), crc)
            if not np.isin(sequence.weights, (0, 1)).all():
                crc = zlib.crc32(sequence.weights.tobytes(), crc)
        return crc

    def summary(self, shown: int = 5) -> str:
        """Lines for a log: what was read, then the first `shown` skipped rows and why."""
        lines = [
            f"{self.path}: {self.rows} {self.format} rows, {len(self.sequences)} sequences, "
            f"{self.tokens} tokens ({self.trained_tokens} trained), "
            f"{self.truncated} truncated, {len(self.skipped)} rows skipped"
        ]
        if self.unread:
            lines.append(f"  {self.describe_unread()}")
        lines += [f"  line {row.line}: {row.reason}" for row in self.skipped[:shown]]
        if len(self.skipped) > shown:
            lines.append(f"  ... and {len(self.skipped) - shown} more")
        return "\n".join(lines)

    def describe_unread(self) -> str:
        """Which columns were not read, in a line."""
        columns = ", ".join(f"{name} ({rows} rows)" for name, rows in self.unread.items())
        return f"columns that {self.format} rows do not use, not read: {columns}"
