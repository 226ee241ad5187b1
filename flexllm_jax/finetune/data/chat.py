r"""Conversations as text, with the assistant's turns marked as what is trained.

Where a turn begins and ends is found by applying the chat template to growing prefixes of the
conversation, so any template works, with generation markers or without. A turn begins where the
prompt given when serving ends. When a template renders a turn differently once the conversation
goes on (Qwen3 drops the thinking of earlier turns), the conversation becomes several sequences,
each exactly as served.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
}


class UnusableRow(ValueError):
    """A row cannot be trained on; the message is the reason."""


@dataclass(frozen=True)
class Segment:
    """A stretch of text, tokenized on its own: a trained turn or what stands before it."""

    text: str
    trained: bool


Message = Mapping[str, Any]


def chat_messages(row: Mapping[str, Any], field: str = "messages") -> list[dict[str, Any]]:
    """The OpenAI-style messages of a row, checked; text parts are joined, calls' arguments read."""
    messages = row.get(field)
    if not isinstance(messages, list) or not messages:
        raise UnusableRow(f"`{field}` must be a list of messages, not {_short(messages)}")
    checked = []
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise UnusableRow(f"{where} must have `role` and `content`, not be {_short(message)}")
        if message.get("role") not in ROLES:
            raise UnusableRow(f"{where}.role is {_short(message.get('role'))}, not one of {ROLES}")
        content = message.get("content")
        if isinstance(content, list):
            content = _join_parts(content, where)
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise UnusableRow(f"{where}.content must be text, not {_short(content)}")
        checked.append({**message, "content": content})
        if calls := message.get("tool_calls"):
            checked[-1]["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    return checked


def sharegpt_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a `conversations: [{from, value}]` row."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UnusableRow(f"`conversations` must be a list of turns, not {_short(turns)}")
    messages = []
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise UnusableRow(f"{where} must have `from` and `value`, not be {_short(turn)}")
        role = SHAREGPT_ROLES.get(str(turn.get("from")).lower())
        if role is None:
            raise UnusableRow(
                f"{where}.from is {_short(turn.get('from'))}, not human, gpt or system"
            )
        if not isinstance(turn.get("value"), str):
            raise UnusableRow(f"{where}.value must be text, not {_short(turn.get('value'))}")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def conversation_segments(
    tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None = None
) -> list[list[Segment]]:
    """The sequences a conversation becomes, each a list of segments whose texts join to it.

    Assistant turns with `weight` 0 (OpenAI's field) are not trained. Text after the last assistant
    turn is left out: nothing in it is trained. Raises UnusableRow.
    """
    sequences: list[tuple[str, list[tuple[int, int]]]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:  # the first message answers nothing
            continue
        prompt = _render(tokenizer, messages[:index], tools, generate=True)
        text = _render(tokenizer, messages[: index + 1], tools, generate=False)
        if not text.startswith(prompt):
            raise UnusableRow(
                f"the chat template renders message {index} differently from the prompt it answers"
            )
        spans = [(len(prompt), len(text))] if message.get("weight", 1) != 0 else []
        if sequences and text.startswith(sequences[-1][0]):
            sequences[-1] = (text, sequences[-1][1] + spans)
        else:
            sequences.append((text, spans))
    if not sequences:
        raise UnusableRow("no assistant message that answers another")
    if not any(spans for _, spans in sequences):
        raise UnusableRow("every assistant message has weight 0")
    return [_segments(text, spans) for text, spans in sequences if spans]


def _segments(text: str, spans: list[tuple[int, int]]) -> list[Segment]:
    segments, at = [], 0
    for start, end in spans:
        segments += [Segment(text[at:start], False), Segment(text[start:end], True)]
        at = end
    return [*segments, Segment(text[at:], False)]


def _render(
    tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None, generate: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=generate
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UnusableRow(f"the chat template refuses the conversation: {reason}") from None


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls with arguments as objects, as templates expect them; OpenAI sends them as JSON."""
    if not isinstance(calls, list):
        raise UnusableRow(f"{where} must be a list, not {_short(calls)}")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableRow(f"{where}[{index}] must have `function` with `name` and `arguments`")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            text = _short(function["arguments"])
            raise UnusableRow(f"{where}[{index}].function.arguments must be an object, not {text}")
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _join_parts(parts: list[Any], where: str) -> str:
    if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "".join(part["text"] for part in parts)
    raise UnusableRow(f"{where}.content has parts that are not text")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
