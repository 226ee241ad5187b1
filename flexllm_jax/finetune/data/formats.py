"""Dataset files to token sequences with a weight for each token.

Formats (`table`): chat, sharegpt, prompt/completion, text, alpaca, question/answer, tokens, and
pairs of answers as OpenAI and TRL write them; named or detected. Loss is on what the model is to
say (the assistant's turns, the completion) up to and with the token that ends it, unless everything
is asked for. A row that cannot be used is skipped, counted, and reported with its line and reason;
it never stops a job.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flexllm_jax.config import PREFERENCE_METHODS
from flexllm_jax.finetune.data.chat import UnusableRow
from flexllm_jax.finetune.data.items import (
    Dataset,
    SkippedRow,
    TrainingItem,
    TrainingPair,
    TrainingSequence,
)
from flexllm_jax.finetune.data.readers import Draft, Item, TokenDraft
from flexllm_jax.finetune.data.rows import DatasetError, read_rows
from flexllm_jax.finetune.data.table import FORMATS, read_row
from flexllm_jax.finetune.data.tokens import CHARACTERS_PER_CALL, split_tokens
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.tokenizer import encode_text, end_token_ids

ROWS_PER_TOKENIZER_CALL = 256
ROWS_FOR_DETECTION = 100
_MARGIN = 16  # tokens behind the last that is used, which a cut text may change
MOST_WORK = 2**24  # characters of a row's pieces, each with all before it; of 16 texts if longer


def detect_format(row: Mapping[str, Any], pairs: bool = False) -> str | None:
    """The format whose fields the row has, of those with pairs of answers or of the others; or
    None."""
    for name, format in FORMATS.items():
        if format.pairs == pairs and all(field in row for field in format.fields):
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
    pairs: bool = False,
    max_pair_tokens: int | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> Dataset:
    """Read, tokenize and mask a JSONL or JSON file.

    `tokenizer` is a Hugging Face tokenizer; conversations need its chat template. `eos_token_ids`:
    what else ends an output of the model, as its config says. Sequences longer than `max_seq_len`
    tokens are cut, and dropped if nothing trained is left; so are those with tokens that a model of
    `vocab_size` embeddings does not have. `pairs`: rows are to have two answers, one preferred to
    the other; a pair of which one is longer than `max_seq_len`, or both together than
    `max_pair_tokens`, is dropped. Raises DatasetError for a file of which nothing can be used, and
    when `go_on`, asked between rows, says no.
    """
    path = Path(path)
    if format != "auto" and format not in FORMATS:
        raise DatasetError(f"{path}: unknown format {format!r}; use auto or {', '.join(FORMATS)}")
    if format == "auto":
        format = _detect(path, pairs)
    if FORMATS[format].pairs != pairs:
        raise DatasetError(_wrong_kind(path, format))
    if FORMATS[format].needs_template and not tokenizer.chat_template:
        raise DatasetError(
            f"{path}: {format} rows need a chat template and the model's tokenizer has none; "
            "use a chat model or prompt/completion rows"
        )
    encode = _Encoder(tokenizer, eos_token_ids, max_seq_len, train_on == "all", vocab_size)
    found: list[TrainingItem] = []
    skipped: list[SkippedRow] = []
    rows = truncated = 0
    reader, template = read_rows(path), ChatTemplate(tokenizer)
    unread: Counter[str] = Counter()
    while batch := list(islice(reader, ROWS_PER_TOKENIZER_CALL)):
        rows += len(batch)
        kept: list[tuple[int, Item]] = []
        for line, row in batch:
            _require(go_on, path)
            try:
                items, columns = read_row(row, format, template)
            except UnusableRow as reason:
                skipped.append(SkippedRow(line, str(reason)))
            else:
                kept += [(line, item) for item in items]
                unread.update(columns)
        outcomes = encode([draft for _, item in kept for draft in item])
        for line, item in kept:
            own = []
            for _ in item:
                _require(go_on, path)
                own.append(next(outcomes))
            made = _item(own, max_seq_len, max_pair_tokens)
            if isinstance(made, str):
                skipped.append(SkippedRow(line, made))
            else:
                found.append(made)
                truncated += own[0][1]
    skipped.sort(key=lambda row: row.line)
    if not found:
        first = f"; line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise DatasetError(f"{path}: none of its {rows} rows can be trained on{first}")
    return Dataset(path, format, rows, tuple(found), tuple(skipped), truncated, unread)


def _require(go_on: Callable[[], bool], path: Path) -> None:
    if not go_on():
        raise DatasetError(f"{path}: was not read to its end")


def _detect(path: Path, pairs: bool) -> str:
    seen: list[str] = []
    other: str | None = None
    for _, row in islice(read_rows(path), ROWS_FOR_DETECTION):
        if isinstance(row, dict):
            if name := detect_format(row, pairs):
                return name
            other = other or detect_format(row, not pairs)
            seen = seen or sorted(row)
    if other is not None:
        raise DatasetError(_wrong_kind(path, other))
    if not seen:
        raise DatasetError(f"{path}: no row in it can be read; it must be JSONL or a JSON array")
    raise DatasetError(
        f"{path}: rows have the fields {', '.join(seen)}; a format needs ({_known(pairs)})"
    )


def _known(pairs: bool) -> str:
    own = {name: format.fields for name, format in FORMATS.items() if format.pairs == pairs}
    return "; ".join(f"{name}: {', '.join(fields)}" for name, fields in own.items())


def _wrong_kind(path: Path, format: str) -> str:
    """What is wrong with a file in a format that is not for the job's method."""
    *others, last = PREFERENCE_METHODS
    methods = f"{', '.join(others)} or {last}"
    if FORMATS[format].pairs:
        return (
            f"{path}: {format} rows are pairs of answers, and this job is supervised: train on "
            f"them with method {methods}, or give rows with one answer ({_known(False)})"
        )
    return (
        f"{path}: {format} rows have one answer each, and method {methods} needs pairs "
        f"({_known(True)}): give those, or train with method supervised"
    )


