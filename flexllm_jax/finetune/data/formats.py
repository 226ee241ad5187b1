"""Dataset files to token sequences with a weight for each token.

Formats: OpenAI chat (`messages`), sharegpt, prompt/completion, text, alpaca, question/answer, or
tokens; named or detected. Loss is on what the model is to say (the assistant's turns, the
completion) up to and with the token that ends it, unless everything is asked for. A row that cannot
be used is skipped, counted, and reported with its line and reason; it never stops a job.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flexllm_jax.finetune.data.chat import UnusableRow
from flexllm_jax.finetune.data.readers import FORMATS, Draft, TokenDraft, read_row
from flexllm_jax.finetune.data.rows import DatasetError, read_rows
from flexllm_jax.finetune.data.tokens import CHARACTERS_PER_CALL, split_tokens
from flexllm_jax.models.chat_template import ChatTemplate
from flexllm_jax.models.tokenizer import encode_text, end_token_ids

ROWS_PER_TOKENIZER_CALL = 256
ROWS_FOR_DETECTION = 100
_MARGIN = 16  # tokens behind the last that is used, which a cut text may change
MOST_WORK = 2**24  # characters of a row's pieces, each with all before it; of 16 texts if longer


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


@dataclass(frozen=True)
class SkippedRow:
    """A row that was not used: its line from 1 (of a JSON array, the item's number) and why."""

    line: int
    reason: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """What a file holds: sequences in file order, and what was left out."""

    path: Path
    format: str
    rows: int
    sequences: tuple[TrainingSequence, ...]
    skipped: tuple[SkippedRow, ...]
    truncated: int
    unread: Mapping[str, int] = field(default_factory=dict)  # column -> rows whose was not read

    def __len__(self) -> int:
        return len(self.sequences)

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
            f"{self.path}: {self.rows} {self.format} rows, {len(self)} sequences, "
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


def detect_format(row: Mapping[str, Any]) -> str | None:
    """The format whose fields the row has, or None."""
    for name, fields in FORMATS.items():
        if all(field in row for field in fields):
            return name
    return None


def load_dataset(
    path: str | Path,
    tokenizer: Any,
    format: str = "auto",
    max_seq_len: int | None = None,
    train_on: Literal["completion", "all"] = "completion",
    vocab_size: int | None = None,
    eos_token_ids: Sequence[int] = (),
    go_on: Callable[[], bool] = lambda: True,
) -> Dataset:
    """Read, tokenize and mask a JSONL or JSON file.

    `tokenizer` is a Hugging Face tokenizer; conversations need its chat template. `eos_token_ids`:
    what else ends an output of the model, as its config says. Sequences longer than `max_seq_len`
    tokens are cut, and dropped if nothing trained is left; so are those with tokens that a model of
    `vocab_size` embeddings does not have. Raises DatasetError for a file of which nothing can be
    used, and when `go_on`, asked between rows, says no.
    """
    path = Path(path)
    if format != "auto" and format not in FORMATS:
        raise DatasetError(f"{path}: unknown format {format!r}; use auto or {', '.join(FORMATS)}")
    if format == "auto":
        format = _detect(path)
    if format in ("chat", "sharegpt") and not tokenizer.chat_template:
        raise DatasetError(
            f"{path}: {format} rows need a chat template and the model's tokenizer has none; "
            "use a chat model or prompt/completion rows"
        )
    encode = _Encoder(tokenizer, eos_token_ids, max_seq_len, train_on == "all", vocab_size)
    sequences: list[TrainingSequence] = []
    skipped: list[SkippedRow] = []
    rows = truncated = 0
    reader, template = read_rows(path), ChatTemplate(tokenizer)
    unread: Counter[str] = Counter()
    while batch := list(islice(reader, ROWS_PER_TOKENIZER_CALL)):
        rows += len(batch)
        kept: list[tuple[int, list[Draft] | list[TokenDraft]]] = []
        for line, row in batch:
            _require(go_on, path)
            try:
                drafts, columns = read_row(row, format, template)
            except UnusableRow as reason:
                skipped.append(SkippedRow(line, str(reason)))
            else:
                kept.append((line, drafts))
                unread.update(columns)
        for line, outcome in encode(kept):
            _require(go_on, path)
            if isinstance(outcome, str):
                skipped.append(SkippedRow(line, outcome))
            else:
                sequences.append(outcome[0])
                truncated += outcome[1]
    skipped.sort(key=lambda row: row.line)
    if not sequences:
        first = f"; line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise DatasetError(f"{path}: none of its {rows} rows can be trained on{first}")
    return Dataset(path, format, rows, tuple(sequences), tuple(skipped), truncated, unread)


def _require(go_on: Callable[[], bool], path: Path) -> None:
    if not go_on():
        raise DatasetError(f"{path}: was not read to its end")


def _detect(path: Path) -> str:
    seen: list[str] = []
    for _, row in islice(read_rows(path), ROWS_FOR_DETECTION):
        if isinstance(row, dict):
            name = detect_format(row)
            if name:
                return name
            seen = seen or sorted(row)
    if not seen:
        raise DatasetError(f"{path}: no row in it can be read; it must be JSONL or a JSON array")
    known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FORMATS.items())
    raise DatasetError(f"{path}: rows have the fields {', '.join(seen)}; a format needs ({known})")


