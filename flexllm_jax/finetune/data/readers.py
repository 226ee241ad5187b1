"""Rows of every format as conversations or plain text, with what is trained marked.

Besides the fields that make its format, a row may say more that changes what it means: `system`,
`tools` or `functions` (also as JSON text), `history`, `context`, `documents`,
`chat_template_kwargs`. They mean the same in every format that has a place for them. A `Row` knows
which of its columns were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexllm_jax.finetune.data.chat import (
    Segment,
    UnusableRow,
    conversation_segments,
    read_weight,
)
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import (
    Conversation,
    ConversationError,
    read_documents,
    read_messages,
    read_options,
    read_tools,
    short,
)

SHAREGPT_ROLES = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Draft:
    """A sequence before tokenization. Raw text gets the tokenizer's BOS and an EOS around it."""

    segments: list[Segment]
    raw: bool

    @property
    def texts(self) -> list[str]:
        """Of its segments."""
        return [segment.text for segment in self.segments]


@dataclass(frozen=True)
class TokenDraft:
    """A sequence that came as tokens; `weights` of predicting each."""

    tokens: list[int]
    weights: list[float]


# One sequence; or the preferred and the rejected one of a pair.
Item = tuple[Draft | TokenDraft, ...]


class Row:
    """The columns of a row, and which of them were read."""

    def __init__(self, columns: Mapping[str, Any]):
        self._columns = columns
        self._read: set[str] = set()
        self._inner: dict[str, Row] = {}

    def get(self, column: str) -> Any:
        """A column's value; None if there is none."""
        self._read.add(column)
        return self._columns.get(column)

    def text(self, column: str, may_be_empty: bool = False) -> str:
        """A column that must be text."""
        value = self.get(column)
        if not isinstance(value, str):
            raise UnusableRow(f"`{column}` must be text, not {type(value).__name__}")
        if not value.strip() and not may_be_empty:
            raise UnusableRow(f"`{column}` is empty")
        return value

    def texts(self, column: str) -> str:
        """A column that may be missing, a text, or several, which are joined by empty lines."""
        value = self.get(column)
        texts = list(value) if isinstance(value, list | tuple) else [value or ""]
        if not all(isinstance(text, str) for text in texts):
            raise UnusableRow(f"`{column}` must be text, not {short(value)}")
        return _join(*texts)

    def inner(self, column: str) -> Row:
        """A column that has columns of its own."""
        value = self.get(column)
        if not isinstance(value, dict):
            raise UnusableRow(f"`{column}` must be an object, not {short(value)}")
        self._inner[column] = Row(value)
        return self._inner[column]

    def unread(self) -> list[str]:
        """Columns that say something and were not read."""
        own = [c for c, v in self._columns.items() if c not in self._read and v not in _NOTHING]
        return own + [f"{c}.{name}" for c, row in self._inner.items() for name in row.unread()]


_NOTHING = (None, "", [], {})


def _join(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text.strip())


def read_chat(row: Row, template: ChatTemplate) -> list[Draft]:
    """OpenAI's messages."""
    messages = read_messages(row.get("messages"))
    return drafts_of(template, read_row_conversation(row, with_context(row, messages)))


def read_sharegpt(row: Row, template: ChatTemplate) -> list[Draft]:
    """Turns from humans and models."""
    messages = _sharegpt_messages(row.get("conversations"), "conversations")
    return drafts_of(template, read_row_conversation(row, with_context(row, messages)))


def read_prompt_completion(row: Row, template: ChatTemplate) -> list[Draft]:
    """A text and how it goes on, or messages and the answer to them."""
    if isinstance(row.get("prompt"), list):  # messages, as TRL has them
        asked = [{**m, "weight": 0} for m in read_messages(row.get("prompt"), "prompt")]
        said = read_messages(row.get("completion"), "completion")
        return drafts_of(template, read_row_conversation(row, with_context(row, [*asked, *said])))
    prompt = plain_prompt(row, row.text("prompt", may_be_empty=True))
    return [Draft([Segment(prompt, 0.0), Segment(row.text("completion"), 1.0)], raw=True)]


def plain_prompt(row: Row, prompt: str) -> str:
    """A prompt that is text, with what the row has before it."""
    history = (turn["content"] for turn in _history(row))
    before = _join(row.texts("system"), *history, row.texts("context"))
    return f"{before}\n\n{prompt}" if before else prompt


def read_text(row: Row, template: ChatTemplate) -> list[Draft]:
    """Text that is trained as it is."""
    return [Draft([Segment(row.text("text"), 1.0)], raw=True)]


def read_alpaca(row: Row, template: ChatTemplate) -> list[Draft]:
    """An instruction and its output."""
    instruction, answer = row.text("instruction"), row.text("output")
    given = _join(row.texts("input"), row.texts("context"))
    plain = f"### Instruction:\n{instruction}\n\n"
    plain += f"### Input:\n{given}\n\n" if given else ""
    question = f"{instruction}\n\n{given}" if given else instruction
    return _single_turn(row, template, question, answer, plain + "### Response:\n")


def read_question_answer(row: Row, template: ChatTemplate) -> list[Draft]:
    """A question and its answer."""
    question, answer = row.text("question"), row.text("answer")
    question = _join(row.texts("context"), question)
    return _single_turn(row, template, question, answer, f"Question: {question}\nAnswer: ")


