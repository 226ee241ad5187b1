"""Rows of a reinforcement job: a prompt to answer, and whatever else a grader reads of it.

A row has `messages` (the last one not the assistant's) or `prompt` (a text, or messages). The
batches are counted, not drawn: which rows batch m has follows from the seed and m alone, so a
resumed job asks what it would have asked.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flexllm_jax.config import ReinforcementConfig
from flexllm_jax.finetune.data import DatasetError, SkippedRow
from flexllm_jax.finetune.data.rows import BadRow, read_rows
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import (
    Conversation,
    ConversationError,
    read_conversation,
    read_messages,
)
from flexllm_jax.models.text.tokenizer import encode_text

Given = str | list[dict[str, Any]]  # a prompt: a text, or messages


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row: its number among those that are used, its prompt as token ids (none where an
    environment gives it), and the row itself."""

    number: int
    tokens: tuple[int, ...]
    item: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class PromptDataset:
    """What a file of prompts holds, in file order, and what was left out."""

    path: Path
    rows: int
    items: tuple[Prompt, ...]
    skipped: tuple[SkippedRow, ...]
    unread: Mapping[str, int] = field(default_factory=dict)  # none: graders may read any column

    def __len__(self) -> int:
        return len(self.items)

    format = "prompt"
    truncated = 0

    @property
    def trained_tokens(self) -> int:
        """Prompts are not trained."""
        return 0

    def describe_unread(self) -> str:
        """Graders may read any column."""
        return ""

    @property
    def tokens(self) -> int:
        """All tokens of all prompts."""
        return sum(map(len, self.items))

    @cached_property
    def fingerprint(self) -> int:
        """CRC-32 of prompts and rows; a resumed job checks that its data did not change."""
        crc = 0
        for prompt in self.items:
            crc = zlib.crc32(np.array(prompt.tokens, np.int32).tobytes(), crc)
            crc = zlib.crc32(repr(sorted(prompt.item.items())).encode(errors="replace"), crc)
        return crc

    def summary(self, shown: int = 5) -> str:
        """Lines for a log: what was read, then the first `shown` skipped rows and why."""
        lines = [
            f"{self.path}: {self.rows} rows, {len(self)} prompts, {self.tokens} tokens, "
            f"{len(self.skipped)} rows skipped"
        ]
        lines += [f"  line {row.line}: {row.reason}" for row in self.skipped[:shown]]
        if len(self.skipped) > shown:
            lines.append(f"  ... and {len(self.skipped) - shown} more")
        return "\n".join(lines)

    def batch(self, number: int, size: int, seed: int) -> list[Prompt]:
        """Batch `number` of the endless sequence of the rows, in each epoch's own order."""
        rows = len(self.items)
        first = number * size
        return [
            self.items[self._order(seed, at // rows)[at % rows]]
            for at in range(first, first + size)
        ]

    def others(self, number: int, seed: int, used: set[int]) -> list[Prompt]:
        """Rows that can stand in for those of batch `number`, in an order of its own."""
        order = np.random.default_rng([seed, 1, number]).permutation(len(self.items))
        return [self.items[row] for row in order if row not in used]

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        key = (seed, epoch)
        if key not in self._orders:
            self._orders.clear()
            self._orders[key] = np.random.default_rng([seed, epoch]).permutation(len(self.items))
        return self._orders[key]

    @cached_property
    def _orders(self) -> dict[tuple[int, int], np.ndarray]:
        return {}


class PromptReader:
    """Turns prompts into token ids. `most_tokens`: of a prompt. `options`: variables of the chat
    template, where a row does not say otherwise. `shorter`: what can be done about long ones."""

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        most_tokens: int,
        options: Mapping[str, Any] | None = None,
        shorter: str = "lower method.max_tokens, or raise max_seq_len or finetune.max_tokens",
    ):
        self._options, self._shorter = dict(options or {}), shorter
        self._tokenizer, self._template = tokenizer, ChatTemplate(tokenizer)
        self._vocab_size, self._most_tokens = vocab_size, most_tokens

    def of_questions(self, most_tokens: int, options: Mapping[str, Any]) -> PromptReader:
        """The same for what graders ask."""
        shorter = "lower the grader's sampling_params.max_completions_tokens"
        return PromptReader(self._tokenizer, self._vocab_size, most_tokens, options, shorter)

    def text(self, given: Any, row: Mapping[str, Any] | None = None) -> str:
        """The text of a prompt. Raises ConversationError."""
        if isinstance(given, str):
            return given
        return self._template.render(self.conversation(given, row or {}))

    def conversation(self, messages: Any, row: Mapping[str, Any]) -> Conversation:
        """Messages whose last one is not the assistant's, with what else a row says of them."""
        read = read_messages(messages)
        if read[-1]["role"] == "assistant":
            raise ConversationError(
                "messages",
                "its last message is the assistant's, and nothing is left to be answered: "
                "end the prompt with what the assistant is to answer",
            )
        known = read_conversation(
            read, row.get("tools"), row.get("documents"), row.get("chat_template_kwargs")
        )
        return replace(known, options=self._options | dict(known.options))

    def tokens(self, given: Any, row: Mapping[str, Any] | None = None) -> tuple[int, ...]:
        """Token ids of a prompt. Raises ConversationError, with the reason, where there are none or
        too many."""
        text = self.text(given, row)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            reason = "text with half a surrogate pair, which is no character"
            raise ConversationError("prompt", reason) from None
        tokens = tuple(
            encode_text(self._tokenizer, text, add_special_tokens=isinstance(given, str))
        )
        if not tokens:
            raise ConversationError("prompt", "its prompt is empty")
        if len(tokens) > self._most_tokens:
            raise ConversationError(
                "prompt",
                f"its prompt has {len(tokens)} tokens, and beside its answer there is room for "
                f"{max(0, self._most_tokens)}: shorten it, or {self._shorter}",
            )
        if max(tokens) >= self._vocab_size:
            raise ConversationError(
                "prompt", f"it has token {max(tokens)}, which the model does not embed"
            )
        return tokens

    def continuation(self, text: str, after: Sequence[int] = ()) -> list[int]:
        """Token ids of a text that follows tokens; the one that ended them is not said twice."""
        tokens = encode_text(self._tokenizer, text, add_special_tokens=False)
        return tokens[1:] if after and tokens[:1] == [after[-1]] else tokens


def load_prompts(
    path: str | Path,
    reader: PromptReader | None,
    needed: Collection[str] = (),
    go_on: Callable[[], bool] = lambda: True,
) -> PromptDataset:
    """Read a JSONL or JSON file of prompts. Without a `reader` an environment makes prompts of the
    rows, whatever they hold. `needed`: fields that a grader reads.

    A row that cannot be used is skipped and counted. Raises DatasetError for a file of which
    nothing can be used, and when `go_on`, asked between rows, says no.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    skipped: list[SkippedRow] = []
    rows = 0
    for line, row in read_rows(path):
        if not go_on():
            raise DatasetError(f"{path}: was not read to its end")
        rows += 1
        reason = row.reason if isinstance(row, BadRow) else None
        tokens: tuple[int, ...] = ()
        if not isinstance(row, BadRow) and reader is not None:
            given = row.get("messages", row.get("prompt"))
            try:
                if given is None:
                    raise ConversationError("prompt", "no field `messages` or `prompt`")
                if missing := sorted(set(needed) - row.keys()):
                    raise ConversationError(
                        "item", f"no field `{missing[0]}`, which the grader reads"
                    )
                tokens = reader.tokens(given, row)
            except ConversationError as error:
                reason = str(error)
        if reason is not None or isinstance(row, BadRow):
            skipped.append(SkippedRow(line, reason or ""))
        else:
            prompts.append(Prompt(len(prompts), tokens, row))
    if not prompts:
        first = f"; line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise DatasetError(f"{path}: none of its {rows} rows can be answered{first}")
    return PromptDataset(path, rows, tuple(prompts), tuple(skipped))


def reader_of(
    method: ReinforcementConfig, tokenizer: Any, vocab_size: int, longest: int
) -> PromptReader:
    """What reads a job's prompts, of which a prompt with its answer may have `longest` tokens.
    DatasetError where no prompt has room."""
    longest = longest_episode(method, longest)
    if method.max_tokens >= longest:
        raise DatasetError(
            f"method.max_tokens={method.max_tokens}: a prompt with its answer may have {longest} "
            "tokens, so no prompt has room; lower it, or raise max_seq_len, finetune.max_tokens "
            "or model.max_model_len"
        )
    effort = method.reasoning_effort
    options = {"reasoning_effort": effort} if effort else {}
    return PromptReader(tokenizer, vocab_size, longest - method.max_tokens, options)


def longest_episode(method: ReinforcementConfig, longest: int) -> int:
    """Scoring an episode under the start's weights says one token more."""
    return longest - (method.kl_coef > 0)