def _item(
    own: list[tuple[TrainingSequence, bool] | str],
    max_seq_len: int | None,
    max_pair_tokens: int | None,
) -> TrainingItem | str:
    """A sequence, or a pair, from what became of its drafts; or why it cannot be used."""
    for outcome in own:
        if isinstance(outcome, str):
            return outcome
    first, *others = [outcome[0] for outcome in own if not isinstance(outcome, str)]
    if not others:
        return first
    (rejected,) = others
    pair = TrainingPair(first, rejected)
    if any(outcome[1] for outcome in own):
        return f"an answer with its prompt has more than {max_seq_len} tokens (max_seq_len)"
    if max_pair_tokens is not None and len(pair) > max_pair_tokens:
        return (
            f"its answers with their prompts have {len(pair)} tokens together, more than "
            f"{max_pair_tokens} (finetune.max_tokens)"
        )
    asked, other = (s.tokens[: int(s.loss_mask.argmax())] for s in (first, rejected))
    if not np.array_equal(asked, other):
        return "the prompts of its two answers differ"
    if np.array_equal(first.tokens, rejected.tokens):
        return "its two answers are the same"
    return pair


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
        self, drafts: list[Draft | TokenDraft]
    ) -> Iterator[tuple[TrainingSequence, bool] | str]:
        """Yield (sequence, was cut), or a reason, for every draft, in order."""
        group: list[tuple[Draft, list[str]]] = []
        work = 0
        for draft in drafts:
            if isinstance(draft, TokenDraft):
                yield from self._encode(group)
                group, work = [], 0
                yield self._finish(draft.tokens, draft.weights)
                continue
            texts = self._cut(draft.texts)
            own = sum(accumulate(map(len, texts)))  # every piece is tokenized with all before it
            if own > max(MOST_WORK, 16 * self.most_characters):
                yield from self._encode(group)
                group, work = [], 0
                yield f"its {len(texts)} turns and pieces are too many for its length"
                continue
            if group and work + own > CHARACTERS_PER_CALL:
                yield from self._encode(group)
                group, work = [], 0
            group.append((draft, texts))
            work += own
        yield from self._encode(group)

    def _encode(
        self, group: list[tuple[Draft, list[str]]]
    ) -> Iterator[tuple[TrainingSequence, bool] | str]:
        pieces = split_tokens(self.tokenizer, [texts for _, texts in group])
        for (draft, _), own in zip(group, pieces, strict=True):
            yield self._sequence(draft, own)

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
