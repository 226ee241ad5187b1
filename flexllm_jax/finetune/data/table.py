"""The formats that rows of a dataset may have: a table, to which a format is added as a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexllm_jax.finetune.data.chat import UnusableRow
from flexllm_jax.finetune.data.pairs import read_openai_preference, read_preference
from flexllm_jax.finetune.data.readers import (
    Draft,
    Item,
    Row,
    TokenDraft,
    read_alpaca,
    read_chat,
    read_prompt_completion,
    read_question_answer,
    read_sharegpt,
    read_text,
    read_tokenized,
)
from flexllm_jax.finetune.data.rows import BadRow
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import ConversationError


@dataclass(frozen=True)
class Format:
    """What rows of a format have, and how they are read. pairs: each has two answers, of which one
    is preferred. needs_template: a chat template."""

    fields: tuple[str, ...]
    read: Callable[[Row, ChatTemplate], list[Item]]
    pairs: bool = False
    needs_template: bool = False


def _single(
    read: Callable[[Row, ChatTemplate], list[Draft] | list[TokenDraft]],
) -> Callable[[Row, ChatTemplate], list[Item]]:
    return lambda row, template: [(draft,) for draft in read(row, template)]


# The most telling formats first.
FORMATS: dict[str, Format] = {
    "tokenized": Format(("input_ids",), _single(read_tokenized)),
    "chat": Format(("messages",), _single(read_chat), needs_template=True),
    "sharegpt": Format(("conversations",), _single(read_sharegpt), needs_template=True),
    "prompt_completion": Format(("prompt", "completion"), _single(read_prompt_completion)),
    "alpaca": Format(("instruction", "output"), _single(read_alpaca)),
    "question_answer": Format(("question", "answer"), _single(read_question_answer)),
    "text": Format(("text",), _single(read_text)),
    "openai_preference": Format(
        ("input", "preferred_output", "non_preferred_output"),
        read_openai_preference,
        pairs=True,
        needs_template=True,
    ),
    "preference": Format(("chosen", "rejected"), read_preference, pairs=True),
}


def read_row(
    row: dict[str, Any] | BadRow, format: str, template: ChatTemplate
) -> tuple[list[Item], list[str]]:
    """The items of a row, and its columns that were not read. Raises UnusableRow."""
    if isinstance(row, BadRow):
        raise UnusableRow(row.reason)
    missing = [field for field in FORMATS[format].fields if field not in row]
    if missing:
        raise UnusableRow(f"no field `{missing[0]}`, which {format} rows have")
    columns = Row(row)
    try:
        items = FORMATS[format].read(columns, template)
    except ConversationError as error:
        raise UnusableRow(str(error)) from None
    try:
        for draft in (d for item in items for d in item if isinstance(d, Draft)):
            "".join(draft.texts).encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableRow("text with half a surrogate pair, which is no character") from None
    return items, columns.unread()