def read_tokenized(row: Row, template: ChatTemplate) -> list[TokenDraft]:
    """As transformers' collators take them: what `labels` hides by -100, or a mask by 0, does not
    count. `weights`, of predicting each token, are aligned with `input_ids`, too."""
    tokens = row.get("input_ids")
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < 2**31 for token in tokens
    ):
        raise UnusableRow(f"`input_ids` must be a list of tokens, not {short(tokens)}")

    def column(name: str, default: Any) -> list[Any]:
        values = row.get(name)
        if values is None:
            return default
        if not isinstance(values, list) or len(values) != len(tokens):
            raise UnusableRow(
                f"`{name}` must be a list of {len(tokens)} items, as many as `input_ids` has, not "
                f"{short(values)}"
            )
        return values

    ones = [1] * len(tokens)
    weights = [read_weight(w, f"weights[{i}]") for i, w in enumerate(column("weights", ones))]
    for at, (token, label) in enumerate(zip(tokens, column("labels", tokens), strict=True)):
        if label == -100:
            weights[at] = 0.0
        elif label != token:
            raise UnusableRow(
                f"labels[{at}] is {short(label)}: it must be -100 or input_ids[{at}], which is "
                f"{token}"
            )
    shown = column("attention_mask", ones)
    for mask in (column("completion_mask", ones), column("assistant_masks", ones), shown):
        weights = [w if counts else 0.0 for w, counts in zip(weights, mask, strict=True)]
    return [
        TokenDraft(
            [token for token, one in zip(tokens, shown, strict=True) if one],
            [weight for weight, one in zip(weights, shown, strict=True) if one],
        )
    ]


def _single_turn(
    row: Row, template: ChatTemplate, question: str, answer: str, plain: str
) -> list[Draft]:
    """A question and its answer: a conversation if the model has a chat template, else plain."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    conversation = read_row_conversation(row, messages)
    if template.exists:
        return drafts_of(template, conversation)
    if conversation.tools or conversation.documents or conversation.options:
        raise UnusableRow("tools and documents need a chat template; the tokenizer has none")
    before = "".join(message["content"] + "\n\n" for message in conversation.messages[:-2])
    return [Draft([Segment(before + plain, 0.0), Segment(answer, 1.0)], raw=True)]


def drafts_of(template: ChatTemplate, conversation: Conversation) -> list[Draft]:
    """The sequences that a conversation becomes."""
    return [
        Draft(segments, raw=False) for segments in conversation_segments(template, conversation)
    ]


def read_row_conversation(row: Row, messages: Sequence[dict[str, Any]]) -> Conversation:
    """`messages` with what the row says besides: the system prompt and the turns before them come
    first."""
    own = [message for message in messages[:1] if message["role"] == "system"]
    system = row.texts("system")
    if system and system != (own and own[0]["content"]):
        own = [{"role": "system", "content": system}, *own]
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return Conversation(
        [*own, *_history(row), *rest],
        read_tools(row.get("tools")) + read_tools(row.get("functions"), "functions"),
        read_documents(row.get("documents")),
        read_options(row.get("chat_template_kwargs")),
    )


def _history(row: Row) -> list[dict[str, Any]]:
    """Turns before the row's own: pairs of a question and its answer, or messages of any form."""
    turns = row.get("history") or []
    if isinstance(turns, list) and turns and all(map(_is_pair, turns)):
        roles = ("user", "assistant")
        return [
            {"role": role, "content": text}
            for pair in turns
            for role, text in zip(roles, pair, strict=True)
        ]
    if isinstance(turns, list) and all(isinstance(t, dict) and "from" in t for t in turns):
        return _sharegpt_messages(turns, "history") if turns else []
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return read_messages(turns, "history")
    raise UnusableRow(f"`history` must be [question, answer] pairs or messages, not {short(turns)}")


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)


def with_context(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row's context before its first question, unless a message has it."""
    context = row.texts("context")
    if not context or any(context in message["content"] for message in messages):
        return messages
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise UnusableRow("`context` belongs to a question, and there is no user message")
    asked = {**messages[first], "content": _join(context, messages[first]["content"])}
    return [*messages[:first], asked, *messages[first + 1 :]]


def _sharegpt_messages(turns: Any, field: str) -> list[dict[str, Any]]:
    """The messages of a list of turns `{from, value}`."""
    if not isinstance(turns, list) or not turns:
        raise UnusableRow(f"`{field}` must be a list of turns, not {short(turns)}")
    messages = []
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise UnusableRow(f"{where} must have `from` and `value`, not be {short(turn)}")
        speaker, value = str(turn.get("from")).lower(), turn.get("value")
        if speaker not in SHAREGPT_ROLES:
            raise UnusableRow(
                f"{where}.from is {short(turn.get('from'))}, not human, gpt or system"
            )
        if not isinstance(value, str):
            raise UnusableRow(f"{where}.value must be text, not {short(value)}")
        said = {"tool_calls": _calls(value, where)} if speaker == "function_call" else {}
        rest = {key: turn[key] for key in turn.keys() - {"from", "value"}}
        content = "" if said else value
        messages.append({**rest, "role": SHAREGPT_ROLES[speaker], "content": content, **said})
    return read_messages(messages, field)


def _calls(value: str, where: str) -> list[dict[str, Any]]:
    """The calls of a turn: `{name, arguments}` as JSON text, or a list of them."""
    try:
        text = value if value.lstrip().startswith("[") else f"[{value}]"
        functions = read_tools(text, where)
    except ConversationError:
        raise UnusableRow(f"{where}.value must be calls as JSON, not {short(value)}") from None
    return functions