# --- segments as tokens


class _Encoder:
    """Tokenizes many drafts in one call and masks them."""

    def __init__(
        self,
        tokenizer: Any,
        eos_token_ids: Sequence[int],
        max_seq_len: int | None,
        train_on_all: bool,
        vocab_size: int | None,
    ):
        self.tokenizer, self.max_seq_len, self.train_on_all = tokenizer, max_seq_len, train_on_all
        self.vocab_size = vocab_size
        longest = max(map(len, tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)))
        self.most_characters = (max_seq_len + _MARGIN) * longest if max_seq_len else math.inf
        self.ends = end_token_ids(tokenizer, eos_token_ids)
        own = tokenizer.eos_token_id
        self.eos = own if own is not None else next(iter(self.ends), None)
        # What the tokenizer puts before any text (Llama 3's BOS); an EOS is added here, not by it.
        self.prefix = [t for t in encode_text(tokenizer, "") if t != self.eos]

    def __call__(
        self, rows: list[tuple[int, list[Draft] | list[TokenDraft]]]
    ) -> Iterator[tuple[int, tuple[TrainingSequence, bool] | str]]:
        """Yield (line, (sequence, was cut)) or (line, reason) for every draft, in order."""
        group: list[tuple[int, Draft, list[str]]] = []
        work = 0
        for line, draft in ((line, draft) for line, drafts in rows for draft in drafts):
            if isinstance(draft, TokenDraft):
                yield line, self._finish(draft.tokens, draft.weights)
                continue
            texts = self._cut(draft.texts)
            own = sum(accumulate(map(len, texts)))  # every piece is tokenized with all before it
            if own > max(MOST_WORK, 16 * self.most_characters):
                yield line, f"its {len(texts)} turns and pieces are too many for its length"
                continue
            if group and work + own > CHARACTERS_PER_CALL:
                yield from self._encode(group)
                group, work = [], 0
            group.append((line, draft, texts))
            work += own
        yield from self._encode(group)

    def _encode(
        self, group: list[tuple[int, Draft, list[str]]]
    ) -> Iterator[tuple[int, tuple[TrainingSequence, bool] | str]]:
        pieces = split_tokens(self.tokenizer, [texts for _, _, texts in group])
        for (line, draft, _), own in zip(group, pieces, strict=True):
            yield line, self._sequence(draft, own)

    def _cut(self, texts: list[str]) -> list[str]:
        """What of a text's pieces can matter: tokens beyond `max_seq_len` do not."""
        cut, left = [], self.most_characters
        for text in texts:
            if left <= 0:
                break
            cut.append(text[: int(min(left, len(text)))])
            left -= len(text)
        return cut

    def _sequence(
        self, draft: Draft, pieces: list[list[int]]
    ) -> tuple[TrainingSequence, bool] | str:
        tokens: list[int] = []
        weights: list[float] = []
        for piece, segment in zip(pieces, draft.segments, strict=False):  # the last may be cut off
            tokens += piece
            # Serving stops at a token that ends an output: what a template puts behind it (a
            # newline, mostly) is never to be said.
            end = next((at for at, token in enumerate(piece) if token in self.ends), len(piece))
            said = len(piece) if draft.raw else min(end + 1, len(piece))
            weights += [segment.weight] * said + [0.0] * (len(piece) - said)
        if draft.raw and tokens[: len(self.prefix)] != self.prefix:
            tokens, weights = self.prefix + tokens, [0.0] * len(self.prefix) + weights
        ended = bool(tokens) and tokens[-1] in self.ends
        if draft.raw and self.eos is not None and not ended:
            tokens.append(self.eos)
            weights.append(1.0)
        if self.train_on_all:
            weights = [weight or 1.0 for weight in weights]
        return self._finish(tokens, weights)

    def _finish(
        self, tokens: list[int], weights: list[float]
    ) -> tuple[TrainingSequence, bool] | str:
        """The sequence, cut to its longest; or why it cannot be used."""
        length = len(tokens)
        limit = self.max_seq_len or length
        counted = np.array(weights[:limit], np.float32)
        counted[:1] = 0
        if not counted.any():
            if length > limit:
                return (
                    f"{length} tokens or more, and nothing to train in the first {limit} "
                    "(max_seq_len)"
                )
            return "nothing to train on"
        unknown = max(tokens[:limit], default=0)
        if self.vocab_size is not None and unknown >= self.vocab_size:
            text = self.tokenizer.convert_ids_to_tokens(unknown)
            return (
                f"the token {text!r} has id {unknown}, and the model embeds ids 0 to "
                f"{self.vocab_size - 1}: use the model's own tokenizer, or a model resized for it"
            )
        return TrainingSequence(np.array(tokens[:limit], np.int32), counted), length > limit
